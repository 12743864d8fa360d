"""Runs stages of exp/ in shares, in small parts and shards, and notes in `made` what each makes.

    python sharing.py "corpora 1/2 2/2" "corpora 1/1" "features kill 1/2" ...

The shares of an argument run side by side; after "kill" they are killed outright, each without its
pool, when something is made.  A script of its own, as a process with threads must not be forked.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from icetransfer.experiment import run_stage_in_shares

STAGES = {"corpora": ("prepare", "check"), "features": ("compute_features", "compute_shard")}


def begin(name: str, share: str) -> int:
    """Forks a process that does a share of a stage as its command does."""
    module = importlib.import_module(f"icetransfer.data.{name}")
    child = os.fork()
    if child:
        return child
    stage, makes = STAGES[name]
    make = getattr(module, makes)

    def noted(first: Any, *others: Any) -> Any:
        what = others[1] if name == "features" else first.id
        with Path("made").open("a") as file:
            file.write(f"{what}\n")
        return make(first, *others)

    module.PART, module.SHARD_SECONDS = 3, 2  # type: ignore[attr-defined]
    setattr(module, makes, noted)
    sys.argv = [f"data/{name}.py", "--exp", "exp", "--share", share]
    try:
        run_stage_in_shares("", getattr(module, stage))
    except SystemExit as error:
        os._exit(int(error.code or 0))
    os._exit(0)


def run(name: str, shares: list[str]) -> None:
    """Does some shares at once."""
    before = lines()
    kill = shares[0] == "kill"
    children = [begin(name, share) for share in shares[kill:]]
    while kill and lines() == before:
        time.sleep(0.005)
    for child in children:
        if kill:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (-signal.SIGKILL if kill else 0):
            sys.exit(f"{name} {shares}: exit status {status}")


def lines() -> int:
    """How much was made so far."""
    return len(Path("made").read_bytes().splitlines()) if Path("made").is_file() else 0


if __name__ == "__main__":
    for step in sys.argv[1:]:
        stage_name, *stage_shares = step.split()
        run(stage_name, stage_shares)
        print(step, lines(), sep="\t")
