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
import re
import sys
from pathlib import Path

from icetransfer import experiment
from icetransfer.stage.command import command_parser
from icetransfer.sweep import estimate, local, slurm, status
from icetransfer.sweep.plan import Sweep, from_scratch, make_plan, read_preset

FAILED = 1  # exit code: a cell failed


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
    parser = command_parser(__doc__, "docs/slurm.md, docs/reproduce.md")
    parser.prog = "./run_all.sh"
    what = parser.add_argument_group("what")
    what.add_argument("--preset", default="mini", help="a preset's name or YAML file (mini)")
    what.add_argument("--smoke", action="store_true", help="the preset smoke: a path, no results")
    what.add_argument("--langs", metavar='"nl it"', help="languages, instead of the preset's")
    what.add_argument("--inits", metavar='"en ml"', help="of en, ml and random")
    what.add_argument("--hours", metavar='"2min 100h"', help="amounts of training data")
    what.add_argument("--seeds", type=int, metavar="N", help="run every cell with seeds 1 to N")
    what.add_argument("--tiers", metavar='"160ms offline"', help="latencies to decode at")
    what.add_argument(
        "--from-scratch", action="store_true", help="train both base models here, first"
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


def _main() -> None:
    args = _parser().parse_args()

    def command() -> None:
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: expected 1 or more")
        sweep = read_sweep(args)
        if args.dry_run or args.estimate:
            if args.dry_run:
                estimate.print_plan(sweep, make_plan(sweep))
            else:
                estimate.print_estimate(sweep, make_plan(sweep))
        elif args.status:
            status.show(sweep)
        elif args.report:
            status.report_so_far(sweep)
        elif args.cancel or args.cmd == "slurm":
            if args.cancel:
                slurm.cancel(sweep)
            else:
                plan = make_plan(sweep)
                status.announce(sweep, plan)
                slurm.submit(
                    sweep, plan, args.slurm_conf, _report_arguments(args), args.from_scratch
                )
        elif not local.run_to_the_end(sweep, args.jobs, args.from_scratch):
            sys.exit(FAILED)

    experiment.main(command)


if __name__ == "__main__":
    _main()
