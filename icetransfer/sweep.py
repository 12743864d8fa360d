"""The sweep: every language x init x amount of data of a preset, then the report.

    ./run_all.sh [--preset mini] [--langs "nl it"] [--inits "en ml"] [--hours "2min 8min"] ...

A cell is one run of a recipe, `egs/<language>/run.sh`, in a process of its own.  What is done is
known from the result files alone, so an interrupted sweep goes on where it was.  A cell that fails
is reported and costs no other.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from icetransfer import atomic, config, experiment, report
from icetransfer.score import planned_runs

REPOSITORY = Path(__file__).resolve().parent.parent
PRESETS = REPOSITORY / "egs" / "presets"
LAST_DATA_STAGE = 3  # stages 0 to 3 are shared by the cells of a language
SEED_STAGE = 7  # a seed is done when its checkpoints are averaged
SEED_EXPERIMENT = "exp/random-all-seed1/averaged.pt"

FAILED = 1  # exit codes: a cell failed
INTERRUPTED = 130


def _listed(value: object) -> object:
    return value.split() if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Amounts = Annotated[tuple[config.Hours, ...], BeforeValidator(_listed)]


class Replicates(config.Section):
    """One language and amount of data that both inits repeat with several seeds."""

    language: str
    hours: config.Hours
    seeds: tuple[int, ...] = Field(min_length=2)


class Preset(config.Section):
    """What a sweep runs."""

    languages: Words
    inits: Words = ("en", "ml")
    hours: Annotated[Amounts, Field(min_length=1)]
    random_hours: Amounts = ()  # amounts of data at which random initialisation is a control
    seeds: int = Field(1, ge=1)  # every cell is run with the seeds 1 to this number
    replicates: Replicates | None = None
    max_steps: dict[config.Hours, int] = Field(default_factory=dict)  # by the amount of data
    settings: tuple[str, ...] = ()  # key=value for every recipe


@dataclass(frozen=True, order=True)
class Cell:
    """One experiment of the sweep."""

    language: str
    init: str
    hours: float
    seed: int

    @property
    def name(self) -> str:
        """What people read: "nl ml 8min seed 1"."""
        return f"{self.language} {self.init} {config.hours_label(self.hours)} seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A preset, named, with all that was changed on the command line."""

    name: str
    preset: Preset
    settings: tuple[str, ...]
    root: Path = REPOSITORY

    @property
    def results(self) -> Path:
        """Where the report lies."""
        return self.root / "results" / self.name

    def recipe(self, cell: Cell) -> Path:
        """The folder of the cell's recipe."""
        return self.root / "egs" / cell.language

    def arguments(self, cell: Cell) -> list[str]:
        """What the recipe's run.sh is given for the cell."""
        hours = config.hours_label(cell.hours)
        return [
            *("--init", cell.init, "--hours", hours, "--seed", str(cell.seed)),
            *("--exp", f"exp/{self.name}/{cell.init}-{hours}-seed{cell.seed}"),
            *self.cell_settings(cell),
        ]

    def cell_settings(self, cell: Cell) -> list[str]:
        """The key=value settings of a cell: the same for every init and seed."""
        steps = self.preset.max_steps.get(cell.hours)
        return [*([f"train.max_steps={steps}"] if steps else []), *self.settings]

    def experiment(self, cell: Cell) -> Path:
        """The folder of the cell's experiment."""
        arguments = self.arguments(cell)
        return self.recipe(cell) / arguments[arguments.index("--exp") + 1]

    def config(self, cell: Cell) -> config.Config:
        """The cell's resolved config, as the recipe will save it."""
        settings = [f"language={cell.language}", f"init={cell.init}", f"seed={cell.seed}"]
        settings.append(f"hours={config.hours_label(cell.hours)}")
        return config.load_config(
            [self.recipe(cell) / "conf" / "default.yaml"],
            [*settings, *self.cell_settings(cell)],
        )

    def is_done(self, cell: Cell) -> bool:
        """Whether all results of the cell are there, from the settings of now."""
        saved = self.experiment(cell) / "config.yaml"
        if not saved.is_file():
            return False
        wanted = self.config(cell)
        if config.load_config([saved]) != wanted:
            return False
        decode = self.experiment(cell) / "decode"
        return all((run.folder(decode) / "wer.json").is_file() for run in planned_runs(wanted))


def read_preset(name: str, changes: dict[str, Any], root: Path = REPOSITORY) -> Sweep:
    """Reads a preset by name or file and puts changes over it.

    Args:
        name: "mini", or a YAML file.
        changes: fields of the preset from the command line; None for those not given.
        root: the repository.

    Raises:
        ValueError: the preset is unknown, or a field has a value that is not allowed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in PRESETS.glob("*.yaml")))
        raise ValueError(f"--preset {name}: {path} does not exist; known are {known}, or a file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold the fields of a preset, such as languages and hours")
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        preset = Preset.model_validate(tree | given)
    except ValidationError as error:
        raise ValueError(f"{path}: {config.describe_errors(error, Preset)}") from None
    for language in preset.languages:
        if not (root / "egs" / language / "run.sh").is_file():
            known = " ".join(sorted(p.parent.name for p in (root / "egs").glob("??/run.sh")))
            raise ValueError(f"no recipe egs/{language}; there are {known}")
    wrong = sorted(set(preset.inits) - {"en", "ml", "random"})
    if wrong:
        raise ValueError(f"inits has {', '.join(wrong)}; expected en, ml or random")
    return Sweep(path.stem, preset, preset.settings, root)


def plan(preset: Preset) -> list[Cell]:
    """All cells, those with most data first: begun last, they would leave the cores idle."""
    cells = {
        Cell(language, init, hours, seed)
        for language in preset.languages
        for init in preset.inits
        for hours in preset.hours
        for seed in range(1, preset.seeds + 1)
    }
    cells |= {
        Cell(language, "random", hours, 1)
        for language in preset.languages
        for hours in preset.random_hours
        if hours in preset.hours
    }
    repeat = preset.replicates
    if repeat and repeat.language in preset.languages and repeat.hours in preset.hours:
        cells |= {
            Cell(repeat.language, init, repeat.hours, seed)
            for init in preset.inits
            if init != "random"
            for seed in repeat.seeds
        }
    return sorted(cells, key=lambda cell: (-cell.hours, cell))


@dataclass(frozen=True)
class Job:
    """One run of a recipe."""

    name: str
    recipe: Path
    arguments: tuple[str, ...]
    log: Path


class JobError(Exception):
    """A job that did not end well: its message is for people."""


class Runner:
    """Runs recipes in processes of their own, and ends them when it is interrupted itself.

    The processes inherit a lock on the sweep's results: should the sweep be killed outright, the
    next one waits for the cells that are still running.
    """

    def __init__(self, results: Path) -> None:
        results.mkdir(parents=True, exist_ok=True)
        self._lock = (results / ".lock").open("w")
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another sweep that still works on {results}", flush=True)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    def run(self, job: Job) -> float:
        """Runs a recipe with its output in the job's log, on one thread.

        Returns:
            The seconds it took.

        Raises:
            JobError: it did not exit with 0; the message has its errors and the log's path.
        """
        if self._stopping:
            raise JobError(f"{job.name} was not begun")
        job.log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with job.log.open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                ["bash", str(job.recipe / "run.sh"), *job.arguments],
                cwd=job.recipe,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                pass_fds=(self._lock.fileno(),),
                start_new_session=True,
            )
            self._processes.add(process)
            code = process.wait()
            self._processes.discard(process)
        if code:
            text = job.log.read_bytes()[begin:].decode("utf-8", "replace")
            lines = [line for line in text.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error:")] or lines[-3:]
            raise JobError(f"{job.name} failed: {' | '.join(errors)} (log: {job.log})")
        return time.monotonic() - start

    def stop(self) -> None:
        """Ends what is running."""
        self._stopping = True
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


class View:
    """Progress on a terminal; plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        terminal = self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, disable=not terminal)
        self._task = self._progress.add_task("sweep", total=total)
        self._running: list[str] = []

    def started(self, job: Job) -> None:
        """A job has begun."""
        self._running.append(job.name)
        if not self._console.is_terminal:
            self._console.print(f"{time.strftime('%H:%M:%S')} start {job.name}")
        self._progress.update(self._task, description=", ".join(self._running))

    def ended(self, job: Job, outcome: str) -> None:
        """A job has ended."""
        if job.name in self._running:
            self._running.remove(job.name)
        self._console.print(f"{time.strftime('%H:%M:%S')} {outcome}", markup=False)
        self._progress.update(self._task, advance=1, description=", ".join(self._running))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps the view on the screen."""
        with self._progress:
            yield


def run_jobs(jobs: Sequence[Job], at_once: int, runner: Runner, view: View) -> dict[Job, str]:
    """Runs jobs, some at a time.

    Returns:
        The jobs that failed, with what is to be said of each.
    """

    def work(job: Job) -> float:
        view.started(job)
        return runner.run(job)

    failures = {}
    with ThreadPoolExecutor(at_once) as pool:
        futures: dict[Future[float], Job] = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    view.ended(job, f"done  {job.name} in {future.result():.0f} s")
                except JobError as failure:
                    failures[job] = str(failure)
                    view.ended(job, str(failure))
        except KeyboardInterrupt:
            runner.stop()
            raise
    return failures


def jobs_of(sweep: Sweep, cells: Sequence[Cell]) -> tuple[list[Job], list[Job]]:
    """The data job of each language, and the job of each cell."""
    data: list[Job] = []
    runs: list[Job] = []
    logs = sweep.results / "log"
    for cell in cells:
        arguments = sweep.arguments(cell)
        stop = ("--stage", "0", "--stop-stage", str(LAST_DATA_STAGE))
        name = f"{cell.language} data"
        if name not in {job.name for job in data}:
            log = logs / f"{cell.language}-data.log"
            data.append(Job(name, sweep.recipe(cell), (*stop, *arguments), log))
        log = logs / f"{cell.name.replace(' ', '-')}.log"
        begin = ("--stage", str(LAST_DATA_STAGE + 1))
        runs.append(Job(cell.name, sweep.recipe(cell), (*begin, *arguments), log))
    return data, runs


def seed_jobs(sweep: Sweep) -> list[Job]:
    """The training of both seeds, which the cells then start from."""
    return [
        Job(
            f"seed {language}",
            sweep.root / "egs" / language,
            ("--stop-stage", str(SEED_STAGE)),
            sweep.results / "log" / f"seed-{language}.log",
        )
        for language in ("en", "ml")
    ]


def from_scratch(sweep: Sweep) -> Sweep:
    """The same sweep, with results of its own, starting from seeds trained on this machine."""
    settings = tuple(f"transfer.base_models.{x}=../{x}/{SEED_EXPERIMENT}" for x in ("en", "ml"))
    name = f"{sweep.name}-from-scratch"
    return Sweep(name, sweep.preset, (*sweep.settings, *settings), sweep.root)


def run_sweep(sweep: Sweep, runner: Runner, at_once: int, retrain: bool = False) -> bool:
    """Runs what is not done yet and writes the report.

    Returns:
        Whether every cell has its results.
    """
    cells = plan(sweep.preset)
    pending = [cell for cell in cells if not sweep.is_done(cell)]
    data, runs = jobs_of(sweep, pending)
    seeds = seed_jobs(sweep) if retrain and pending else []
    print(f"{sweep.name}: {len(cells)} cells, {len(cells) - len(pending)} done already", flush=True)
    failures: dict[Job, str] = {}
    view = View(len(seeds) + len(data) + len(runs))
    with view.shown():
        failures |= run_jobs(seeds, at_once, runner, view)
        if not failures:
            # a language's data stages use all cores by themselves: one after the other
            failures |= run_jobs(data, 1, runner, view)
            without_data = {job.recipe for job in failures}
            runs = [job for job in runs if job.recipe not in without_data]
            failures |= run_jobs(runs, at_once, runner, view)
    write_plan(sweep, cells, list(failures.values()))
    report.write(sweep.results, sweep.root)
    return not failures


def write_plan(sweep: Sweep, cells: Sequence[Cell], failures: Sequence[str]) -> None:
    """Writes plan.json, which the report reads: the cells, where they lie, what failed."""
    entries = [
        {
            "language": cell.language,
            "init": cell.init,
            "hours": cell.hours,
            "seed": cell.seed,
            "experiment": str(sweep.experiment(cell).relative_to(sweep.root)),
        }
        for cell in sorted(cells)
    ]
    tree = {"sweep": sweep.name, "cells": entries, "failures": list(failures)}
    atomic.write_text(sweep.results / report.PLAN, json.dumps(tree, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="mini", help="a preset's name or YAML file (mini)")
    parser.add_argument("--smoke", action="store_true", help="the preset smoke: a path, no results")
    parser.add_argument("--langs", metavar='"nl it"', help="languages, instead of the preset's")
    parser.add_argument("--inits", metavar='"en ml"', help="of en, ml and random")
    parser.add_argument("--hours", metavar='"2min 100h"', help="amounts of training data")
    parser.add_argument("--seeds", type=int, metavar="N", help="run every cell with seeds 1 to N")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cells at a time (2)")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the EN and ML seeds here, first"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    return parser


def _run_to_the_end(sweep: Sweep, at_once: int, retrain: bool) -> bool:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    runner = Runner(sweep.results)
    try:
        return run_sweep(sweep, runner, at_once, retrain)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", flush=True)
        sys.exit(INTERRUPTED)
    finally:
        runner.close()


def _run() -> None:
    args = _parser().parse_args()

    def run() -> None:
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: expected 1 or more")
        names = {"languages": "langs", "inits": "inits", "hours": "hours", "seeds": "seeds"}
        changes = {field: getattr(args, option) for field, option in names.items()}
        sweep = read_preset("smoke" if args.smoke else args.preset, changes)
        if args.from_scratch:
            sweep = from_scratch(sweep)
        if args.dry_run:
            for cell in plan(sweep.preset):
                state = "done" if sweep.is_done(cell) else "to do"
                print(f"{state:6} {cell.name} -> {sweep.experiment(cell).relative_to(sweep.root)}")
            return
        if not _run_to_the_end(sweep, args.jobs, args.from_scratch):
            sys.exit(FAILED)

    experiment.main(run)


if __name__ == "__main__":
    _run()
