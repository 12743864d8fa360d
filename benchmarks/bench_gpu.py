"""What training costs on a GPU, and how exact it is: the tables of docs/speed.md.

    python benchmarks/bench_gpu.py               all tables, in under five minutes on an H100
    python benchmarks/bench_gpu.py steps --size small --seconds 600
    python benchmarks/bench_gpu.py --cpu         what can be tried without a GPU, tiny

A step is that of `train.py`: SpecAugment, encoder, losses, backward pass, clipping, optimiser;
without the reading of data.  Utterances are drawn from 4 to 16 s with 3 tokens a second, so that no
two batches have the same shape; chunk 16, left context 128.

tables:
  numerics   output and gradient errors of each precision against float64 on the CPU
  steps      seconds for new shapes and for one shape again, launches, waits, by part
  plain      the same for the plain forms of torch in the place of the kernels
  memory     the most that a step takes, by size of the batch
  recovery   that a batch which does not fit is computed in pieces, to the same gradient
  training   losses of a small training in each precision, beside those of the CPU
  nccl       seconds in which as many processes as there are GPUs sum the gradients of 66 M weights
"""

import argparse
import copy
import importlib.metadata
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from icetransfer.config import load_config
from icetransfer.data.loader import Batch
from icetransfer.experiment import seed_everything
from icetransfer.model import gpu, scaling
from icetransfer.model.transducer import (
    SIZES,
    TransducerDims,
    TransducerModel,
    build_transducer,
)
from icetransfer.train import clip_and_step, compute_losses, forward_backward
from icetransfer.training.distributed import GradientSums, World
from icetransfer.training.memory import until_it_fits
from icetransfer.training.optim import ScaledAdam

CONFIG = Path(__file__).parents[1] / "egs/en/conf/default.yaml"
# The medium and streaming model of most recipes: 66 million parameters.
LARGE = replace(
    SIZES["medium"],
    num_encoder_layers=(2, 2, 3, 4, 3, 2),
    encoder_dim=(192, 256, 384, 512, 384, 256),
    feedforward_dim=(512, 768, 1024, 1536, 1024, 768),
    num_heads=(4, 4, 4, 8, 4, 4),
    cnn_module_kernel=(31, 31, 15, 15, 15, 31),
)
MODELS = SIZES | {"large": LARGE}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIER = (16, 128)
WARM_UP = 4
TRAINED_BATCHES = 100_000  # where fine-tuning begins in the regularisers' schedules


@dataclass
class Run:
    """What a step of `train.py` needs of a run."""

    model: TransducerModel
    precision: torch.dtype
    device: torch.device
    settings: Any
    step: int = 1000
    seed: int = 1
    rate: float = 1.0
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        self.gradient_sums = GradientSums(self.world, self.model.parameters())
        if next(self.model.parameters()).device.type != self.device.type:
            self.model = self.model.to(self.device)
        self.model.train()
        self.optimizer = ScaledAdam(self.model.parameters(), lr=0.02, clipping_scale=2.0)
        half = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0, enabled=half)


def make_run(dims: TransducerDims, precision: str, device: str, spec_augment: bool = True) -> Run:
    """A run of a model with random weights, its regularisers as fine-tuning has them."""
    overrides = [
        "language=en", "init=random", "train.loss_backend=torch", "train.loss_warmup_steps=100",
        f"train.spec_augment.enabled={spec_augment}",
    ]  # fmt: skip
    settings = load_config([CONFIG], overrides).train
    model = build_transducer(dims)
    scaling.set_batch_count(model, TRAINED_BATCHES)
    return Run(model, PRECISIONS[precision], torch.device(device), settings)


def draw_batch(seconds: float, draw: random.Random, vocab_size: int) -> Batch:
    """A batch in pinned memory, where there is a GPU."""
    lengths: list[int] = []
    while sum(lengths) < 100 * seconds:
        lengths.append(draw.randint(400, 1600))
    lens = torch.tensor(lengths)
    token_lens = lens * 3 // 100
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    shape = (len(lens), int(token_lens.max()))
    batch = Batch(
        features=torch.randn(len(lens), int(lens.max()), 80, generator=generator) - 6,
        feature_lens=lens,
        tokens=torch.randint(1, vocab_size, shape, generator=generator),
        token_lens=token_lens,
        ids=tuple(map(str, range(len(lens)))),
        seconds=sum(lengths) / 100,
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def step(run: Run, batch: Batch) -> Tensor:
    """One step of training; its losses, still on the device."""
    run.step += 1
    return clip_and_step(run, forward_backward(run, [batch], TIER))  # type: ignore[arg-type]


def wait() -> None:
    """Until a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Seconds of some work, waited for."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


@contextmanager
def plain_forms() -> Iterator[None]:
    """Without kernels."""
    kept, gpu.HAS_TRITON = gpu.HAS_TRITON, False
    try:
        yield
    finally:
        gpu.HAS_TRITON = kept


# ----------------------------------------------------------------------------------------- numerics


def errors(dims: TransducerDims, device: str, precisions: list[str]) -> Iterator[str]:
    """Lines with relative errors of output and gradient against float64, dropout off."""
    seed_everything(0)
    model = build_transducer(dims).eval()
    lens = torch.tensor([411, 300, 57])
    features = torch.randn(3, 411, 80)

    def gradient(model: TransducerModel, features: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        out, out_lens = model.encode(features, lens, *TIER)
        there = torch.arange(out.size(1)) < out_lens.unsqueeze(1)
        out = out * there.unsqueeze(2).to(out.device)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out.double() * weights.to(out.device)).mean().mul(2**16).backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
        return out.detach().double().cpu(), torch.cat(grads)

    expected = gradient(copy.deepcopy(model).double(), features.double())
    model.to(device)
    for precision in precisions:
        dtype = PRECISIONS[precision]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            given = gradient(model, features.to(device))
        parts = [float((a - b).norm() / b.norm()) for a, b in zip(given, expected, strict=True)]
        yield f"{precision}: output {parts[0]:.1e}, gradient {parts[1]:.1e}"


def numerics(args: argparse.Namespace) -> None:
    """Prints the errors of a small and a large model."""
    for name in ("tiny",) if args.cpu else ("small", "large"):
        for line in errors(MODELS[name], args.device, list(PRECISIONS)):
            print(f"numerics, {name}, {line}", flush=True)


# -------------------------------------------------------------------------------------------- steps


def parts_of_a_step(run: Run, batch: Batch) -> dict[str, float]:
    """Seconds of the encoder and of the losses, both with their backward passes, and the rest."""
    moved = batch.to(run.device)
    run.model.zero_grad()

    def encode() -> None:
        with torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32):
            out, _ = run.model.encode(moved.features, moved.feature_lens, *TIER)
        out.float().sum().backward()  # type: ignore[no-untyped-call]

    def all_of_it() -> None:
        losses, _, _ = compute_losses(run, moved, moved.features, *TIER)  # type: ignore[arg-type]
        losses.total(0.5, 1.0, 0.2).backward()  # type: ignore[no-untyped-call]

    for work in (encode, all_of_it):
        work()
    encoder, whole = timed(encode), timed(all_of_it)
    return {
        "encoder": encoder,
        "losses": max(0.0, whole - encoder),
        "optimiser": timed(lambda: run.optimizer.step()),
    }


def trace(run: Run, batch: Batch) -> tuple[int, float, int, Counter[str]]:
    """Kernels of a step, seconds that they keep the GPU busy, waits for it, seconds by kernel."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step(run, batch)
        wait()
    events = profiled.events()
    on_gpu = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    kernels = [e for e in events if e.device_type == on_gpu and "#" not in e.name]
    waits = sum(e.name in ("cudaStreamSynchronize", "cudaMemcpy") for e in events)
    by_name: Counter[str] = Counter()
    for event in kernels:
        by_name[event.name[:60]] += event.device_time_total / 1e6
    return len(kernels), sum(by_name.values()), waits, by_name


def time_steps(args: argparse.Namespace, name: str, seconds: float, steps: int) -> None:
    """Prints what steps of a model cost."""
    run = make_run(MODELS[name], args.precision, args.device)
    draw = random.Random(0)
    count = WARM_UP + steps
    batches = [draw_batch(seconds, draw, run.model.vocab_size) for _ in range(count)]
    started = time.perf_counter()
    for batch in batches[:WARM_UP]:
        timed(lambda batch=batch: step(run, batch))  # type: ignore[misc]
    warm_up = time.perf_counter() - started
    if not args.cpu:
        torch.cuda.reset_peak_memory_stats()
    new = statistics.median(
        timed(lambda batch=batch: step(run, batch))  # type: ignore[misc]
        for batch in batches[WARM_UP:]
    )
    whole = timed(lambda: [step(run, batch) for batch in batches[WARM_UP:]]) / steps
    again = statistics.median(timed(lambda: step(run, batches[-1])) for _ in range(5))
    audio = statistics.mean(batch.seconds for batch in batches)
    label = f"{name}, {seconds:g} s, {args.precision}, {args.form}"
    print(
        f"steps, {label}: new shapes {new:.3f} s = {audio / new:.0f} x real time, one after the "
        f"other without a wait {whole:.3f} s = {audio / whole:.0f} x, one shape again "
        f"{again:.3f} s; the first {WARM_UP} steps {warm_up:.1f} s",
        flush=True,
    )
    parts = parts_of_a_step(run, batches[-1])
    print(f"parts, {label}: " + ", ".join(f"{k} {v:.3f} s" for k, v in parts.items()), flush=True)
    if args.cpu:
        return
    peak = torch.cuda.max_memory_allocated() / 2**30
    launches, busy, waits, by_name = trace(run, batches[-1])
    print(
        f"launches, {label}: {launches}, GPU busy {busy:.3f} s, {waits} waits, peak {peak:.1f} GiB",
        flush=True,
    )
    for kernel, own in by_name.most_common(args.kernels):
        print(f"    {1000 * own:7.2f} ms  {kernel}")


def steps(args: argparse.Namespace) -> None:
    """Prints what steps cost by kernels."""
    args.form = "kernels" if gpu.HAS_TRITON and not args.cpu else "plain"
    chosen = [(args.size, args.seconds)] if args.size else [("small", 600.0), ("large", 1000.0)]
    if args.cpu:
        chosen = [("tiny", 20.0)]
    for name, seconds in chosen:
        time_steps(args, name, seconds, 2 if args.cpu else args.steps)


def plain(args: argparse.Namespace) -> None:
    """Prints what steps cost by plain forms."""
    args.form = "plain"
    with plain_forms():
        time_steps(args, args.size or "small", args.seconds, 3)


# ------------------------------------------------------------------------------------------- memory


def memory(args: argparse.Namespace) -> None:
    """Prints peaks by size of the batch, until one does not fit."""
    run = make_run(LARGE, args.precision, args.device)
    for seconds in (200, 400, 1000, 2000, 4000):
        batch = draw_batch(seconds, random.Random(seconds), run.model.vocab_size)
        torch.cuda.reset_peak_memory_stats()
        try:
            step(run, batch)
            wait()
        except torch.OutOfMemoryError:
            print(f"memory, large, {seconds} s: does not fit", flush=True)
            break
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"memory, large, {seconds} s, {args.precision}: {peak:.1f} GiB", flush=True)


def recovery(args: argparse.Namespace) -> None:
    """Prints in how many pieces a batch is computed for which there is too little memory."""
    seed_everything(0)
    run = make_run(SIZES["small"], "bf16", args.device, spec_augment=False)
    scaling.set_batch_count(run.model, TRAINED_BATCHES)
    run.model.eval()  # no dropout, which pieces would draw otherwise
    batch = draw_batch(600, random.Random(1), run.model.vocab_size)

    def gradient(whole: bool) -> Tensor:
        pieces = 1
        if whole:
            forward_backward(run, [batch], TIER)  # type: ignore[arg-type]
        else:
            for attempt in until_it_fits(run.step, [batch]):
                with attempt:
                    pieces = attempt.pieces
                    forward_backward(run, [batch], TIER, attempt.pieces)  # type: ignore[arg-type]
            print(f"recovery: with 2 GiB, the batch of small was computed in {pieces} pieces")
        grads = (p.grad for p in run.model.parameters())
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    expected = gradient(whole=True)
    torch.cuda.empty_cache()
    whole_memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / whole_memory)
    try:
        given = gradient(whole=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = float((given - expected).norm() / expected.norm())
    print(f"recovery: its gradient differs from that of the whole batch by {error:.1e}", flush=True)


# ----------------------------------------------------------------------------------------- training


def losses_of_training(precision: str, device: str, count: int) -> list[float]:
    """The loss a frame at each of so many steps of the tiny model, on four batches in turn."""
    seed_everything(0)
    run = make_run(replace(SIZES["tiny"], vocab_size=30), precision, device, spec_augment=False)
    draw = random.Random(0)
    seconds = 16 if torch.cuda.is_available() else 6
    batches = [draw_batch(seconds, draw, 30) for _ in range(4)]
    numbers = [step(run, batches[i % len(batches)]) for i in range(count)]
    return [float(total / frames) for total, *_, frames, _ in numbers]


def training(args: argparse.Namespace) -> None:
    """Prints losses of a short training in each precision."""
    count = 12 if args.cpu else 80
    shown = [0, count // 4, count // 2, count - 1]
    ways = [("fp32", "cpu"), ("fp16", "cpu")] if args.cpu else [("fp32", "cpu")]
    if not args.cpu:
        ways += [(precision, "cuda") for precision in PRECISIONS]
    for precision, device in ways:
        found = losses_of_training(precision, device, count)
        text = ", ".join(f"step {i + 1}: {found[i]:.3f}" for i in shown)
        print(f"training, tiny, {precision} on {device}: {text}", flush=True)


def _sum_gradients(rank: int, count: int) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", init_method="tcp://127.0.0.1:29511", rank=rank, world_size=count
    )
    grads = torch.ones(66_000_000, device="cuda")
    torch.distributed.all_reduce(grads)
    seconds = timed(lambda: torch.distributed.all_reduce(grads))
    if rank == 0:
        print(f"nccl: {count} processes sum 66 M gradients in {seconds:.4f} s", flush=True)
    torch.distributed.destroy_process_group()


def nccl(args: argparse.Namespace) -> None:
    """Prints how long a sum over all GPUs takes."""
    count = torch.cuda.device_count()
    torch.multiprocessing.spawn(_sum_gradients, args=(count,), nprocs=count)  # type: ignore


TABLES = {
    "numerics": numerics, "steps": steps, "plain": plain, "memory": memory,
    "recovery": recovery, "training": training, "nccl": nccl,
}  # fmt: skip
ON_A_CPU = ("numerics", "steps", "training")


def main() -> None:
    """Prints the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="default: all of them")
    parser.add_argument("--size", choices=MODELS, help="of steps and plain")
    parser.add_argument("--seconds", type=float, default=600.0, help="of audio in their batches")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--kernels", type=int, default=0, help="how many are listed")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("bench_gpu: no GPU here (torch.cuda.is_available() is false); try --cpu")
    args.device = "cpu" if args.cpu else "cuda"
    name = "CPU" if args.cpu else torch.cuda.get_device_name()
    triton = importlib.metadata.version("triton") if gpu.HAS_TRITON else "none"
    print(f"{name}, torch {torch.__version__}, Triton {triton}", flush=True)
    for table in args.tables or (ON_A_CPU if args.cpu else TABLES):
        if args.cpu and table not in ON_A_CPU:
            parser.error(f"{table} needs a GPU")
        TABLES[table](args)


if __name__ == "__main__":
    main()
