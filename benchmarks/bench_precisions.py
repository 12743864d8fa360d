"""What each precision costs and saves: docs/precisions.md, from finished experiments.

    python benchmarks/bench_precisions.py rtf EXP... --out rtf.json
    python benchmarks/bench_precisions.py full-size --out full-size.json
    python benchmarks/bench_precisions.py table EXP... --rtf rtf.json \
        --full-size full-size.json --out docs/precisions.md [--remedied EXP...]

The experiments have gone through stages 8 and 9 with decode.precisions=[fp32,fp16,int8,int4] and
sherpa among the engines; the recipe's folder is two levels above `exp`, as run.sh has it, and
RECIPE/exp/... is how an experiment is given.  Times are the process's own, on one thread; they
still need an idle machine.  `--remedied`: copies that have gone through icetransfer.remedy and then
stages 8 and 9.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icetransfer.config import Export
from icetransfer.data.features import read_manifest
from icetransfer.decode import Reader, tail_seconds
from icetransfer.experiment import open_experiment, provenance
from icetransfer.export import Source, export_tier
from icetransfer.model.subsampling import WINDOW_EXTRA
from icetransfer.model.transducer import SIZES, build_transducer
from icetransfer.onnx.quantize import quantize_export, same_file
from icetransfer.score import test_sets
from icetransfer.stage import atomic
from icetransfer.stage.markdown import markdown_table
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.sherpa import SherpaRecognizer

PRECISIONS = ("fp32", "fp16", "int8", "int4")
MARGINS = {"int8": 0.3, "int4": 1.0}
SECONDS_OF_AUDIO = 60.0
# icefall's usual streaming Zipformer: 66 M parameters
FULL_SIZE = dataclasses.replace(
    SIZES["medium"],
    num_encoder_layers=(2, 2, 3, 4, 3, 2),
    encoder_dim=(192, 256, 384, 512, 384, 256),
    feedforward_dim=(512, 768, 1024, 1536, 1024, 768),
)
CHUNK, LEFT = 16, 128
CHUNKS, ROUNDS = 20, 3  # the fastest of so many counts
BLOCKS = ((32, False), (32, True), (64, False), (128, False))  # block_size, symmetric

INTRODUCTION = """\
# What each precision costs and saves

Made by `benchmarks/bench_precisions.py` from the files of finished experiments; change it there.

* fp16: weights stored in 16 bits, widened when they are loaded: half the size, fp32's speed.
* int8: products with weights and inputs in 8 bits, a scale for each output channel; weights of
  convolutions stored in 8 bits.
* int4: the encoder's products with weights in 4 bits (MatMulNBits, settings below), its
  convolutions stored in 8 bits, the joiner in int8.
* The decoder stays fp32.

"""


def recipe_of(experiment: Path) -> Path:
    """RECIPE of RECIPE/exp/...: paths in its config are relative to it."""
    absolute = experiment.resolve()
    return next(parent.parent for parent in absolute.parents if parent.name == "exp")


def measure_rtf(experiments: list[Path]) -> dict[str, Any]:
    """Processor seconds of sherpa-onnx for a second of audio, one stream on one thread."""
    rows = []
    for path in [path.resolve() for path in experiments]:
        os.chdir(recipe_of(path))
        run = open_experiment(path)
        (_, (manifest, _)), *_ = test_sets(run.config).items()
        batch, seconds = [], 0.0
        for _, samples in Reader(read_manifest(run.manifests_dir / manifest)):
            batch.append(samples)
            seconds += len(samples) / 16000
            if seconds > SECONDS_OF_AUDIO:
                break
        for size in run.config.decode.chunk_sizes:
            for precision in PRECISIONS:
                folder = run.onnx_dir(size)
                recognizer = SherpaRecognizer(
                    folder, size, precision, tail_seconds=tail_seconds(size)
                )
                recognizer(batch[:1])
                begin = time.process_time()
                for samples in batch:
                    recognizer([samples])
                rtf = (time.process_time() - begin) / seconds
                rows.append({"chunk_size": size, "precision": precision, "rtf": rtf})
    return {"rows": rows, "provenance": provenance()}


def measure_full_size() -> dict[str, Any]:
    """Encoder sizes and speeds of a model of icefall's usual size with random weights."""
    torch.set_num_threads(1)
    model = build_transducer(FULL_SIZE, seed=1).eval()
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = ["<blk>", *(f"t{i}" for i in range(1, model.vocab_size))]
        (root / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(names)))
        source = Source(root / "random.pt", model, root / "tokens.txt", "random")
        variants: list[tuple[str, dict[str, Any]]] = [(p, {}) for p in PRECISIONS[:-1]]
        variants += [
            ("int4", {"block_size": block, "symmetric": symmetric, "accuracy_level": level})
            for block, symmetric in BLOCKS
            for level in (0, 4)
        ]
        full = Exported(root / "full")
        export_tier(source, full, CHUNK, LEFT, ["fp32"])
        made = []
        for number, (precision, settings) in enumerate(variants):
            bundle = Exported(root / str(number))
            for path in full.files(["fp32"]):
                same_file(path, bundle.dir / path.name)
            if precision != "fp32":
                export = Export.model_validate({"int4": settings} if settings else {})
                quantize_export(bundle, precision, export)
            made.append((bundle, precision, settings))
        times = [
            [_chunk_rtf(bundle, precision) for bundle, precision, _ in made] for _ in range(ROUNDS)
        ]
        rows = [
            {
                "precision": precision,
                "settings": settings,
                "encoder_bytes": bundle.model("encoder", precision).stat().st_size,
                "bytes": bundle.size(precision),
                "rtf": min(own),
            }
            for (bundle, precision, settings), *own in zip(made, *times, strict=True)
        ]
    return {"parameters": parameters, "rows": rows, "provenance": provenance()}


def _chunk_rtf(bundle: Exported, precision: str) -> float:
    model = OnnxTransducer(bundle.dir, precision)
    state = model.initial_state(1, CHUNK, LEFT)
    features = torch.randn(1, 2 * CHUNK + WINDOW_EXTRA, 80) - 6
    times = []
    for _ in range(CHUNKS):
        begin = time.process_time()
        _, state = model.encode_chunk(features, state)
        times.append(time.process_time() - begin)
    return min(times) / (CHUNK * 0.02)


def read_results(experiments: list[Path]) -> list[dict[str, Any]]:
    """wer.json of sherpa-onnx, with the encoder's size."""
    rows = []
    for path in experiments:
        run = open_experiment(path)
        for file in sorted(path.glob("decode/*/sherpa-*/wer.json")):
            row = json.loads(file.read_text(encoding="utf-8"))
            bundle = Exported(run.onnx_dir(row["chunk_size"]))
            row["encoder_bytes"] = bundle.model("encoder", row["precision"]).stat().st_size
            rows.append(row)
    return rows


def tier(size: int) -> str:
    """Names a latency."""
    return "offline" if size == -1 else f"{size * 20} ms"


def cost_table(rows: list[dict[str, Any]], rtf: list[dict[str, Any]]) -> str:
    """Means over the models, a row for each tier and precision."""
    speeds = defaultdict(list)
    for row in rtf:
        speeds[row["chunk_size"], row["precision"]].append(row["rtf"])
    sizes = sorted({row["chunk_size"] for row in rows}, key=lambda size: size % 10**6)
    lines = []
    for precision in PRECISIONS:
        for size in [*sizes, None]:
            chosen = [
                row
                for row in rows
                if row["precision"] == precision and size in (None, row["chunk_size"])
            ]
            pairs = [(row, _full(rows, row)) for row in chosen]
            changes = np.array([row["wer"] - full["wer"] for row, full in pairs])
            found = [v for key, vs in speeds.items() if key[1] == precision for v in vs]
            found = found if size is None else speeds[size, precision]
            lines.append(
                [
                    precision,
                    "all" if size is None else tier(size),
                    f"{np.mean([row['wer'] for row in chosen]):.2f}",
                    f"{changes.mean():+.2f}",
                    f"{changes.min():+.2f} to {changes.max():+.2f}",
                    _ratio(pairs, "encoder_bytes"),
                    _ratio(pairs, "model_bytes"),
                    f"{np.mean(found):.4f}" if found else "",
                ]
            )
    header = ["precision", "latency", "WER %", "change", "of single models"]
    return markdown_table([*header, "encoder smaller", "all files smaller", "RTF"], lines)


def _full(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    keys = ("language", "init", "test_set", "chunk_size")
    (full,) = (
        r for r in rows if r["precision"] == "fp32" and all(r[key] == row[key] for key in keys)
    )
    return full


def _ratio(pairs: list[tuple[dict[str, Any], dict[str, Any]]], key: str) -> str:
    return f"{np.mean([full[key] / row[key] for row, full in pairs]):.2f}"


def single_table(rows: list[dict[str, Any]]) -> str:
    """WER of every model, a row for each latency and a column for each precision."""
    keys = sorted(
        {(row["language"], row["init"], row["chunk_size"] % 10**6) for row in rows},
    )
    lines = []
    for language, init, order in keys:
        size = -1 if order == 10**6 - 1 else order
        of = {
            row["precision"]: row
            for row in rows
            if (row["language"], row["init"], row["chunk_size"]) == (language, init, size)
        }
        words = str(of["fp32"]["words"])
        wers = [f"{of[p]['wer']:.2f}" for p in PRECISIONS]
        lines.append([language, init, tier(size), *wers, words])
    return markdown_table(["language", "init", "latency", *PRECISIONS, "words"], lines)


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Whether each precision is within its margin on average."""
    lines = []
    for precision, margin in MARGINS.items():
        changes = [
            row["wer"] - _full(rows, row)["wer"] for row in rows if row["precision"] == precision
        ]
        kept = "within" if np.mean(changes) <= margin else "above"
        above = sum(change > margin for change in changes)
        lines.append(
            f"{precision} changes WER by {np.mean(changes):+.2f} points on average, {kept} the "
            f"margin of {margin:g}; {above} of {len(changes)} single results are above it."
        )
    return "\n".join(lines)


def full_size_table(measured: dict[str, Any]) -> str:
    """Sizes and speeds of the model of full size."""
    full = measured["rows"][0]
    lines = []
    for row in measured["rows"]:
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
        lines.append(
            [
                row["precision"],
                settings,
                f"{row['encoder_bytes'] / 1e6:.1f}",
                f"{full['encoder_bytes'] / row['encoder_bytes']:.2f}",
                f"{full['bytes'] / row['bytes']:.2f}",
                f"{row['rtf']:.4f}",
            ]
        )
    header = ["precision", "settings", "encoder MB", "encoder smaller", "all files smaller"]
    return markdown_table([*header, "encoder RTF"], lines)


def remedy_table(rows: list[dict[str, Any]], remedied: list[Path]) -> str:
    """Where `icetransfer.remedy` has kept layers: what that did on dev, and on the test sets."""
    after = read_results(remedied)
    lines = []
    for path in remedied:
        run = open_experiment(path)
        for found in json.loads(run.remedy_file.read_text(encoding="utf-8"))["rows"]:
            if len(found["trials"]) == 1:
                continue
            best = next(t for t in found["trials"] if t["layers"] == found["layers"])
            (size,) = (
                c for c in run.config.decode.chunk_sizes if run.onnx_dir(c).name == found["tier"]
            )
            of = (run.config.language, run.config.init, size, found["precision"])
            keys = ("language", "init", "chunk_size", "precision")
            test = [
                next(r for r in results if tuple(r[key] for key in keys) == of)
                for results in (rows, after)
            ]
            changes = [f"{row['wer'] - _full(rows, row)['wer']:+.2f}" for row in test]
            first = found["trials"][0]
            lines.append(
                [
                    *(of[0], of[1], tier(size), found["precision"]),
                    f"{first['wer'] - found['wer_fp32']:+.2f}",
                    f"{best['wer'] - found['wer_fp32']:+.2f}" + ("" if found["holds"] else " (!)"),
                    f"{found['layers']} of {len(found['sensitivities'])}",
                    f"{100 * (best['encoder_bytes'] / first['encoder_bytes'] - 1):.0f} %",
                    *changes,
                ]
            )
    header = ["language", "init", "latency", "precision", "dev before", "dev after", "layers kept"]
    return markdown_table([*header, "encoder larger by", "test before", "test after"], lines)


def _sources(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if (row["precision"], row["chunk_size"]) == ("int4", 16):
            made = ", ".join(f"{key} {value}" for key, value in row["quantisation"].items())
            commit, versions = row["provenance"]["git_commit"], row["provenance"]["versions"]
            hours = f"{60 * row['hours']:g} min"
            lines.append(
                f"* {row['language']}, {row['init']}, {hours}, seed {row['seed']}: checkpoint "
                f"`{row['checkpoint_sha256'][:16]}`, commit `{commit[:12]}`, sherpa-onnx "
                f"{versions['sherpa-onnx']}, onnxruntime {versions['onnxruntime']}; int4: {made}"
            )
    return "\n".join(lines) + "\n"


def make_page(
    experiments: list[Path],
    remedied: list[Path],
    rtf: dict[str, Any] | None,
    full_size: dict[str, Any] | None,
) -> str:
    """docs/precisions.md."""
    rows = read_results(experiments)
    models = len({(row["language"], row["init"]) for row in rows})
    page = [
        INTRODUCTION + "## The models of the mini preset, in sherpa-onnx\n",
        f"Means over {models} tiny models (synthetic speech, so only differences mean anything), "
        "whole test sets, greedy search; RTF of one stream on one thread.\n",
        cost_table(rows, rtf["rows"] if rtf else []),
        verdicts(rows) + "\n",
        single_table(rows),
    ]
    if remedied:
        page += [
            "## Where a margin is missed on dev\n",
            "Changes of WER against fp32, in points, before and after `icetransfer.remedy` has "
            "kept the most sensitive layers in higher precision; (!): the margin is not reached. "
            "A dev set has some 300 to 400 words here, so that a point is three or four words, "
            "and what is found on dev need not hold on test: the remedy needs the dev set of a "
            "real corpus.\n",
            remedy_table(rows, remedied),
        ]
    if full_size:
        page += [
            "## A model of full size\n",
            f"{full_size['parameters'] / 1e6:.1f} M parameters in icefall's usual dimensions, "
            f"random weights, {CHUNK * 20} ms chunks, left context {LEFT}; RTF is of the encoder "
            "in onnxruntime, one stream on one thread.\n",
            full_size_table(full_size),
        ]
    page += ["## Where the numbers come from\n", _sources(rows)]
    for name, measured in (("RTF", rtf), ("Model of full size", full_size)):
        if measured:
            made = measured["provenance"]
            page.append(
                f"{name}: commit `{made['git_commit'][:12]}`, {made['time']}, {made['cpus']} CPUs, "
                f"{made['platform']}.\n"
            )
    return "\n".join(page)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rtf", "full-size", "table"))
    parser.add_argument("experiments", type=Path, nargs="*")
    parser.add_argument("--remedied", type=Path, nargs="*", default=[])
    parser.add_argument("--rtf", type=Path)
    parser.add_argument("--full-size", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.resolve()
    if args.what == "table":
        rtf, full_size = (
            json.loads(path.read_text(encoding="utf-8")) if path else None
            for path in (args.rtf, args.full_size)
        )
        atomic.write_text(out, make_page(args.experiments, args.remedied, rtf, full_size))
    else:
        made = measure_full_size() if args.what == "full-size" else measure_rtf(args.experiments)
        atomic.write_text(out, json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
