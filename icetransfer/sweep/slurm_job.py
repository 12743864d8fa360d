"""One job of a sweep inside a Slurm allocation: `tools/slurm_job.sh` starts it.

    python -m icetransfer.sweep.slurm_job JOBS.json

The job is the $SLURM_ARRAY_TASK_ID-th of the file.  Warned of its time limit (SIGUSR1) it lets the
training save and puts itself into the queue again; when it fails it is tried on, at most twice.
Only the latter is counted: a job may be warned as often as its length needs.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from icetransfer.experiment import RUN_AGAIN, log, main
from icetransfer.sweep import jobs, plan
from icetransfer.sweep.jobs import Job, JobError
from icetransfer.sweep.slurm import Resources, describe, read_submission

RETRIES = 2  # of a job that fails for its own reasons
HEARD = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


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


def run(job: Job, resources: Resources, allocation: Allocation, needed: Job | None) -> None:
    """Runs the job; requeues it, or leaves a status that says why it failed.

    Raises:
        JobError: it failed for the last time, or was cancelled.
    """
    if needed and needed.read_status().get("state") != jobs.DONE:
        job.note(jobs.FAILED, reason=f"{needed.name} did not end well (log: {needed.log})")
        raise JobError(f"{job.name}: {needed.name} did not end well (log: {needed.log})")
    target = job.target if job.kind == "cell" else None
    if target and (reason := plan.too_little_data(job.recipe, target.config)):
        job.note(jobs.SKIPPED, reason=reason)
        return
    begin = time.time()
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
        needed = {other.name: other for other in submission.needed}.get(job.needs)
        describe(own_id(), job.name)
        try:
            run(job, submission.resources, allocation, needed)
        except JobError as error:
            log.error("error: %s", error)
            sys.exit(error.code)

    main(run_own)


if __name__ == "__main__":
    _run()
