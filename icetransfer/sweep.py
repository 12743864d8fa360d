"""The sweep: every language x init x amount of data of a preset, then the report.

    ./run_all.sh [--preset mini] [--langs "nl it"] [--inits "en ml"] [--hours "2min 8min"] ...
    ./run_all.sh --preset paper --cmd slurm      hands it to Slurm, see docs/slurm.md
    ./run_all.sh --preset paper --status         where it is; --cancel ends it

A cell is one run of a recipe, `egs/<language>/run.sh`, in a process of its own.  What is done is
known from the result files alone, so an interrupted sweep goes on where it was.  A cell that fails
is reported and costs no other.
"""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from icetransfer import atomic, experiment, jobs
from icetransfer.jobs import Job
from icetransfer.local import Runner, View, run_jobs, share_out, visible_gpus
from icetransfer.plan import PLAN, Plan, Sweep, from_scratch, make_plan, read_preset, seed_jobs

FAILED = 1  # exit codes: a cell failed
INTERRUPTED = 130


def run_sweep(sweep: Sweep, runner: Runner, at_once: int, retrain: bool = False) -> bool:
    """Runs what is not done yet on this machine and writes the report.

    Returns:
        Whether every cell has its results.

    Raises:
        ValueError: a setting is wrong, or a comparison would not be fair.
    """
    plan = make_plan(sweep)
    seeds = seed_jobs(sweep) if retrain and plan.runs else []
    _announce(sweep, plan)
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


def _announce(sweep: Sweep, plan: Plan) -> None:
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
    from icetransfer import report  # its plots take long to import, and --status need not wait

    write_plan(sweep, failures)
    report.write(sweep.results, sweep.root)


def write_report(sweep: Sweep) -> None:
    """Writes the report of what is there, with what the jobs' status files say of failures."""
    plan = make_plan(sweep)
    failures = _skipped(plan)
    for job in [*plan.data, *plan.runs]:
        status = job.read_status()
        if status.get("state") in (jobs.FAILED, jobs.SKIPPED):
            failures.append(f"{job.name} {status['state']}: {status['reason']} (log: {job.log})")
    _report(sweep, failures)


def tier_settings(tiers: str) -> str:
    """The setting for latency tiers such as "160ms 640ms offline".

    Raises:
        ValueError: one of them is not written like that.
    """
    sizes = []
    for tier in tiers.split():
        match = re.fullmatch(r"(\d+)ms", tier)
        if tier != "offline" and (match is None or int(match[1]) % 20):
            raise ValueError(f"--tiers has {tier!r}: expected chunks as 160ms, or offline")
        sizes.append(-1 if match is None else int(match[1]) // 20)
    return f"decode.chunk_sizes={json.dumps(sizes)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument("--preset", default="mini", help="a preset's name or YAML file (mini)")
    what.add_argument("--smoke", action="store_true", help="the preset smoke: a path, no results")
    what.add_argument("--langs", metavar='"nl it"', help="languages, instead of the preset's")
    what.add_argument("--inits", metavar='"en ml"', help="of en, ml and random")
    what.add_argument("--hours", metavar='"2min 100h"', help="amounts of training data")
    what.add_argument("--seeds", type=int, metavar="N", help="run every cell with seeds 1 to N")
    what.add_argument("--tiers", metavar='"160ms offline"', help="latencies to decode at")
    what.add_argument(
        "--from-scratch", action="store_true", help="train the EN and ML seeds here, first"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--cmd", choices=("local", "slurm"), default="local", help="(local)")
    where.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="local: cells at a time (2)"
    )
    where.add_argument(
        "--slurm-conf", type=Path, metavar="FILE", help="slurm: resources (conf/slurm.yaml)"
    )
    instead = parser.add_argument_group("instead of running").add_mutually_exclusive_group()
    for option, text in (
        ("dry-run", "say what would be run, and how much audio and disk it takes"),
        ("status", "where every cell is"),
        ("cancel", "end what this sweep has in Slurm's queue"),
        ("report", "write the report of what is there"),
        ("estimate", "measure a few training steps and a decode here, say what is left to spend"),
    ):
        instead.add_argument(f"--{option}", action="store_true", help=text)
    return parser


def read_sweep(args: argparse.Namespace) -> Sweep:
    """The sweep that the command line asks for.

    Raises:
        ValueError: it is not one.
    """
    names = {"languages": "langs", "inits": "inits", "hours": "hours", "seeds": "seeds"}
    changes = {field: getattr(args, option) for field, option in names.items()}
    sweep = read_preset("smoke" if args.smoke else args.preset, changes)
    if args.tiers:
        settings = (*sweep.settings, tier_settings(args.tiers))
        sweep = Sweep(sweep.name, sweep.preset, settings, sweep.root)
    return from_scratch(sweep) if args.from_scratch else sweep


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


def _report_arguments(args: argparse.Namespace) -> list[str]:
    """The options of a run_all.sh that reports on the same sweep."""
    options = ["--report"]
    for name in ("preset", "langs", "inits", "hours", "seeds", "tiers"):
        value = getattr(args, name)
        if name == "preset" and value.endswith((".yaml", ".yml")):
            value = str(Path(value).resolve())
        if value is not None:
            options.append(f"--{name}={value}")
    for name in ("smoke", "from_scratch"):
        if getattr(args, name):
            options.append(f"--{name.replace('_', '-')}")
    return options


def _run() -> None:
    args = _parser().parse_args()

    def run() -> None:
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: expected 1 or more")
        sweep = read_sweep(args)
        if args.dry_run or args.estimate:
            from icetransfer import estimate

            if args.dry_run:
                estimate.print_plan(sweep, make_plan(sweep))
            else:
                estimate.print_estimate(sweep, make_plan(sweep))
        elif args.status:
            from icetransfer import status

            status.show(sweep)
        elif args.report:
            write_report(sweep)
        elif args.cancel or args.cmd == "slurm":
            from icetransfer import submit

            if args.cancel:
                submit.cancel(sweep)
            else:
                plan = make_plan(sweep)
                _announce(sweep, plan)
                submit.submit(
                    sweep, plan, args.slurm_conf, _report_arguments(args), args.from_scratch
                )
        elif not _run_to_the_end(sweep, args.jobs, args.from_scratch):
            sys.exit(FAILED)

    experiment.main(run)


if __name__ == "__main__":
    _run()
