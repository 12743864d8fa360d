"""Runs stages 1 to 4 of an experiment to their end, killed again and again as they write files.

    python killing.py EXP {after,before,never}

A script of its own, because a process with threads must not be forked.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from icetransfer.data import corpora, features, subset, tokenizer
from icetransfer.experiment import Experiment, open_experiment

STAGES = (
    corpora.prepare,
    features.compute_features,
    subset.make_subset,
    tokenizer.make_tokenizer,
)
MOST_KILLS = 100  # more, and the stages make no headway


def run(stage: Callable[[Experiment], None], experiment: Experiment, kill: str, number: int) -> int:
    """Runs a stage in a process group of its own, which may kill itself; the exit status.

    Args:
        stage: What to run.
        experiment: Its experiment.
        kill: "after" a process has given a number of files their names, "before" it names one more,
            or "never".
        number: That number.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.setsid()
    rename, renamed = Path.replace, []

    def rename_and_die(self: Path, target: Path) -> Path:
        if kill == "before" and len(renamed) == number:
            os.killpg(0, signal.SIGKILL)
        renamed.append(target)
        done = rename(self, target)
        if kill == "after" and len(renamed) == number:
            os.killpg(0, signal.SIGKILL)
        return done

    Path.replace = rename_and_die  # type: ignore[method-assign,assignment]
    stage(experiment)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Prints how often each stage was killed."""
    corpora.PART, features.SHARD_SECONDS = 3, 1
    experiment, kill = open_experiment(Path(sys.argv[1])), sys.argv[2]
    for stage in STAGES:
        kills = 0  # each run of a stage gets further by a file
        while (status := run(stage, experiment, kill, kills + 1)) == -signal.SIGKILL:
            kills += 1
            if kills > MOST_KILLS:
                sys.exit(f"{stage.__module__}: no end after {kills} kills")
        if status:
            sys.exit(f"{stage.__module__}: exit status {status} after {kills} kills")
        print(f"{stage.__module__}\t{kills}")


if __name__ == "__main__":
    main()
