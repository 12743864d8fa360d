"""What a training step costs on a GPU: with shapes never seen before, by part, launches and waits.

    python benchmarks/bench_gpu.py [--size small] [--seconds 600] [--steps 20] [--plain]

Utterances are drawn from 4 to 16 s, so that no two batches have the same shape; a second figure is
for one shape again and again.  `--plain` takes the plain forms of torch in place of the kernels.
"""

import argparse
import random
import statistics
import time

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from icetransfer.model import gpu
from icetransfer.model.scaling import set_batch_count
from icetransfer.model.transducer import SIZES, TransducerModel, build_transducer
from icetransfer.training.loss import transducer_loss
from icetransfer.training.optim import ScaledAdam

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
WARM_UP = 4
TRAINED_BATCHES = 100_000  # where fine-tuning begins in the regularisers' schedules


def draw_batch(seconds: float, draw: random.Random, vocab_size: int) -> Batch:
    """Features, their lengths, tokens and theirs, of utterances of 4 to 16 s, 3 tokens a second."""
    lengths: list[int] = []
    while sum(lengths) < 100 * seconds:
        lengths.append(draw.randint(400, 1600))
    lens = torch.tensor(lengths)
    token_lens = lens * 3 // 100
    features = torch.randn(len(lens), int(lens.max()), 80)
    tokens = torch.randint(1, vocab_size, (len(lens), int(token_lens.max())))
    return features.cuda(), lens, tokens.cuda(), token_lens


def step(model: TransducerModel, optimizer: ScaledAdam, batch: Batch) -> Tensor:
    """A step of training, without what reads the data."""
    features, lens, tokens, token_lens = batch
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        out, out_lens = model.encode(features, lens, 16, 128)
        losses = transducer_loss(model, out, out_lens, tokens, token_lens, backend="torch")
    total = losses.total(0.5, 1.0, 0.2)
    total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return total.detach()


def median_step(model: TransducerModel, optimizer: ScaledAdam, batches: list[Batch]) -> float:
    """Seconds of a step, each waited for."""
    seconds = []
    for batch in batches:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(model, optimizer, batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def launches(model: TransducerModel, optimizer: ScaledAdam, batch: Batch) -> tuple[int, float, int]:
    """Kernels of a step, the seconds that they keep the GPU busy, and the waits for it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step(model, optimizer, batch)
        torch.cuda.synchronize()
    events = profiled.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
    waits = sum(e.name in ("cudaStreamSynchronize", "cudaMemcpy") for e in events)
    return len(kernels), sum(e.device_time_total for e in kernels) / 1e6, waits


def main() -> None:
    """Prints the figures of one size and batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=600.0, help="of audio in a batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: no GPU here (torch.cuda.is_available() is false)")
    if args.plain:
        gpu.HAS_TRITON = False
    model = build_transducer(SIZES[args.size]).cuda().train()
    set_batch_count(model, TRAINED_BATCHES)
    optimizer = ScaledAdam(model.parameters(), lr=1e-3, clipping_scale=2.0)
    draw = random.Random(0)
    batches = [
        draw_batch(args.seconds, draw, model.vocab_size) for _ in range(WARM_UP + args.steps)
    ]
    started = time.perf_counter()
    median_step(model, optimizer, batches[:WARM_UP])
    warm_up = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    new = median_step(model, optimizer, batches[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() / 2**30
    fixed = median_step(model, optimizer, [batches[-1]] * args.steps)
    count, busy, waits = launches(model, optimizer, batches[-1])
    form = "plain" if args.plain else "kernels"
    print(
        f"{torch.cuda.get_device_name()}, {args.size}, {args.seconds:g} s, bf16, {form}: "
        f"new shapes {new:.3f} s = {args.seconds / new:.0f} x real time, "
        f"the same again {fixed:.3f} s; "
        f"{count} launches, busy {busy:.3f} s, {waits} waits; peak {peak:.1f} GiB; "
        f"the first {WARM_UP} steps {warm_up:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
