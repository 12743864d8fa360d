"""Where the cells of a sweep are, read off files and squeue, and the report of what is there."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from icetransfer import config
from icetransfer.analysis.collapse import has_collapsed
from icetransfer.experiment import Experiment
from icetransfer.report import PLAN
from icetransfer.score import planned_runs
from icetransfer.stage import atomic
from icetransfer.stage.lines import last_lines
from icetransfer.sweep import jobs
from icetransfer.sweep.plan import Cell, Plan, Sweep, make_plan, no_comparison
from icetransfer.sweep.slurm import ASK_AGAIN, SUBMITTED, Queue
from icetransfer.training.scheme import settle, settled_train

TAIL = 20_000  # bytes of a metrics.jsonl that surely hold its last line about the training


@dataclass(frozen=True)
class Row:
    """A line of the table: a job, its state in a word, and what there is to say of it."""

    name: str
    state: str
    detail: str = ""


def collect(sweep: Sweep) -> list[Row]:
    """The state of every data job that is under way, of every cell, and of what else is queued."""
    plan = make_plan(sweep)
    queued: Mapping[str, tuple[str, str, str]] = {}
    if (sweep.results / SUBMITTED).is_file():
        with suppress(ValueError):  # not on a login node, or Slurm is down: files say the rest
            queued = Queue(sweep.name, sweep.results, sweep.root).queued()
    done = set(plan.done)
    runs = {job.name: job for job in plan.runs}
    rows = [_job_row(job, queued, "") for job in plan.data if job.status.is_file()]
    known = {job.name for job in [*plan.data, *plan.runs]}
    for name in sorted(queued.keys() - known):  # shares of a data job, base models, the report
        task, state, reason = queued[name]
        said = f"Slurm {task}, {reason if state == 'PENDING' else state.lower()}"
        rows.append(Row(name, "waiting" if state == "PENDING" else jobs.RUNNING, said))
    for cell in sorted(sweep.cells):
        if cell in done:
            rows.append(Row(cell.name, jobs.DONE, _wer(sweep, cell)))
        elif cell in plan.skipped:
            rows.append(Row(cell.name, jobs.SKIPPED, plan.skipped[cell]))
        else:
            wanted = sweep.config(cell)
            progress = _progress(Experiment(sweep.experiment(cell), wanted))
            rows.append(_job_row(runs[cell.name], queued, progress))
    return rows


def _job_row(job: jobs.Job, queued: Mapping[str, tuple[str, str, str]], progress: str) -> Row:
    status = job.read_status()
    said = status.get("state", "")
    if job.name in queued:
        task, state, reason = queued[job.name]
        if state == "PENDING":
            again = f"; {said}: {status.get('reason')}" if said == jobs.AGAIN else ""
            return Row(job.name, "waiting", f"Slurm {task}, {reason}{again}")
        return Row(job.name, jobs.RUNNING, f"{progress} (Slurm {task}, {state.lower()})".strip())
    if said == jobs.RUNNING:
        with jobs.locked(job.status.with_suffix(".lock")) as free:
            if free is None:
                return Row(job.name, jobs.RUNNING, f"{progress} ({status['host']})".strip())
        return Row(job.name, "waiting", f"was killed at {_clock(status['time'])}; {progress}")
    if said in (jobs.FAILED, jobs.SKIPPED):
        return Row(job.name, said, f"{_last(status.get('reason', ''))} (log: {job.log})")
    if said == jobs.DONE and job.kind != "cell":
        return Row(job.name, said)
    return Row(job.name, "waiting", progress)


def _last(reason: str) -> str:
    return (reason.splitlines() or [""])[-1]


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _wer(sweep: Sweep, cell: Cell) -> str:
    """The WER of a done cell, at the tier, on the test set and in the precision named first."""
    target = Experiment(sweep.experiment(cell), sweep.config(cell))
    first = planned_runs(target.config)[0]
    result = jobs.read_json(first.folder(target.decode_dir) / "wer.json") or {}
    tier = config.chunk_label(first.chunk_size).partition(" (")[0]
    wer = result.get("wer", float("nan"))
    text = f"WER {wer:.2f} % ({first.test_set}, {tier}, {first.precision})"
    if has_collapsed(result):
        text += "; collapsed: it says next to nothing, and stands in no mean"
    return text


def _progress(experiment: Experiment) -> str:
    """The step of a training, and the time left at the pace of its last steps."""
    lines = last_lines(experiment.dir / "metrics.jsonl", TAIL, ("step", "kind"))
    last = next((line for line in reversed(lines) if line["kind"] == "train"), None)
    if last is None:
        return ""
    step, train = last["step"], settled_train(settle(experiment).config)
    text = f"step {step}/{train.max_steps}"
    if step < train.max_steps and last.get("audio_per_second"):
        # The last steps' pace.  A batch is as full as batches are allowed to be.
        audio = train.batch_seconds * train.accumulate * (1 - last.get("padding", 0))
        left = (train.max_steps - step) * audio / last["audio_per_second"]
        text += (
            f", about {left / 3600:.0f} h left"
            if left > 7200
            else f", about {left / 60:.0f} min left"
        )
    return text


def table(sweep: Sweep, rows: list[Row]) -> Table:
    """The rows for a terminal."""
    cells = {cell.name for cell in sweep.cells}
    counts = Counter(row.state for row in rows if row.name in cells)
    title = f"{sweep.name}: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
    shown = Table("cell", "state", "", title=title, title_justify="left", box=None)
    for row in rows:
        shown.add_row(Text(row.name), row.state, Text(row.detail))
    return shown


def show(sweep: Sweep) -> None:
    """Prints the table; on a terminal keeps it fresh until nothing is left or Ctrl-C."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 300  # in a file, no line needs breaking
        console.print(table(sweep, collect(sweep)))
        return
    rows = collect(sweep)
    with suppress(KeyboardInterrupt), Live(table(sweep, rows), console=console) as live:
        while any(row.state in ("waiting", jobs.RUNNING) for row in rows):
            time.sleep(ASK_AGAIN)
            rows = collect(sweep)
            live.update(table(sweep, rows), refresh=True)


def announce(sweep: Sweep, plan: Plan) -> None:
    """Prints how many cells there are, how many are done, and which are skipped and why."""
    print(f"{sweep.name}: {len(sweep.cells)} cells, {len(plan.done)} done already", flush=True)
    for line in [*skipped_lines(plan), no_comparison(sweep.preset)]:
        if line:
            print(line, flush=True)


def skipped_lines(plan: Plan) -> list[str]:
    """Why cells are not to be run, a line each."""
    return [f"{cell.name} is skipped: {reason}" for cell, reason in plan.skipped.items()]


def write_plan(sweep: Sweep, failures: Sequence[str]) -> None:
    """Writes plan.json, which the report reads: the cells, where they lie, what failed."""
    entries = [
        {
            "language": cell.language,
            "init": cell.init,
            "hours": cell.hours,
            "seed": cell.seed,
            "experiment": str(sweep.experiment(cell).relative_to(sweep.root)),
        }
        for cell in sorted(sweep.cells)
    ]
    tree = {
        "sweep": sweep.name,
        "cells": entries,
        "data": {x: f"egs/{x}/{sweep.data_experiment}" for x in sweep.preset.languages},
        "failures": list(failures),
    }
    atomic.write_text(sweep.results / PLAN, json.dumps(tree, indent=1) + "\n")


def write_report_of(sweep: Sweep, failures: Sequence[str]) -> None:
    """Writes the report and shows its tables; `failures` are lines of what did not end well."""
    # Plots take long to import, and --status need not wait for that.
    from icetransfer.report import terminal
    from icetransfer.report.write import write_report

    write_plan(sweep, failures)
    terminal.show(write_report(sweep.results, sweep.root), sweep.results)


def report_so_far(sweep: Sweep) -> None:
    """Writes the report of what is there, with what the jobs' status files say of failures."""
    plan = make_plan(sweep)
    failures = skipped_lines(plan)
    for job in [*plan.data, *plan.runs]:
        status = job.read_status()
        if status.get("state") in (jobs.FAILED, jobs.SKIPPED):
            failures.append(f"{job.name} {status['state']}: {status['reason']} (log: {job.log})")
    write_report_of(sweep, failures)
