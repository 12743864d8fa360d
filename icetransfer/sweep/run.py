"""Runs a sweep on this machine, to its report."""

import json
import os
import signal
import sys
from collections.abc import Sequence

from icetransfer.report import PLAN
from icetransfer.stage import atomic
from icetransfer.sweep import jobs
from icetransfer.sweep.jobs import Job
from icetransfer.sweep.local import Runner, View, run_jobs, share_out, visible_gpus
from icetransfer.sweep.plan import Plan, Sweep, make_plan, seed_jobs

INTERRUPTED = 130  # exit code


def run_sweep(sweep: Sweep, runner: Runner, at_once: int, retrain: bool = False) -> bool:
    """Runs what is not done yet on this machine and writes the report.

    Returns:
        Whether every cell has its results.

    Raises:
        ValueError: a setting is wrong, or a comparison would not be fair.
    """
    plan = make_plan(sweep)
    seeds = seed_jobs(sweep) if retrain and plan.runs else []
    announce(sweep, plan)
    shares = share_out(at_once, os.cpu_count() or 1, visible_gpus())
    failures: dict[Job, str] = {}
    view = View(len(seeds) + len(plan.data) + len(plan.runs))
    with view.shown():
        failures |= run_jobs(seeds, shares, runner, view)
        if not failures:
            # a language's data stages use all cores by themselves: one after the other
            failures |= run_jobs(plan.data, [{"OMP_NUM_THREADS": "1"}], runner, view)
            without_data = {job.name for job in failures}
            runs = [job for job in plan.runs if job.needs not in without_data]
            failures |= run_jobs(runs, shares, runner, view)
    _report(sweep, [*_skipped(plan), *failures.values()])
    return not failures


def announce(sweep: Sweep, plan: Plan) -> None:
    """Prints how many cells there are, how many are done, and which are skipped and why."""
    print(f"{sweep.name}: {len(sweep.cells)} cells, {len(plan.done)} done already", flush=True)
    for line in _skipped(plan):
        print(line, flush=True)


def _skipped(plan: Plan) -> list[str]:
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


def _report(sweep: Sweep, failures: Sequence[str]) -> None:
    # Plots take long to import, and --status need not wait for that.
    from icetransfer.report.terminal import show
    from icetransfer.report.write import write_report

    write_plan(sweep, failures)
    show(write_report(sweep.results, sweep.root), sweep.results)


def report_so_far(sweep: Sweep) -> None:
    """Writes the report of what is there, with what the jobs' status files say of failures."""
    plan = make_plan(sweep)
    failures = _skipped(plan)
    for job in [*plan.data, *plan.runs]:
        status = job.read_status()
        if status.get("state") in (jobs.FAILED, jobs.SKIPPED):
            failures.append(f"{job.name} {status['state']}: {status['reason']} (log: {job.log})")
    _report(sweep, failures)


def run_to_the_end(sweep: Sweep, at_once: int, retrain: bool) -> bool:
    """`run_sweep` that a signal ends in order: the jobs are told, and their ends are waited for.

    Raises:
        SystemExit: with INTERRUPTED, after SIGTERM or Ctrl-C.
    """

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
