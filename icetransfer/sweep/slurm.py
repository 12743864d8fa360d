"""A sweep in Slurm's queue: arrays for the data, one for the cells, then the report.

    python -m icetransfer.sweep.slurm JOBS.json      one job, inside its allocation

Slurm does the scheduling.  Nothing of ours stays behind: what was submitted is written down in
`results/<sweep>/slurm.json`, jobs write status files of their own, and sacct is not asked.  Names
reach sbatch as arguments and files, through no shell.

Inside an allocation, where `tools/slurm_job.sh` starts it, the job is the
$SLURM_ARRAY_TASK_ID-th of the file.  Warned of its time limit (SIGUSR1) it lets the training save
and puts itself into the queue again; when it fails it is tried again, at most twice.  Only the
latter is counted: a job may be warned as often as its length needs.
"""

import argparse
import getpass
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import yaml
from pydantic import Field, ValidationError, field_validator

from icetransfer.experiment import RUN_AGAIN, log, main
from icetransfer.settings.errors import describe_errors
from icetransfer.settings.section import Section
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.sweep import jobs
from icetransfer.sweep.jobs import Job, JobError
from icetransfer.sweep.plan import Plan, Sweep, base_model_jobs, data_steps, too_little_data

SCRIPT = "tools/slurm_job.sh"
SUBMITTED = "slurm.json"
ASK_AGAIN = 30  # seconds; squeue is asked no more often
PREFIX = "icetransfer-"  # of the names of all our jobs
RETRIES = 2  # of a job that fails for its own reasons
HEARD = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

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

    data_shares: int = Field(1, ge=1)  # jobs of a language that check and compute side by side

    stages: dict[Kind, dict[str, Any]] = Field(default_factory=dict)

    def resources(self, kind: Kind) -> Resources:
        """What jobs of a kind are given.

        Raises:
            ValueError: a key is unknown or has a bad value.
        """
        tree = self.model_dump(exclude={"stages", "data_shares"}) | self.stages.get(kind, {})
        try:
            return Resources.model_validate(tree)
        except ValidationError as error:
            raise ValueError(f"stages.{kind}: {describe_errors(error, Resources)}") from None


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
        raise ValueError(f"{path}: {describe_errors(error, Settings)}") from None
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
    tree = read_json(path, ["jobs", "needed", "resources"])
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
        entries: list[dict[str, Any]] = read_json(self._record)
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


def submit(
    sweep: Sweep, plan: Plan, settings_file: Path | None, report: Sequence[str], retrain: bool
) -> None:
    """Submits what is neither done nor in the queue.

    Args:
        sweep: whose plan it is.
        plan: what is left to do.
        settings_file: resources; None for conf/slurm.yaml.
        report: arguments of the run_all.sh that writes the report.
        retrain: train the base models first.

    Raises:
        ValueError: Slurm is not there or refuses; the message says what was submitted.
    """
    settings = read_settings(settings_file or sweep.root / "conf" / "slurm.yaml")
    queue = Queue(sweep.name, sweep.results, sweep.root)
    queue.check(settings, ("data", "cell", "report") if plan.runs else ("report",))
    with jobs.wait_for_lock(
        sweep.results / ".submit.lock", "waiting for another call that submits this sweep"
    ):
        _submit(sweep, plan, settings, queue, report, retrain)


def _submit(
    sweep: Sweep,
    plan: Plan,
    settings: Settings,
    queue: Queue,
    report: Sequence[str],
    retrain: bool,
) -> None:
    queued = queue.queued(fresh=True)
    new = [job for job in plan.runs if job.name not in queued]
    print(f"{len(plan.runs) - len(new)} cells are in the queue already")
    if not new and plan.runs:
        return
    size = queue.array_size()
    wanted = {name for job in new for name in job.needs}
    chains = [
        data_steps(sweep, job, settings.data_shares)
        for job in plan.data
        if job.name in wanted and job.name not in queued
    ]
    # the same step of all languages is one array
    steps = [[job for own in step for job in own] for step in zip(*chains, strict=True)]
    data = [job for step in steps for job in step]
    bases = base_model_jobs(sweep) if retrain and new else []
    bases = [job for job in bases if job.name not in queued]
    for job in (*bases, *data, *new):
        if job.name not in queued:
            job.status.unlink(missing_ok=True)  # of an earlier try

    def send(own: Sequence[Job], kind: str, after: Sequence[str]) -> list[str]:
        resources = settings.resources(kind)  # type: ignore[arg-type]
        array = Submission(list(own), [*plan.data, *data], resources)
        ids = queue.submit(kind, array, after, size)  # type: ignore[arg-type]
        for array_id in ids:
            print(f"submitted {array_id}: {len(own)} {kind} job{'s' * (len(own) > 1)}", flush=True)
        return ids

    base_ids = send(bases, "cell", [])
    data_ids = base_ids
    for step in steps:
        ids = send([job for job in step if job.name not in queued], "data", data_ids)
        data_ids = [*ids, *(queued[job.name][0] for job in step if job.name in queued)]
    data_ids = [*data_ids, *sorted(queued[name][0] for name in wanted if name in queued)]
    cell_ids = send(new, "cell", [*base_ids, *data_ids])
    others = {task for name, (task, _, _) in queued.items() if name in {j.name for j in plan.runs}}
    send([_report_job(sweep, report)], "report", [*data_ids, *cell_ids, *sorted(others)])
    print(f"where it is: ./run_all.sh {shlex.join(report).replace('--report', '--status', 1)}")


def _report_job(sweep: Sweep, arguments: Sequence[str]) -> Job:
    results = sweep.results
    return Job(
        "report", "report", sweep.root, tuple(arguments),
        log=results / "log" / "report.log", status=results / "status" / "report.json",
    )  # fmt: skip


def cancel(sweep: Sweep) -> None:
    """Ends what the sweep has in the queue.

    Raises:
        ValueError: Slurm is not there or refuses.
    """
    ended = Queue(sweep.name, sweep.results, sweep.root).cancel()
    print(f"cancelled {len(ended)} jobs" + "".join(f"\n  {name}" for name in ended))


def own_id() -> str:
    """This task of the array.  Its $SLURM_JOB_ID may be that of the whole array."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


class Allocation:
    """This Slurm job: hears its signals, passes them on, and can go into the queue again."""

    def __init__(self) -> None:
        self.heard: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        for number in HEARD:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard.add(number)
        self._pass_on()

    def started(self, process: subprocess.Popen[bytes]) -> None:
        """The recipe runs."""
        self._process = process
        if self.heard:
            self._pass_on()

    def _pass_on(self) -> None:
        # To run.sh alone: it asks the training to save, and ends at any other stage.
        if self._process and self._process.poll() is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)

    def end_rest(self) -> None:
        """Ends what the recipe has left behind."""
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def cancelled(self) -> bool:
        """Whether it is to end for good, or Slurm itself puts it into the queue again."""
        return bool(self.heard - {signal.SIGUSR1})

    @property
    def is_warned(self) -> bool:
        """Whether the time limit is near."""
        return signal.SIGUSR1 in self.heard

    def requeue(self) -> NoReturn:
        """Puts this job into the queue again, which ends it here.

        Raises:
            JobError: Slurm refuses.
        """
        done = subprocess.run(["scontrol", "requeue", own_id()], capture_output=True, text=True)
        if done.returncode:
            raise JobError(f"could not be put into the queue again: {done.stderr.strip()}")
        while not self.cancelled:  # Slurm ends this job by SIGTERM
            time.sleep(0.5)
        sys.exit(RUN_AGAIN)


def command_parts(resources: Resources, job: Job) -> tuple[list[str], list[str]]:
    """What a job's command is started by, and what is added to it, for several GPUs or nodes."""
    if job.kind != "cell":
        return [], []
    prefix = []
    if resources.nodes > 1:
        # one run.sh for each node, of which the first does all but the training alone
        prefix = ["srun", "--ntasks-per-node=1", f"--ntasks={resources.nodes}"]
        prefix += ["--kill-on-bad-exit=1"]
    several = resources.gpus > 1 or resources.nodes > 1
    return prefix, ["--gpus", str(max(1, resources.gpus))] if several else []


def run_job(job: Job, resources: Resources, allocation: Allocation, needed: Sequence[Job]) -> None:
    """Runs the job; requeues it, or leaves a status that says why it failed.

    Raises:
        JobError: it failed for the last time, or was cancelled.
    """
    for other in needed:
        status = other.read_status()
        if status.get("state") != jobs.DONE:
            said = status.get("reason") or "it was not begun"
            reason = f"{other.name} did not end well: {said} (log: {other.log})"
            job.note(jobs.FAILED, reason=reason)
            raise JobError(f"{job.name}: {reason}")
    target = job.target if job.kind == "cell" else None
    if target and (reason := too_little_data(job.recipe, target.config)):
        job.note(jobs.SKIPPED, reason=reason)
        return
    begin = _time_of(job.status.parent)
    failures = 0
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        failures = job.read_status().get("failures", 0)
    prefix, extra = command_parts(resources, job)
    try:
        jobs.run(
            job,
            prefix=prefix,
            extra=extra,
            environment={"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1")},
            started=allocation.started,
            failures=failures,
            slurm_job=own_id(),
        )
        return
    except jobs.BusyError as busy:
        log.info("%s", busy)
        return
    except JobError as error:
        failure = error
    allocation.end_rest()
    if allocation.cancelled:
        job.note(jobs.AGAIN, reason="stopped by Slurm or by a user")
        raise failure
    if allocation.is_warned or failure.code == RUN_AGAIN:
        if target and not has_progress(target.dir, begin):
            job.note(jobs.FAILED, reason="no file was finished within the time limit")
            raise failure
        log.info("%s: goes into the queue again, to go on", job.name)
        job.note(jobs.AGAIN, reason="")
        allocation.requeue()
    log.info("%s: try %d of %d failed", job.name, failures + 1, RETRIES + 1)
    if failures == RETRIES:
        reason = f"{job.read_status().get('reason')} (tried {failures + 1} times)"
        job.note(jobs.FAILED, failures=failures + 1, reason=reason)
        raise failure
    job.note(jobs.AGAIN, failures=failures + 1)
    allocation.requeue()


def _time_of(folder: Path) -> float:
    """The time by the clock of a folder's file server, which this host's may disagree with."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as file:
        return Path(file.name).stat().st_mtime


def has_progress(experiment: Path, since: float) -> bool:
    """Whether a file of the experiment, but for its logs, was finished after a point in time."""
    return any(
        path.stat().st_mtime > since
        for path in experiment.rglob("*")
        if path.is_file() and "log" not in path.relative_to(experiment).parts
    )


def _run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path, help="JOBS.json")
    args = parser.parse_args()

    def run_own() -> None:
        allocation = Allocation()
        submission = read_submission(args.jobs)
        job = submission.jobs[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        log.info("%s: %s", job.name, job.shown)
        needed = [other for other in submission.needed if other.name in job.needs]
        describe(own_id(), job.name)
        try:
            run_job(job, submission.resources, allocation, needed)
        except JobError as error:
            log.error("error: %s", error)
            sys.exit(error.code)

    main(run_own)


if __name__ == "__main__":
    _run()
