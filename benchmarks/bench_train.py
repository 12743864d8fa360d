"""What a training step costs: seconds by part, memory, and the share of what the machine can do.

    python benchmarks/bench_train.py [--sizes small medium] [--growth]
    python benchmarks/bench_train.py --checkpoint epoch-30.pt --config exp/nl/config.yaml

A batch is 60 s of made-up audio, 12 utterances of 5 s with 15 tokens; each chunk size is trained
at in turn. The machine's own speeds are measured in the same run: 100 % of an operation's FLOPs is
what a large float32 matrix product reaches. The last line is all of it as JSON.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from icetransfer.config import Config, load_config
from icetransfer.data.augment import make_transform
from icetransfer.data.features import PADDING
from icetransfer.data.shards import NUM_BINS
from icetransfer.experiment import seed_everything
from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.scaling import set_batch_count
from icetransfer.model.transducer import SIZES, TransducerModel, build_transducer
from icetransfer.training.augment import augment
from icetransfer.training.loss import loss_scales, transducer_loss
from icetransfer.training.optim import ScaledAdam
from icetransfer.training.resume import choose_precision, make_optimizer

# icefall with k2, two cores of a machine whose matrix products ran at this speed; the lower of the
# two figures of each range: seconds a step, and of an encoder pass in evaluation at chunk 16.
ICEFALL_GFLOPS = 349.0
ICEFALL = {"small": (2.1, 0.80), "medium": (4.0, 1.37)}
CONFIG = Path(__file__).parents[1] / "egs/en/conf/default.yaml"
AS_ICEFALL = ["train.chunk_sizes=[16, 32, 64, -1]"]

PARTS = ("data", "encoder", "loss", "backward", "optimiser")
TRAINED_BATCHES = 100_000  # the regularisers as fine-tuning has them, at their schedules' end
TOKENS_A_SECOND = 3
EVAL_CHUNK = 16
BUSY = 0.05  # share of the machine's time that others may take before figures are doubted


@dataclass(frozen=True)
class Case:
    """What is timed: `utterances` of `seconds` each, with a vocabulary or the model's own."""

    name: str
    model: Callable[[int | None], TransducerModel]
    utterances: int = 12
    seconds: float = 5.0
    vocab_size: int | None = None


@dataclass
class Cost:
    """What a case costs.

    Attributes:
        parameters: of the model.
        seconds: of a step, by part, mean.
        eval_seconds: of an encoder pass in evaluation, mean.
        gflop: of a step, by part, without elementwise operations; of "eval" too.
        peak_mib: memory at most during the steps, without that before the model was built.
        audio_seconds: of a step.
    """

    parameters: int
    seconds: dict[str, float]
    eval_seconds: float
    gflop: dict[str, float]
    peak_mib: float
    audio_seconds: float

    @property
    def step_seconds(self) -> float:
        """Of the whole step."""
        return sum(self.seconds.values())


class Stopwatch:
    """Seconds by part; waits for the device at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        """Begins a part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.started = time.perf_counter()

    def lap(self, part: str) -> None:
        """Ends a part and begins the next."""
        started = self.started
        self.restart()
        self.laps.setdefault(part, []).append(self.started - started)

    def means(self) -> dict[str, float]:
        """Mean seconds by part."""
        return {part: sum(laps) / len(laps) for part, laps in self.laps.items()}


@dataclass
class PeakMemory:
    """Memory of the process, or of the GPU, beyond what it had when this was made."""

    device: torch.device
    before: float = field(init=False)

    def __post_init__(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        self.before = _status_mib("VmRSS")

    def mib(self) -> float:
        """At most, so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        return _status_mib("VmHWM") - self.before


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


class OthersWatch:
    """How much of the machine's time other processes (and other machines on its host) take."""

    def __init__(self) -> None:
        self.before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, idle, waiting, interrupt, soft, stolen = ticks
        second = os.sysconf("SC_CLK_TCK")
        own = sum(os.times()[:2])
        busy = (user + nice + system + interrupt + soft + stolen) / second
        return busy + (idle + waiting) / second, busy, own

    def share(self) -> float:
        """Of all cores' time since this was made."""
        all_, busy, own = (now - then for now, then in zip(self._read(), self.before, strict=True))
        return max(0.0, busy - own) / max(all_, 1e-9)


@contextmanager
def counted(gflop: dict[str, float], part: str) -> Iterator[None]:
    """Counts the floating-point operations of a part."""
    own = {torch.ops.mkldnn._linear_pointwise: _linear_flop}  # the counter does not know it
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        yield
    gflop[part] = counter.get_total_flops() / 1e9


def _linear_flop(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def machine_speeds(device: torch.device) -> dict[str, float]:
    """GFLOP/s of a large matrix product and of the front end's convolutions, at float32."""
    side = 2048
    a, b = torch.randn(2, side, side, device=device).unbind(0)
    rows = torch.randn(12, 248, 39, 32, device=device)
    image = torch.randn(12, 246, 19, 128, device=device).permute(0, 3, 1, 2)  # channels-last
    conv = nn.Conv2d(32, 128, 3, stride=(1, 2), bias=False).to(device)
    depthwise = nn.Conv2d(128, 128, 7, padding=3, groups=128, bias=False).to(device)
    pointwise = nn.Conv2d(128, 384, 1, bias=False).to(device)
    operations = {
        "matmul": lambda: a @ b,
        "conv3x3": lambda: conv(rows.permute(0, 3, 1, 2)),
        "depthwise7x7": lambda: depthwise(image),
        "conv1x1": lambda: pointwise(image),
    }
    speeds = {}
    with torch.inference_mode():
        for name, run in operations.items():
            gflop: dict[str, float] = {}
            with counted(gflop, name):
                run()
            watch = Stopwatch(device)
            for _ in range(6):
                run()
                watch.lap(name)
            speeds[name] = gflop[name] / min(watch.laps[name])
    return speeds


class Bench:
    """A model with its batch and optimiser.

    Args:
        case: what.
        settings: how it is trained.
        device: where.
    """

    def __init__(self, case: Case, settings: Config, device: torch.device) -> None:
        seed_everything(1)
        self.case, self.device, self.settings = case, device, settings.train
        self.model = case.model(case.vocab_size).to(device)
        set_batch_count(self.model, TRAINED_BATCHES)
        self.optimizer: ScaledAdam = make_optimizer(self.model, settings)
        self.precision = choose_precision(self.settings.precision, device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.precision == torch.float16 and device.type == "cuda"
        )
        self.transform = make_transform(self.settings.spec_augment)
        frames = round(100 * case.seconds)
        self.utterances = [4 * torch.randn(frames, NUM_BINS) - 8 for _ in range(case.utterances)]
        self.lens = torch.full((case.utterances,), frames)
        shape = (case.utterances, max(1, round(TOKENS_A_SECOND * case.seconds)))
        self.tokens = torch.randint(1, self.model.vocab_size, shape).to(device)
        self.token_lens = torch.full((case.utterances,), shape[1])

    def batch(self) -> tuple[Tensor, Tensor]:
        """Padded, augmented features on the device, and their lengths."""
        padded = nn.utils.rnn.pad_sequence(self.utterances, True, padding_value=PADDING)
        return augment(self.transform, padded.to(self.device), self.lens), self.lens

    def encode(self, features: Tensor, lens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
        """The encoder at one chunk size, with all of the left context."""
        with self._autocast():
            return self.model.encode(features, lens, chunk_size)

    def loss(self, out: Tensor, out_lens: Tensor) -> Tensor:
        """The weighted sum of the losses."""
        with self._autocast():
            losses = transducer_loss(
                self.model, out, out_lens, self.tokens, self.token_lens,
                prune_range=self.settings.prune_range, backend=self.settings.loss_backend,
            )  # fmt: skip
        scales = loss_scales(TRAINED_BATCHES, 0, self.settings.simple_loss_scale)
        return losses.total(*scales, self.settings.ctc_loss_scale)

    def step(self, watch: Stopwatch, chunk_size: int) -> None:
        """One training step, timed by part."""
        self.model.train()
        watch.restart()
        features, lens = self.batch()
        watch.lap("data")
        out, out_lens = self.encode(features, lens, chunk_size)
        watch.lap("encoder")
        loss = self.loss(out, out_lens)
        watch.lap("loss")
        self.scaler.scale(loss).backward()
        watch.lap("backward")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimiser")

    @torch.inference_mode()
    def evaluate(self, watch: Stopwatch) -> None:
        """One encoder pass in evaluation."""
        self.model.eval()
        features, lens = self.batch()
        watch.restart()
        self.encode(features, lens, EVAL_CHUNK)
        watch.lap("eval")

    def count(self) -> dict[str, float]:
        """GFLOP of a step and of an evaluation, by part."""
        gflop: dict[str, float] = {}
        features, lens = self.batch()
        self.model.train()
        with counted(gflop, "encoder"):
            out, out_lens = self.encode(features, lens, EVAL_CHUNK)
        with counted(gflop, "loss"):
            self.loss(out, out_lens)
        # Each product has two in the backward pass. Counted, a depthwise convolution's gradient
        # would pass for that of a full one.
        gflop["backward"] = 2 * (gflop["encoder"] + gflop["loss"])
        self.model.eval()
        with counted(gflop, "eval"), torch.no_grad():
            self.encode(features, lens, EVAL_CHUNK)
        return gflop

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        )


def measure(case: Case, config: Config, device: torch.device, rounds: int) -> Cost:
    """The case's cost, over so many rounds of all chunk sizes."""
    memory = PeakMemory(device)
    bench = Bench(case, config, device)
    chunk_sizes = config.train.chunk_sizes
    bench.step(Stopwatch(device), chunk_sizes[0])  # warms up
    watch = Stopwatch(device)
    for _ in range(rounds):
        for chunk_size in chunk_sizes:
            bench.step(watch, chunk_size)
    peak = memory.mib()
    evaluation = Stopwatch(device)
    bench.evaluate(Stopwatch(device))
    for _ in range(2 * rounds):
        bench.evaluate(evaluation)
    return Cost(
        parameters=sum(parameter.numel() for parameter in bench.model.parameters()),
        seconds=watch.means(),
        eval_seconds=evaluation.means()["eval"],
        gflop=bench.count(),
        peak_mib=peak,
        audio_seconds=case.utterances * case.seconds,
    )


def table(cost: Cost, speeds: dict[str, float]) -> Iterator[str]:
    """Lines on the case's parts: seconds, share of the step, GFLOP, share of the machine."""
    yield f"{'':12}{'seconds':>9}{'of step':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'of matmul':>11}"
    whole = {"step": cost.step_seconds, "eval": cost.eval_seconds}
    gflop = cost.gflop | {"step": sum(cost.gflop.get(part, 0.0) for part in PARTS)}
    for part, seconds in (cost.seconds | whole).items():
        line = f"{part:12}{seconds:9.4f}{seconds / cost.step_seconds:9.1%}"
        if part in gflop:
            speed = gflop[part] / seconds
            line += f"{gflop[part]:9.1f}{speed:9.1f}{speed / speeds['matmul']:11.1%}"
        yield line
    yield (
        f"{cost.audio_seconds / cost.step_seconds:.1f} s of audio a second; "
        f"peak memory {cost.peak_mib:.0f} MiB"
    )


def against_icefall(name: str, cost: Cost, speeds: dict[str, float]) -> dict[str, float]:
    """Shares of what icefall would take here; none but for the sizes that it was measured at."""
    if name not in ICEFALL:
        return {}
    scale = ICEFALL_GFLOPS / speeds["matmul"]
    step, evaluation = (seconds * scale for seconds in ICEFALL[name])
    return {"step": cost.step_seconds / step, "eval": cost.eval_seconds / evaluation}


GROWTH = {
    "seconds of an utterance": [
        {"utterances": 1, "seconds": seconds} for seconds in (5.0, 15.0, 30.0, 60.0)
    ],
    "utterances of 5 s": [{"utterances": number} for number in (3, 6, 12)],
    "vocabulary": [{"vocab_size": size} for size in (500, 2000, 8000)],
}


def growth(case: Case, config: Config, device: torch.device) -> dict[str, dict[str, Any]]:
    """Cost along each axis, with the exponents of its power law: of all points, of the last two."""
    found: dict[str, dict[str, Any]] = {}
    for axis, changes in GROWTH.items():
        costs = [measure(replace(case, **change), config, device, rounds=1) for change in changes]
        values = [float(list(change.values())[-1]) for change in changes]
        series = {
            "step_seconds": [cost.step_seconds for cost in costs],
            "loss_seconds": [cost.seconds["loss"] for cost in costs],
            "eval_seconds": [cost.eval_seconds for cost in costs],
            "peak_mib": [cost.peak_mib for cost in costs],
        }
        exponents = {
            name: [slope(values, y), slope(values[-2:], y[-2:])] for name, y in series.items()
        }
        found[axis] = {"values": values, **series, "exponents": exponents}
    return found


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y over log x."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    above = sum((a - mean_x) * (b - mean_y) for a, b in logs)
    return above / sum((a - mean_x) ** 2 for a, _ in logs)


def growth_table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines on how the cost grows."""
    for axis, series in found.items():
        yield (
            f"\n{axis:24}"
            + "".join(f"{v:10g}" for v in series["values"])
            + "  exponent  (last two)"
        )
        for name, (overall, last) in series["exponents"].items():
            digits = 0 if name == "peak_mib" else 3
            row = "".join(f"{value:10.{digits}f}" for value in series[name])
            yield f"  {name:22}{row}{overall:10.2f}{last:10.2f}"


def cases(args: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""

    def of_size(name: str) -> Callable[[int | None], TransducerModel]:
        dims = SIZES[name]
        return lambda vocab_size: build_transducer(dims.with_vocabulary(vocab_size or 500))

    def of_file(path: Path) -> Callable[[int | None], TransducerModel]:
        def load(vocab_size: int | None) -> TransducerModel:
            model = load_transducer(path)
            return build_transducer(model.dims.with_vocabulary(vocab_size)) if vocab_size else model

        return load

    if args.checkpoint:
        return [Case(str(path), of_file(path)) for path in args.checkpoint]
    return [Case(name, of_size(name)) for name in args.sizes]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["small", "medium"], choices=list(SIZES))
    parser.add_argument("--checkpoint", nargs="+", type=Path, help="files to time instead")
    parser.add_argument("--config", type=Path, help="whose train section to take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3, help="of all chunk sizes (%(default)s)")
    parser.add_argument("--growth", action="store_true", help="cost by length, batch, vocabulary")
    return parser.parse_args()


def main() -> None:
    """Prints the tables and the JSON."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    overrides = ["language=en", *([] if args.config else AS_ICEFALL)]
    config = load_config([args.config or CONFIG], overrides)
    watch = OthersWatch()
    speeds = machine_speeds(device)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "machine": platform.machine(), "device": str(device), "threads": args.threads,
        "gflops": speeds, "cases": {},
    }  # fmt: skip
    print(
        f"{platform.machine()}, {device}, {args.threads} threads, torch {torch.__version__}\n"
        "GFLOP/s: " + ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    )
    for case in cases(args):
        cost = measure(case, config, device, args.rounds)
        compared = against_icefall(case.name, cost, speeds)
        print(f"\n{case.name}: {cost.parameters / 1e6:.2f} M parameters")
        print("\n".join(table(cost, speeds)))
        for what, share in compared.items():
            print(f"{what}: {share:.0%} of icefall's time, scaled by the speed of matmul")
        results["cases"][case.name] = asdict(cost) | {"of_icefall": compared}
        if args.growth:
            found = growth(case, config, device)
            print("\n".join(growth_table(found)))
            results["cases"][case.name]["growth"] = found
    results["others"] = watch.share()
    if results["others"] > BUSY:
        print(f"\nWARNING: others took {results['others']:.0%} of the machine's time: busy machine")
    print(f"\n{json.dumps(results)}")


if __name__ == "__main__":
    main()
