"""Hands the jobs of a sweep to Slurm: an array for the data, one for the cells, then the report.

Slurm does the scheduling.  Nothing of ours stays behind: what was submitted is written down in
`results/<sweep>/slurm.json`, jobs write status files of their own (`slurm_job.py`), and sacct is
not asked.  Names reach sbatch as arguments and files, through no shell.
"""

import getpass
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from icetransfer import config
from icetransfer.settings.section import Section
from icetransfer.stage import atomic
from icetransfer.sweep import jobs
from icetransfer.sweep.jobs import Job

SCRIPT = "tools/slurm_job.sh"
SUBMITTED = "slurm.json"
ASK_AGAIN = 30  # seconds; squeue is asked no more often
PREFIX = "icetransfer-"  # of the names of all our jobs

Kind = Literal["data", "cell", "report"]


class Resources(Section):
    """What a job is given."""

    partition: str | None = None
    account: str | None = None
    time: str = "1-00:00:00"
    memory: str | None = None  # of a node, as 32G
    cpus: int = Field(2, ge=1)
    gpus: int = Field(0, ge=0)  # of a node
    nodes: int = Field(1, ge=1)
    at_once: int = Field(8, ge=1)  # so many jobs of an array run at the same time
    warn_seconds: int = Field(
        300, ge=1
    )  # before the time limit; a training saves and goes on later
    options: tuple[str, ...] = ()  # of sbatch, as --qos=low

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("--"):
                raise ValueError(f"write options of sbatch like --qos=low, not {option!r}")
        return options


class Settings(Resources):
    """conf/slurm.yaml: resources of every job, and what is different for some."""

    stages: dict[Kind, dict[str, Any]] = Field(default_factory=dict)

    def resources(self, kind: Kind) -> Resources:
        """What jobs of a kind are given.

        Raises:
            ValueError: a key is unknown or has a bad value.
        """
        tree = self.model_dump(exclude={"stages"}) | self.stages.get(kind, {})
        try:
            return Resources.model_validate(tree)
        except ValidationError as error:
            raise ValueError(f"stages.{kind}: {config.describe_errors(error, Resources)}") from None


def read_settings(path: Path) -> Settings:
    """Reads a slurm.yaml.

    Raises:
        ValueError: it is missing, or a key is unknown or has a bad value.
    """
    try:
        settings = Settings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        for kind in settings.stages:
            settings.resources(kind)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {config.describe_errors(error, Settings)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return settings


@dataclass(frozen=True)
class Submission:
    """What an array is submitted with: its jobs, those they need, and what each is given."""

    jobs: list[Job]
    needed: list[Job]
    resources: Resources

    def write(self, path: Path) -> None:
        """Writes it to a file, for `read_submission`."""
        tree = {
            "jobs": jobs.to_json(self.jobs),
            "needed": jobs.to_json(self.needed),
            "resources": self.resources.model_dump(mode="json"),
        }
        atomic.write_text(path, json.dumps(tree) + "\n")


def read_submission(path: Path) -> Submission:
    """Reads what `Submission.write` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    own, needed = jobs.from_json(tree["jobs"]), jobs.from_json(tree["needed"])
    return Submission(own, needed, Resources.model_validate(tree["resources"]))


def plain(text: str) -> str:
    """A name for squeue's columns, without what separates or ends them."""
    return re.sub(r"[^\w.+=:,-]+", "_", text, flags=re.ASCII)


def describe(slurm_job: str, name: str) -> None:
    """Lets squeue's comment say which job of the array this is; no matter if it may not."""
    subprocess.run(
        ["scontrol", "update", f"JobId={slurm_job}", f"Comment={plain(name)}"],
        capture_output=True,
        check=False,
    )


class Queue:
    """Slurm, as far as one sweep has to do with it."""

    def __init__(self, name: str, results: Path, root: Path) -> None:
        """Finds Slurm's commands.

        Raises:
            ValueError: they are not there.
        """
        missing = [c for c in ("sbatch", "squeue", "scancel", "scontrol") if not shutil.which(c)]
        if missing:
            raise ValueError(f"--cmd slurm needs {', '.join(missing)}: is this a Slurm login node?")
        self.name = PREFIX + plain(name)
        self.results, self.root = results, root
        self._record = results / SUBMITTED

    def check(self, settings: Settings, kinds: Iterable[Kind]) -> None:
        """Lets Slurm say whether it would take the jobs, before any is submitted.

        Raises:
            ValueError: it would not.
        """
        for kind in kinds:
            resources = settings.resources(kind)
            done = _call("sbatch", "--test-only", *_resource_options(resources), self._script)
            if done.returncode:
                said = " / ".join(line for line in done.stderr.splitlines() if line.strip())
                partitions = _call("sinfo", "--noheader", "--format=%R").stdout.split()
                raise ValueError(
                    f"Slurm would refuse the {kind} jobs, and nothing was submitted: {said}. "
                    f"They ask for partition {resources.partition or '(default)'}, of "
                    f"{', '.join(sorted(set(partitions)))}; see conf/slurm.yaml"
                )

    @property
    def _script(self) -> str:
        return str(self.root / SCRIPT)

    def submit(
        self, kind: Kind, array: Submission, after: Sequence[str] = (), array_size: int = 1000
    ) -> list[str]:
        """Submits jobs as an array, or as several when Slurm takes no array of that size.

        Args:
            kind: for its name.
            array: the jobs, and what each is given.
            after: ids of the jobs that must have ended, well or not.
            array_size: the largest array.

        Returns:
            The arrays' ids.

        Raises:
            ValueError: Slurm refuses, as it does when its queue is full.
        """
        ids: list[str] = []
        for start in range(0, len(array.jobs), array_size):
            part = array.jobs[start : start + array_size]
            file = self.results / "slurm" / f"{time.time_ns()}-{kind}.json"
            Submission(part, array.needed, array.resources).write(file)
            names = part[0].name if len(part) == 1 else f"{len(part)} {kind} jobs"
            resources = array.resources
            command = [
                *("--parsable", f"--job-name={self.name}-{kind}"),
                f"--comment={plain(names)}",
                f"--array=0-{len(part) - 1}%{resources.at_once}",
                *("--requeue", f"--signal=B:USR1@{resources.warn_seconds}"),
                *("--output=/dev/null", f"--chdir={self.root}"),
                *_resource_options(resources),
            ]
            # of several arrays of cells one at a time, so that the limit holds for all
            before = [*after, *ids[-1:]]
            if before:
                command.append(f"--dependency=afterany:{':'.join(before)}")
            done = _call("sbatch", *command, self._script, str(self.root), str(file))
            if done.returncode:
                file.unlink()
                raise ValueError(
                    f"Slurm refused {names}: {done.stderr.strip()}. What was submitted before "
                    f"stays; the same command submits what is missing"
                )
            ids.append(done.stdout.split(";")[0].strip())
            self._remember(ids[-1], kind, file, part)
        return ids

    def _remember(self, array_id: str, kind: str, file: Path, part: Sequence[Job]) -> None:
        entry = {
            "id": array_id,
            "kind": kind,
            "file": str(file),
            "jobs": [job.name for job in part],
        }
        entry["user"], entry["time"] = getpass.getuser(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
        tree = json.dumps([*self.submitted(), entry], indent=1)
        atomic.write_text(self._record, tree + "\n")

    def submitted(self) -> list[dict[str, Any]]:
        """The arrays that this sweep has submitted, ever."""
        if not self._record.is_file():
            return []
        entries: list[dict[str, Any]] = json.loads(self._record.read_text(encoding="utf-8"))
        return entries

    def queued(self, fresh: bool = False) -> dict[str, tuple[str, str, str]]:
        """This sweep's jobs in the queue: id of the task, state and reason of each, by name.

        Args:
            fresh: ask squeue now, and not only when the last answer is older than ASK_AGAIN.

        Raises:
            ValueError: squeue does not answer.
        """
        known = {
            (e["id"], str(i)): name for e in self.submitted() for i, name in enumerate(e["jobs"])
        }
        if not known:
            return {}
        cache = self.results / ".squeue"
        if fresh or not cache.is_file() or time.time() - cache.stat().st_mtime > ASK_AGAIN:
            done = _call("squeue", "--noheader", "--array", "--me", "--format=%F|%K|%T|%r|%j")
            if done.returncode:
                raise ValueError(f"squeue does not answer: {done.stderr.strip()}")
            atomic.write_text(cache, done.stdout)
        found = {}
        for line in cache.read_text(encoding="utf-8").splitlines():
            array_id, task, state, reason, name = line.split("|", 4)
            # Slurm counts from 1 again when its state is lost: the name must be ours too
            if (array_id, task) in known and name.startswith(f"{self.name}-"):
                found[known[array_id, task]] = (f"{array_id}_{task}", state, reason)
        return found

    def cancel(self) -> list[str]:
        """Ends what this sweep has in the queue, and nothing else.

        Returns:
            The names of these jobs.

        Raises:
            ValueError: Slurm refuses.
        """
        queued = self.queued(fresh=True)
        arrays = sorted({task.split("_")[0] for task, _, _ in queued.values()}, key=int)
        if arrays:
            done = _call("scancel", *arrays)
            if done.returncode:
                raise ValueError(f"scancel: {done.stderr.strip()}")
        (self.results / ".squeue").unlink(missing_ok=True)
        return sorted(queued)

    def array_size(self) -> int:
        """The largest array that Slurm takes."""
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config").stdout)
        return max(1, int(found[1]) - 1) if found else 1000


def _resource_options(resources: Resources) -> list[str]:
    """Sbatch's options for what a job is given."""
    options = [f"--time={resources.time}", f"--cpus-per-task={resources.cpus}"]
    options += [f"--nodes={resources.nodes}", "--ntasks-per-node=1"]
    if resources.partition:
        options.append(f"--partition={resources.partition}")
    if resources.account:
        options.append(f"--account={resources.account}")
    if resources.memory:
        options.append(f"--mem={resources.memory}")
    if resources.gpus:
        options.append(f"--gpus-per-node={resources.gpus}")
    return [*options, *resources.options]


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
