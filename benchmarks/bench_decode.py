"""What streaming recognition costs: real-time factor, streams of a core, memory, size of the files.

    cd egs/nl; python ../../benchmarks/bench_decode.py --exp exp/NAME
    python benchmarks/bench_decode.py --checkpoint epoch-30.pt --config decode.yaml
    python benchmarks/bench_decode.py --bundle DIR
    python benchmarks/bench_decode.py --size medium decode.chunk_sizes=[16] [--hour]

Every tier and precision that is there: torch over whole utterances with the chunk mask ("masked"),
and as streams torch, onnxruntime and sherpa-onnx.  A checkpoint or a size (random weights) is
exported for it, at the tiers and precisions of the config.  Each figure comes from a process of its
own.  Audio is the experiment's first test recordings, or noise.

RTF: seconds of computing per second of audio, of one stream on one thread (CPU time) and on two
(by the clock).  Streams a core: seconds of audio per CPU second with --streams at once; "against
torch" is that over torch's at the same tier.  In real time: how many speakers one core serves such
that 95 % of the chunks are computed within a chunk's time (`icetransfer/streaming/streams.py`);
half as many again were too many.  Memory: at most, beyond what the process had before it loaded
the model.
--hour: one stream of an hour, ten minutes at a time.  The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train import BUSY, OthersWatch, PeakMemory
from rich.console import Console
from rich.table import Table

from icetransfer import experiment
from icetransfer.config import Config, chunk_label, load_config
from icetransfer.data.features import fbank, read_manifest
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.decode import Reader, decode_streams, tail_seconds
from icetransfer.export import Source, export_tier
from icetransfer.model.checkpoint import load_transducer, save_checkpoint
from icetransfer.model.transducer import SIZES, TransducerModel, build_transducer
from icetransfer.score import TORCH_PRECISIONS, test_sets
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, make_search
from icetransfer.streaming.sherpa import SherpaRecognizer
from icetransfer.streaming.streams import Samples, StreamPool, serve

CONFIG = Path(__file__).parents[1] / "egs/en/conf/default.yaml"
ENGINES = ("masked", "torch", "onnxruntime", "sherpa")
POOLED = ("torch", "onnxruntime")  # those whose streams are `icetransfer/streaming/streams.py`'s
SECONDS = 8  # of a made-up recording
FIRST_SPEAKERS, MOST_SPEAKERS = 4, 2048
PIECE_MINUTES, PIECES = 10, 6  # of --hour


@dataclass(frozen=True)
class Case:
    """One way of recognising.

    Attributes:
        engine: of ENGINES.
        precision: "fp32", "int8", ...
        chunk_size: in 50 Hz frames.
        left_context_frames: in 50 Hz frames.
        model: the checkpoint, or the bundle's folder.
        search: "greedy_search" or "modified_beam_search".
        beam: of the latter.
    """

    engine: str
    precision: str
    chunk_size: int
    left_context_frames: int
    model: Path
    search: str
    beam: int

    @property
    def model_bytes(self) -> int:
        """Of the files."""
        if self.model.is_file():
            return self.model.stat().st_size
        return Exported(self.model).size(self.precision)

    def load(self, threads: int) -> Any:
        """The model."""
        torch.set_num_threads(threads)
        if self.engine == "sherpa":
            tail = tail_seconds(self.chunk_size)
            return SherpaRecognizer(
                self.model, self.chunk_size, self.precision, self.search, self.beam, tail, threads
            )
        if self.engine == "onnxruntime":
            return OnnxTransducer(self.model, self.precision, threads)
        return load_transducer(self.model)

    def recognise(self, model: Any, recordings: list[Samples], streams: int) -> None:
        """Recognises all, so many at a time."""
        if self.engine == "sherpa":
            for first in range(0, len(recordings), streams):
                model(recordings[first : first + streams])
            return
        search = make_search(self.search, model, self.beam, SHERPA)
        tier = self.chunk_size, self.left_context_frames
        if self.engine == "masked":
            with torch.inference_mode():
                for first in range(0, len(recordings), streams):
                    search(*masked(model, recordings[first : first + streams], *tier))
            return
        keyed = ((str(number), samples) for number, samples in enumerate(recordings))
        for _ in decode_streams(model, search, keyed, *tier, streams):
            pass

    def pool(self, model: Any) -> StreamPool:
        """A pool of streams of this tier."""
        search = make_search(self.search, model, self.beam, SHERPA)
        return StreamPool(model, search, self.chunk_size, self.left_context_frames)


def masked(
    model: TransducerModel, recordings: list[Samples], chunk_size: int, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder output of whole utterances with the numbers of streaming."""
    silence = np.zeros(round(tail_seconds(chunk_size) * SAMPLING_RATE), dtype=np.float32)
    features = [torch.from_numpy(fbank(np.concatenate([r, silence]))) for r in recordings]
    lens = torch.tensor([len(rows) for rows in features])
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    return model.encode(padded, lens, chunk_size, left)


def elapsed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that it takes."""
    started = clock()
    run()
    return clock() - started


def measure(case: Case, recordings: list[Samples], streams: int) -> dict[str, Any]:
    """Every figure of a case but those of two threads; meant for a process of its own."""
    watch, memory = OthersWatch(), PeakMemory(torch.device("cpu"))
    model = case.load(threads=1)
    case.recognise(model, recordings[:1], 1)  # warms up
    seconds = sum(map(len, recordings)) / SAMPLING_RATE
    few = recordings[: max(1, len(recordings) // 4)]
    one = elapsed(lambda: case.recognise(model, few, 1), time.process_time)
    many = elapsed(lambda: case.recognise(model, recordings, streams), time.process_time)
    found: dict[str, Any] = {
        "rtf_one_stream": one / (sum(map(len, few)) / SAMPLING_RATE),
        "streams_per_core": seconds / many,
        "peak_mib": memory.mib(),
        "model_bytes": case.model_bytes,
    }
    if case.engine in POOLED:
        found |= real_time(case, model, recordings)
    return found | {"others": watch.share()}


def measure_two_threads(case: Case, recordings: list[Samples]) -> dict[str, Any]:
    """The real-time factor of one stream on two threads, by the clock."""
    watch = OthersWatch()
    model = case.load(threads=2)
    case.recognise(model, recordings[:1], 1)
    few = recordings[: max(1, len(recordings) // 4)]
    taken = elapsed(lambda: case.recognise(model, few, 1), time.perf_counter)
    seconds = sum(map(len, few)) / SAMPLING_RATE
    return {"rtf_two_threads": taken / seconds, "others": watch.share()}


def real_time(case: Case, model: Any, recordings: list[Samples]) -> dict[str, Any]:
    """How many speakers a core serves in time, and how late 95 % of the chunks are then."""
    best: dict[str, Any] = {"real_time_streams": 0, "late_ms_p95": None}
    speakers = FIRST_SPEAKERS
    while speakers <= MOST_SPEAKERS:
        spoken = [recordings[number % len(recordings)] for number in range(speakers)]
        pool = case.pool(model)
        service = serve(pool, spoken, speakers)
        late = float(np.percentile(service.delays, 95))
        if late > pool.chunk_seconds:
            break
        best = {"real_time_streams": speakers, "late_ms_p95": 1000 * late}
        speakers = speakers * 3 // 2
    return best


def hour(case: Case, recordings: list[Samples]) -> dict[str, Any]:
    """CPU seconds and memory of each ten minutes of one stream."""
    model = case.load(threads=1)
    case.recognise(model, recordings[:1], 1)
    pool = case.pool(model)
    (stream,) = pool.open()
    minute = np.resize(np.concatenate(recordings), 60 * SAMPLING_RATE)
    memory = PeakMemory(torch.device("cpu"))
    cpu_seconds, mib = [], []
    for _ in range(PIECES):
        started = time.process_time()
        for second in PIECE_MINUTES * np.split(minute, 60):
            stream.accept(second)
            while pool.step():
                pass
        cpu_seconds.append(time.process_time() - started)
        mib.append(memory.mib())
    return {"cpu_seconds": cpu_seconds, "peak_mib": mib, "tokens": len(stream.settled.tokens)}


def in_a_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Runs it in a fresh process: its memory and threads are its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def bundle_cases(folder: Path, settings: Config) -> Iterator[Case]:
    """Streaming tiers and precisions of a bundle, or of a folder of bundles."""
    decode = settings.decode
    for tier in sorted({path.parent for path in folder.rglob("encoder.onnx")}):
        for encoder in sorted(tier.glob("encoder*.onnx"), key=lambda path: len(path.name)):
            precision = encoder.name.removeprefix("encoder").removesuffix("onnx").strip(".")
            model = OnnxTransducer(tier, precision or "fp32")
            if model.chunk_size == -1:
                continue
            for engine in ("onnxruntime", "sherpa"):
                yield Case(
                    engine,
                    precision or "fp32",
                    model.chunk_size,
                    model.left_context_frames,
                    tier,
                    decode.search,
                    decode.beam,
                )


def torch_cases(checkpoint: Path, like: list[Case]) -> Iterator[Case]:
    """Torch's cases at the tiers of others."""
    for case in like:
        if case.engine == "sherpa" and case.precision in TORCH_PRECISIONS:
            for engine in ("masked", "torch"):
                yield replace(case, engine=engine, model=checkpoint)


def export_all(checkpoint: Path, folder: Path, settings: Config) -> None:
    """Exports a checkpoint at the config's streaming tiers, with made-up tokens."""
    size = load_transducer(checkpoint).vocab_size
    tokens = folder / "given.txt"
    tokens.write_text("<blk> 0\n" + "".join(f"t{i} {i}\n" for i in range(1, size)))
    source, decode = Source.load(checkpoint, tokens), settings.decode
    precisions = [precision for precision in decode.precisions if precision != "fp32"]
    for chunk_size in decode.chunk_sizes:
        if chunk_size != -1:
            bundle = Exported(folder / str(chunk_size))
            export_tier(source, bundle, chunk_size, decode.left_context_frames, precisions)


def made_up_recordings(count: int) -> list[Samples]:
    """Noise whose level goes up and down."""
    rng = np.random.default_rng(1)
    level = 0.1 * np.abs(np.sin(np.arange(SECONDS * SAMPLING_RATE) / 3000))
    return [(level * rng.standard_normal(len(level))).astype(np.float32) for _ in range(count)]


def test_recordings(opened: experiment.Experiment, count: int) -> list[Samples]:
    """The first recordings of the first test set that can be read."""
    manifest = next(iter(test_sets(opened.config).values())).manifest
    path = opened.manifests_dir / manifest
    read = Reader(read_manifest(path)[:count])
    return [samples for _, samples in read]


def results_table(cases: list[Case], found: list[dict[str, Any]]) -> Table:
    """All figures."""
    table = Table(title="Streaming recognition")
    for column in ("engine", "precision", "latency"):
        table.add_column(column)
    for column in ("RTF", "2 threads", "streams a core", "against torch", "in real time"):
        table.add_column(column, justify="right")
    table.add_column("late 95 %, ms", justify="right")
    table.add_column("files, MB", justify="right")
    table.add_column("memory, MiB", justify="right")
    torchs = {
        case.chunk_size: row["streams_per_core"]
        for case, row in zip(cases, found, strict=True)
        if case.engine == "torch"
    }
    for case, row in zip(cases, found, strict=True):
        against = torchs.get(case.chunk_size)
        late = row.get("late_ms_p95")
        table.add_row(
            *(case.engine, case.precision, chunk_label(case.chunk_size)),
            f"{row['rtf_one_stream']:.4f}",
            f"{row['rtf_two_threads']:.4f}" if "rtf_two_threads" in row else "",
            f"{row['streams_per_core']:.0f}",
            f"{row['streams_per_core'] / against:.2f}" if against else "",
            str(row.get("real_time_streams", "")),
            "" if late is None else f"{late:.0f}",
            f"{row['model_bytes'] / 1e6:.2f}",
            f"{row['peak_mib']:.0f}",
        )
    return table


def hour_table(cases: list[Case], found: list[dict[str, Any]]) -> Table:
    """What each ten minutes of an hour cost."""
    table = Table(title="One stream of an hour: CPU seconds (and MiB) of each ten minutes")
    for column in ("engine", "precision", "latency"):
        table.add_column(column)
    for piece in range(PIECES):
        table.add_column(f"to {PIECE_MINUTES * (piece + 1)} min", justify="right")
    table.add_column("last / first", justify="right")
    for case, row in zip(cases, found, strict=True):
        seconds = row["cpu_seconds"]
        cells = [f"{s:.1f} ({m:.0f})" for s, m in zip(seconds, row["peak_mib"], strict=True)]
        label = chunk_label(case.chunk_size)
        ratio = f"{seconds[-1] / seconds[0]:.2f}"
        table.add_row(case.engine, case.precision, label, *cells, ratio)
    return table


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--exp", type=Path, help="experiment with stages 7 and 8 done")
    what.add_argument("--bundle", type=Path, help="bundle, or folder of bundles")
    what.add_argument("--checkpoint", type=Path, help="icefall's or icetransfer's")
    what.add_argument("--size", choices=list(SIZES), help="random weights")
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose decode section to take")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as decode.beam=8")
    parser.add_argument("--streams", type=int, default=16, help="at once (%(default)s)")
    parser.add_argument("--recordings", type=int, default=32, help="how many (%(default)s)")
    parser.add_argument("--hour", action="store_true", help="only a stream of an hour")
    return parser.parse_args()


def run(args: argparse.Namespace, scratch: Path) -> None:
    """Measures and prints."""
    recordings = made_up_recordings(args.recordings)
    if args.exp:
        opened = experiment.open_experiment(args.exp)
        settings, checkpoint, bundles = opened.config, opened.averaged_checkpoint, args.exp / "onnx"
        recordings = test_recordings(opened, args.recordings)
    else:
        settings = load_config([args.config], ["language=en", *args.overrides])
        checkpoint, bundles = args.checkpoint, args.bundle or scratch
    if args.size:
        checkpoint = scratch / "random.pt"
        save_checkpoint(checkpoint, build_transducer(SIZES[args.size]))
    if bundles == scratch:
        export_all(checkpoint, scratch, settings)
    cases = list(bundle_cases(bundles, settings))
    if checkpoint:
        cases += torch_cases(checkpoint, cases)
    cases.sort(key=lambda c: (c.chunk_size, ENGINES.index(c.engine), c.precision))
    if not cases:
        raise ValueError(f"{bundles} holds no streaming bundle; run stage 8, which exports them")
    console = Console(width=None if Console().is_terminal else 200)
    if args.hour:
        cases = [case for case in cases if case.engine in POOLED]
        found = [in_a_process(hour, case, recordings) for case in cases]
        console.print(hour_table(cases, found))
    else:
        found = []
        for case in cases:
            one = in_a_process(measure, case, recordings, args.streams)
            two = in_a_process(measure_two_threads, case, recordings)
            found.append(one | two | {"others": max(one["others"], two["others"])})
        console.print(results_table(cases, found))
    others = max((row["others"] for row in found if "others" in row), default=0.0)
    if others > BUSY:
        print(f"WARNING: others took {others:.0%} of the machine's time: the figures are doubtful")
    rows = [
        asdict(case) | {"model": case.model.name} | row
        for case, row in zip(cases, found, strict=True)
    ]
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "streams": args.streams,
    }
    print(json.dumps(results | {"torch": torch.__version__, "rows": rows}))


def main() -> None:
    """The command."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        experiment.main(lambda: run(args, Path(scratch)))


if __name__ == "__main__":
    main()
