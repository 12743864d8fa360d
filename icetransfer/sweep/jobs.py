"""A job of a sweep: one run of a recipe, with its log, its status file and its lock.

Both engines run the same jobs, `local.py` on this machine and `slurm.py` in a Slurm allocation.
Arguments go to the recipe as they are, through no shell.
"""

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from icetransfer import config
from icetransfer.experiment import INTERRUPTED, RUN_AGAIN, Experiment
from icetransfer.score import planned_runs
from icetransfer.stage import atomic

# Exit codes of what SIGINT or SIGTERM has ended, as a shell and as Popen tell it.
STOPPED = (INTERRUPTED, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
# What a status file says of a job; "again": it was stopped half-way and will go on.
RUNNING, DONE, FAILED, AGAIN, SKIPPED = "running", "done", "failed", "again", "skipped"


@dataclass(frozen=True)
class Job:
    """One run of a recipe.

    Attributes:
        kind: data, cell, base or report.
        name: for people.
        recipe: its folder; of the report, the repository.
        arguments: of its run.sh; of the report, of run_all.sh.
        log: what it prints is added to this file.
        status: what became of it is written to this file.
        needs: the jobs without which it is not begun.
        experiment: the folder that it works in, of a cell or of data.
        wanted: the experiment's config as JSON.
    """

    kind: str
    name: str
    recipe: Path
    arguments: tuple[str, ...]
    log: Path
    status: Path
    needs: tuple[str, ...] = ()
    experiment: Path | None = None
    wanted: Mapping[str, Any] | None = None

    def __hash__(self) -> int:
        return hash(self.status)

    @property
    def command(self) -> tuple[str, ...]:
        """What runs it."""
        script = "run_all.sh" if self.kind == "report" else "run.sh"
        return ("bash", str(self.recipe / script), *self.arguments)

    @property
    def shown(self) -> str:
        """The command as a user could type it."""
        return shlex.join(self.command[1:])

    @property
    def target(self) -> Experiment | None:
        """The experiment that it is to make."""
        if self.experiment is None or self.wanted is None:
            return None
        return Experiment(self.experiment, config.Config.model_validate(self.wanted))

    def read_status(self) -> dict[str, Any]:
        """What became of it, as far as is known."""
        return read_json(self.status) or {}

    def note(self, state: str, **more: Any) -> None:
        """Writes what became of it; what was noted before and is not given again stays."""
        status = self.read_status() | {"name": self.name, "kind": self.kind, "log": str(self.log)}
        status |= {"state": state, "time": time.time(), "host": socket.gethostname(), **more}
        atomic.write_text(self.status, json.dumps(status, indent=1) + "\n")


class JobError(Exception):
    """A job that did not end well: its message is for people."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class BusyError(JobError):
    """A job that another process is running."""


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return tree if isinstance(tree, dict) else None


def to_json(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Jobs as JSON holds them."""
    trees: list[dict[str, Any]] = json.loads(json.dumps([asdict(job) for job in jobs], default=str))
    return trees


def from_json(trees: Sequence[Mapping[str, Any]]) -> list[Job]:
    """The jobs that `to_json` made JSON of."""
    paths = ("recipe", "log", "status", "experiment")
    return [
        Job(
            **dict(tree)
            | {key: Path(tree[key]) for key in paths if tree[key] is not None}
            | {key: tuple(tree[key]) for key in ("arguments", "needs")}
        )
        for tree in trees
    ]


def is_complete(wanted: Experiment) -> bool:
    """Whether an experiment's folder has the config and all results that are wanted of it."""
    if saved_config(wanted.dir) != wanted.config:
        return False
    runs = planned_runs(wanted.config)
    return all((run.folder(wanted.decode_dir) / "wer.json").is_file() for run in runs)


def saved_config(folder: Path) -> config.Config | None:
    """The config that an experiment was made with; None if there is none that is valid today."""
    try:
        return config.load_config([folder / "config.yaml"])
    except ValueError:
        return None


def put_stale_aside(wanted: Experiment) -> list[Path]:
    """Renames what an experiment has from other settings than those wanted now.

    Nothing is deleted: `ml-100h-seed1` becomes `ml-100h-seed1.stale-1`.  When decoding alone is to
    be different, what was trained stays.

    Returns:
        The new names.
    """
    path = wanted.dir / "config.yaml"
    if not path.is_file() or (saved := saved_config(wanted.dir)) == wanted.config:
        return []
    stale = [wanted.dir]
    if saved and saved.model_copy(update={"decode": wanted.config.decode}) == wanted.config:
        stale = [wanted.decode_dir, wanted.dir / "onnx", path]  # the config last: it tells the rest
    moved = []
    for old in stale:
        if old.exists():
            number = 1
            while (new := old.with_name(f"{old.name}.stale-{number}")).exists():
                number += 1
            moved.append(old.rename(new))
    return moved


@contextmanager
def locked(path: Path) -> Iterator[IO[str] | None]:
    """Takes a lock, which its holder and all that inherit the file keep until the last has ended.

    Yields:
        The open file; None when someone else has the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def wait_for_lock(path: Path, message: str) -> IO[str]:
    """Takes a lock, after its holder when there is one; closing the file gives it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(message, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def run(
    job: Job,
    *,
    prefix: Sequence[str] = (),
    extra: Sequence[str] = (),
    environment: Mapping[str, str],
    inherited: tuple[int, ...] = (),
    started: Callable[[subprocess.Popen[bytes]], None],
    **noted: Any,
) -> float:
    """Runs a job to its end, unless another process is at it or it is done already.

    Args:
        job: its status file says afterwards what became of it.
        prefix: what its command is to be started by.
        extra: more arguments of its command.
        environment: variables over those of this process.
        inherited: file descriptors that its processes keep.
        started: is given the process, which leads a session of its own.
        **noted: what else its status file is to say.

    Returns:
        The seconds it took.

    Raises:
        BusyError: another process is at it.
        JobError: it did not exit with 0; the message has its errors and the log's path.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with locked(job.status.with_suffix(".lock")) as lock:
        if lock is None:
            raise BusyError(f"{job.name} is being run by another process: left to it", RUN_AGAIN)
        target = job.target
        if target and is_complete(target):
            job.note(DONE)
            return 0.0
        start = time.monotonic()
        job.note(RUNNING, started=time.time(), reason="", **noted)
        with job.log.open("ab") as output:
            begin = output.tell()
            for moved in put_stale_aside(target) if target else []:
                output.write(f"other settings than now: put aside as {moved}\n".encode())
                output.flush()
            process = subprocess.Popen(
                [*prefix, *job.command, *extra],
                cwd=job.recipe,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                pass_fds=(lock.fileno(), *inherited),
                start_new_session=True,
            )
            started(process)
            code = process.wait()
        seconds = time.monotonic() - start
        spent = job.read_status().get("seconds", 0.0) + seconds
        if code == 0:
            job.note(DONE, seconds=spent)
            return seconds
        reason = f"exit code {code}: {_reason(job.log, begin)}"
        stopped = code in (RUN_AGAIN, *STOPPED)
        job.note(AGAIN if stopped else FAILED, seconds=spent, reason=reason)
        raise JobError(f"{job.name} failed: {reason} (log: {job.log})", code)


def _reason(log: Path, begin: int) -> str:
    """What a log says of the failure, from a position on: its errors, or its last lines."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 100_000))
        text = file.read().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return " | ".join([line for line in lines if line.startswith("error:")] or lines[-3:])
