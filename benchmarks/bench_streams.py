"""How many live streams a core bears, and how long they wait: docs/speed.md.

    python benchmarks/bench_streams.py measure --sizes tiny,full --chunks 8,16,32 --out streams.json
    python benchmarks/bench_streams.py table streams.json
    python benchmarks/bench_streams.py nodes

`measure` gives sherpa-onnx one thread and B streams of noise, a chunk at a time, and takes the
processor time of a call (features, encoder, decoder, joiner, search).  A core bears
B x chunk / that time.  All variants of a size and tier are measured in turn, call by call, so that
they share what else the machine does; what is compared are ratios, and the lowest quarter of the
calls counts.  The weights are random, with the joiner's bias on blank, as silence would have it.

How long streams wait is simulated from these times, because a shared machine has no clock to trust:
streams whose chunks end at random moments, a server that takes all that are ready, at most
`MOST_TOGETHER`, as sherpa-onnx's websocket server does, and 80 % of the streams that a core bears.

"traced" is the same model as torch.onnx.export writes it, without our passes, with int8 by
onnxruntime's dynamic quantisation: what icefall's export does.  icefall's own graph is not at hand.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from bench_precisions import FULL_SIZE
from onnxruntime.quantization import QuantType, quantize_dynamic

from icetransfer import export
from icetransfer.config import Export
from icetransfer.experiment import provenance
from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import SIZES, build_transducer
from icetransfer.onnx.quantize import quantize_export, same_file
from icetransfer.stage import atomic
from icetransfer.stage.markdown import markdown_table
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.sherpa import SherpaRecognizer

LEFT = 128
TOGETHER = (1, 4, 16)
MOST_TOGETHER = 16
ROUNDS = 16
LOAD = 0.8
SIMULATED_SECONDS = 600.0
RATE = 16000


def make_source(size: str, root: Path) -> Source:
    """A model with random weights that says little."""
    dims = FULL_SIZE if size == "full" else SIZES[size]
    model = build_transducer(dims, seed=1).eval()
    with torch.no_grad():
        model.joiner.output_linear.bias[0] += 20.0
    names = ["<blk>", *(f"t{i}" for i in range(1, model.vocab_size))]
    (root / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(names)))
    return Source(root / "random.pt", model, root / "tokens.txt", "random")


def export_variants(source: Source, root: Path, chunk: int) -> dict[str, tuple[Exported, str]]:
    """Every variant of a tier: where it lies, and the precision of the files."""
    ours = Exported(root / f"ours-{chunk}")
    export_tier(source, ours, chunk, LEFT, ["fp32", "int8", "int4"])
    blocks = Exported(root / f"blocks-{chunk}")
    for path in ours.files(["fp32"]):
        same_file(path, blocks.dir / path.name)
    quantize_export(blocks, "int4", Export.model_validate({"int4": {"block_size": 128}}))
    traced = Exported(root / f"traced-{chunk}")
    kept, export.simplify = export.simplify, lambda *_: None
    try:
        export_tier(source, traced, chunk, LEFT, ["fp32"])
    finally:
        export.simplify = kept
    for part in ("encoder", "decoder", "joiner"):
        if part == "decoder":
            same_file(traced.model(part, "fp32"), traced.model(part, "int8"))
        else:
            quantize_dynamic(
                traced.model(part, "fp32"),
                traced.model(part, "int8"),
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QInt8,
            )
    return {
        **{f"traced {p}": (traced, p) for p in ("fp32", "int8")},
        **{p: (ours, p) for p in ("fp32", "int8", "int4")},
        "int4, blocks of 128": (blocks, "int4"),
    }


class Live:
    """B streams of a recogniser that hear a chunk at a time."""

    def __init__(self, folder: Path, chunk: int, precision: str, streams: int) -> None:
        recognizer = SherpaRecognizer(folder, chunk, precision)
        self._recognizer: Any = recognizer._recognizer
        self._streams = [self._recognizer.create_stream() for _ in range(streams)]
        random = np.random.default_rng(0)
        self._samples = (0.05 * random.standard_normal(chunk * RATE // 50)).astype(np.float32)
        for stream in self._streams:  # the look-ahead, so that each chunk makes one call ready
            stream.accept_waveform(RATE, np.zeros(RATE // 4, dtype=np.float32))
        self.call()

    def call(self) -> float:
        """Processor seconds for one more chunk of every stream."""
        begin = time.process_time()
        for stream in self._streams:
            stream.accept_waveform(RATE, self._samples)
        while ready := [s for s in self._streams if self._recognizer.is_ready(s)]:
            self._recognizer.decode_streams(ready)
        return time.process_time() - begin


def measure(sizes: list[str], chunks: list[int], out: Path) -> None:
    """Writes processor seconds of calls, by size, tier, variant and number of streams."""
    torch.set_num_threads(1)
    rows = []
    for size in sizes:
        for chunk in chunks:
            with tempfile.TemporaryDirectory() as folder:
                source = make_source(size, Path(folder))
                variants = export_variants(source, Path(folder), chunk)
                for streams in TOGETHER:
                    live = {
                        name: Live(made.dir, chunk, precision, streams)
                        for name, (made, precision) in variants.items()
                    }
                    times: dict[str, list[float]] = {name: [] for name in live}
                    for _ in range(ROUNDS):
                        for name, one in live.items():
                            times[name].append(one.call())
                    rows += [
                        {"size": size, "chunk": chunk, "streams": streams, "variant": n, "times": t}
                        for n, t in times.items()
                    ]
            found = {"rows": rows, "load": os.getloadavg(), "provenance": provenance()}
            atomic.write_text(out, json.dumps(found, indent=1) + "\n")  # a tier more
            print(size, chunk, "done; load", os.getloadavg(), flush=True)


def quick(times: list[float]) -> float:
    """The mean of the lowest quarter."""
    return float(np.mean(sorted(times)[: max(1, len(times) // 4)]))


def simulate(chunk: int, costs: dict[int, float], streams: int) -> float:
    """The 99th percentile of the seconds from the end of a chunk to its result, on one core.

    Args:
        chunk: in 50 Hz frames.
        costs: seconds of a call, by the number of streams in it.
        streams: that are live.
    """
    random = np.random.default_rng(0)
    period = chunk * 0.02
    phases = random.uniform(0, period, streams)
    rounds = int(SIMULATED_SECONDS / period)
    arrivals = np.sort((phases + period * np.arange(rounds)[:, None]).ravel())
    waits, now, begin = [], 0.0, 0
    while begin < len(arrivals):
        now = max(now, arrivals[begin])
        end = min(int(np.searchsorted(arrivals, now, "right")), begin + MOST_TOGETHER)
        now += float(np.interp(end - begin, [*costs], [*costs.values()]))
        waits += [now - arrival for arrival in arrivals[begin:end]]
        begin = end
    return float(np.percentile(waits, 99))


def make_table(measured: dict[str, Any]) -> str:
    """A row for each size, tier and variant."""
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for row in measured["rows"]:
        tier = found.setdefault((row["size"], row["chunk"]), {})
        tier.setdefault(row["variant"], {})[row["streams"]] = quick(row["times"])
    lines = []
    for (size, chunk), variants in found.items():
        capacity = {
            name: max(n * chunk * 0.02 / seconds for n, seconds in costs.items())
            for name, costs in variants.items()
        }
        for name, costs in variants.items():
            alone = chunk * 0.02 / costs[1]
            streams = max(1, int(LOAD * capacity[name]))
            lines.append(
                [
                    *(size, f"{chunk * 20} ms", name, f"{1000 * costs[1]:.1f}"),
                    f"{variants['traced fp32'][1] / costs[1]:.2f}",
                    f"{alone:.0f}",
                    f"{capacity[name]:.0f}",
                    f"{capacity[name] / capacity['traced fp32']:.2f}",
                    f"{1000 * simulate(chunk, costs, streams):.0f} ({streams})",
                ]
            )
    header = ["model", "tier", "encoder", "call of one stream, ms", "times traced fp32"]
    header += ["streams a core, one by one", "together", "times traced fp32"]
    return markdown_table([*header, "99 % wait less than, ms (streams)"], lines)


def count_nodes() -> str:
    """Nodes of the streaming encoder, as traced and as exported."""
    lines = []
    for size in ("tiny", "full"):
        with tempfile.TemporaryDirectory() as folder:
            made = export_variants(make_source(size, Path(folder)), Path(folder), 16)
            for name in ("traced fp32", "fp32"):
                graph = onnx.load(str(made[name][0].model("encoder", "fp32"))).graph
                kinds = Counter(node.op_type for node in graph.node).most_common(8)
                shown = ", ".join(f"{kind} {count}" for kind, count in kinds)
                lines.append([size, name, str(len(graph.node)), shown])
    return markdown_table(["model", "encoder", "nodes", "most of them"], lines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure")
    command.add_argument("--sizes", default="tiny,full")
    command.add_argument("--chunks", default="8,16,32")
    command.add_argument("--out", type=Path, required=True)
    command = commands.add_parser("table")
    command.add_argument("measured", type=Path)
    commands.add_parser("nodes")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        chunks = [int(chunk) for chunk in arguments.chunks.split(",")]
        measure(arguments.sizes.split(","), chunks, arguments.out)
    elif arguments.command == "table":
        print(make_table(json.loads(arguments.measured.read_text(encoding="utf-8"))))
    else:
        print(count_nodes())


if __name__ == "__main__":
    main()
