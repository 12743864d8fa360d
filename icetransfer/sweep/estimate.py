"""What a sweep will take: its commands, audio and disk, and its time, from a short probe.

The disk is counted, the time measured: `--estimate` trains a few steps of the sweep's smallest cell
and decodes with it, here, and multiplies.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from icetransfer import config
from icetransfer.experiment import Experiment
from icetransfer.score import planned_runs
from icetransfer.settings.tree import YAML_LOADER
from icetransfer.stage.lines import read_lines
from icetransfer.sweep import jobs
from icetransfer.sweep.plan import Cell, Plan, Sweep, available_hours, no_comparison
from icetransfer.sweep.slurm import plain
from icetransfer.training import scheme

MODELS = Path(__file__).parents[1] / "base_models.yaml"
AUDIO_BYTES = 16_000 * 2 * 3600  # of an hour, as 16-bit samples
FEATURE_BYTES = 100 * 80 * 2 * 3600  # of an hour: 80 bins every 10 ms in half precision
CHECKPOINT_MODELS = 5  # a checkpoint has a model, its average, the optimiser's two moments, ...
BUNDLE_MODELS = 1.5  # a latency tier's ONNX files, fp32 and int8
PROBE_STEPS = 20


@dataclass(frozen=True)
class Needs:
    """What a job takes: hours of audio that it goes through, and bytes that it leaves."""

    audio_hours: float
    disk: float | None  # None: not known before its data or its base model is there


def cell_needs(wanted: config.Config, root: Path) -> Needs:
    """The audio that a cell trains on, as full as its batches may be, and its disk."""
    train = _settled(wanted)
    audio = train.max_steps * train.batch_seconds * train.accumulate / 3600
    model = _model_bytes(wanted, root)
    if model is None:
        return Needs(audio, None)
    kept = train.keep_checkpoints + train.keep_best + 1
    models = 2 + CHECKPOINT_MODELS * kept + BUNDLE_MODELS * len(wanted.decode.chunk_sizes)
    return Needs(audio, model * models)


def _settled(wanted: config.Config) -> scheme.Settled:
    """The settings of a cell's training; those that its hours decide too."""
    assert wanted.hours is not None, "a cell's hours are said"
    decided = scheme.decide(wanted, 3600 * wanted.hours)
    return scheme.settled_train(scheme.merge(wanted, decided.values))


def _model_bytes(wanted: config.Config, root: Path) -> float | None:
    """The size of the base model's file; random initialisation has the EN model's dimensions."""
    name = wanted.transfer.base_models["ml" if wanted.init == "ml" else "en"]
    known = yaml.load(MODELS.read_text(encoding="utf-8"), YAML_LOADER)
    place = known.get(name, {}).get("path", name)
    for folder in (root, root / "egs" / wanted.language):
        path = folder / str(place)
        if path.is_file():
            return path.stat().st_size
    return None


def data_needs(recipe: Path, wanted: Iterable[config.Config]) -> Needs:
    """The audio of a language that is made or fetched, as far as it is known, and its features."""
    configs = list(wanted)
    data = configs[0].data
    train = available_hours(recipe, data)
    if train is None:
        hours = [c.hours for c in configs if c.hours is not None]
        train = max(hours, default=math.nan)
    copies = sum(1 / speed for speed in data.features.speeds)
    return Needs(train, train * (AUDIO_BYTES + copies * FEATURE_BYTES))


def print_plan(sweep: Sweep, plan: Plan) -> None:
    """Prints every job with its command, and what all of them take."""
    print(f"{sweep.name}: {len(sweep.cells)} cells")
    if said := no_comparison(sweep.preset):
        print(said)
    for cell in plan.done:
        print(f"done    {cell.name} -> {_place(sweep, sweep.experiment(cell))}")
    for cell, reason in plan.skipped.items():
        print(f"skipped {cell.name}: {reason}")
    configs = {job.name: config.Config.model_validate(job.wanted) for job in plan.runs}
    total_audio = total_disk = 0.0
    unknown = 0
    for job in [*plan.data, *plan.runs]:
        if job.kind == "cell":
            needs = cell_needs(configs[job.name], sweep.root)
            where = f" -> {_place(sweep, job.experiment)}" if job.experiment else ""
            total_audio += needs.audio_hours
        else:
            own = [configs[run.name] for run in plan.runs if job.name in run.needs]
            needs, where = data_needs(job.recipe, own), ""
        unknown += needs.disk is None
        total_disk += needs.disk or 0
        print(f"to do   {job.name}{where}: {_amounts(needs)}\n        {job.shown}")
    decodes = sum(len(planned_runs(own)) for own in configs.values())
    more = f" and that of {unknown} cells whose base model is not here yet" if unknown else ""
    print(
        f"{len(plan.data)} data jobs and {len(plan.runs)} cells to do: {total_audio:.1f} h of "
        f"audio through training, {decodes} decodes, about {_bytes(total_disk)} of disk{more}"
    )


def _place(sweep: Sweep, experiment: Path) -> Path:
    return experiment.relative_to(sweep.root)


def _amounts(needs: Needs) -> str:
    return f"{needs.audio_hours:.3g} h of audio, {_bytes(needs.disk)} of disk"


def _bytes(count: float | None) -> str:
    return "an unknown amount" if count is None else f"{count / 1e9:.3g} GB"


@dataclass(frozen=True)
class Pace:
    """What a probe measured.

    Attributes:
        train: seconds of audio trained in a second.
        decode: seconds of processing for a second of audio.
        test_hours: audio of all test sets together.
        devices: what it ran on.
    """

    train: float
    decode: float
    test_hours: float
    devices: str


def cell_hours(wanted: config.Config, pace: Pace) -> tuple[float, float]:
    """Hours that a cell trains and decodes at a pace."""
    audio = cell_needs(wanted, Path()).audio_hours
    runs = planned_runs(wanted)
    for_each_set = len(runs) / len({run.test_set for run in runs})
    return audio / pace.train, for_each_set * pace.test_hours * pace.decode


def print_estimate(sweep: Sweep, plan: Plan) -> None:
    """Measures the smallest cell that is left and prints what all of them will take.

    Raises:
        ValueError: nothing is left, or the probe failed.
    """
    if not plan.runs:
        raise ValueError(f"{sweep.name}: every cell is done, nothing is left to estimate")
    smallest = min(plan.runs, key=lambda job: config.Config.model_validate(job.wanted).hours or 0)
    cell = next(cell for cell in sweep.cells if cell.name == smallest.name)
    pace = probe(sweep, cell)
    rows = [(job, *cell_hours(config.Config.model_validate(job.wanted), pace)) for job in plan.runs]
    for job, train, decode in rows:
        print(f"{job.name}: {_time(train)} of training, {_time(decode)} of decoding")
    train, decode = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(
        f"{len(rows)} cells on {pace.devices}: {_time(train + decode)}, {_time(train)} of training "
        f"({pace.train:.0f} s of audio/s) and {_time(decode)} of decoding (RTF {pace.decode:.4f}); "
        f"with N cells at a time an N-th of that, if each has such a device of its own. Corpora, "
        f"features and export come on top"
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def probe(sweep: Sweep, cell: Cell) -> Pace:
    """Runs a recipe for a few steps and one decode.

    Raises:
        ValueError: it failed.
    """
    wanted = sweep.config(cell)
    steps = min(PROBE_STEPS, _settled(wanted).max_steps)
    arguments = sweep.arguments(cell)
    name = f"exp/{sweep.name}/probe-{plain(os.uname().nodename)}-{os.getpid()}"
    arguments[arguments.index("--exp") + 1] = name
    arguments += [
        f"train.max_steps={steps}", f"train.log_every={max(1, steps // 2)}",
        f"train.checkpoint_every={steps}", f"train.valid_every={steps}", *one_decode(wanted),
    ]  # fmt: skip
    recipe = sweep.recipe(cell.language)
    print(f"probe: {steps} steps of {cell.name}", flush=True)
    done = subprocess.run(
        ["bash", str(recipe / "run.sh"), *arguments],
        cwd=recipe, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"the probe failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    folder = recipe / name
    measured = read_lines(folder / "metrics.jsonl", ("step", "kind"))
    train = [row["audio_per_second"] for row in measured if row["kind"] == "train"]
    probed = Experiment(folder, config.load_config([folder / "config.yaml"]))
    results: list[dict[str, Any]] = [
        jobs.read_json(run.folder(probed.decode_dir) / "wer.json") or {}
        for run in planned_runs(probed.config)
    ]
    audio = sum(result["audio_seconds"] for result in results)
    processing = sum(result["rtf"] * result["audio_seconds"] for result in results)
    noted = (jobs.read_json(folder / "provenance.json") or {})["train"]
    shutil.rmtree(folder)
    return Pace(
        train=train[-1],  # the first steps warm up
        decode=processing / audio,
        test_hours=audio / 3600,
        devices=f"{noted['processes']} x {noted['device']} ({noted['host']})",
    )


def one_decode(wanted: config.Config) -> list[str]:
    """Settings that leave one decode of each test set: the longest chunk that streams, in fp32."""
    size = max(wanted.decode.chunk_sizes)
    return [
        f"decode.chunk_sizes=[{size}]",
        f"decode.engines=[{wanted.decode.engines[-1]}]",
        "decode.precisions=[fp32]",
    ]
