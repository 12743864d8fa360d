"""Runs a sweep on this machine to its report: some jobs at a time, cores and GPUs shared out.

A job ends when the sweep does: asked to (Ctrl-C, SIGTERM) it saves first; and should the sweep be
killed outright, `guard.py` ends it.  Jobs hold the sweep's lock as long as they live, so
the next sweep begins when the last of them is gone.
"""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from icetransfer.experiment import INTERRUPTED, RUN_AGAIN
from icetransfer.sweep import jobs
from icetransfer.sweep.jobs import Job, JobError
from icetransfer.sweep.plan import Sweep, base_model_jobs, make_plan
from icetransfer.sweep.status import announce, skipped_lines, write_report_of

GUARD = Path(__file__).with_name("guard.py")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    return sorted(path.name[len("nvidia") :] for path in Path("/dev").glob("nvidia[0-9]*"))


def share_out(at_once: int, cores: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What each of the jobs that run at the same time may use, as environment variables.

    With fewer GPUs than jobs, several share one; with more, each job has several.
    """
    shares = []
    for slot in range(at_once):
        share = {"OMP_NUM_THREADS": str(max(1, cores // at_once))}
        own = list(gpus[slot::at_once]) or [gpus[slot % len(gpus)]] if gpus else []
        if own:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        shares.append(share)
    return shares


class Runner:
    """Runs jobs in processes, and ends them when it is interrupted itself."""

    def __init__(self, results: Path) -> None:
        """Waits until no other sweep works on the same results."""
        self._lock = jobs.wait_for_lock(
            results / ".lock", f"waiting for another sweep that still works on {results}"
        )
        self._alive, self._closed_when_dead = os.pipe()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()
        os.close(self._alive)
        os.close(self._closed_when_dead)

    def run(self, job: Job, share: Mapping[str, str]) -> float:
        """Runs a job, again when its training was stopped and wants to go on.

        Returns:
            The seconds it took.

        Raises:
            JobError: it failed, or this is stopping.
        """
        seconds = 0.0
        while not self._stopping:
            try:
                return seconds + self._run_once(job, share)
            except jobs.BusyError:
                raise
            except JobError as error:
                if error.code != RUN_AGAIN or self._stopping:
                    raise
                seconds = job.read_status().get("seconds", 0.0)
        raise JobError(f"{job.name} was not begun")

    def _run_once(self, job: Job, share: Mapping[str, str]) -> float:
        process = None

        def started(begun: subprocess.Popen[bytes]) -> None:
            nonlocal process
            process = begun
            self._running.add(begun)
            if self._stopping:
                self._end(begun)

        try:
            return jobs.run(
                job,
                prefix=(sys.executable, "-I", "-S", str(GUARD), str(self._alive)),
                environment=share,
                inherited=(self._alive, self._lock.fileno()),
                started=started,
            )
        finally:
            if process:
                self._running.discard(process)

    def stop(self) -> None:
        """Asks what is running to save and to end."""
        self._stopping = True
        for process in list(self._running):
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


class View:
    """Progress on a terminal; plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        terminal = self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, disable=not terminal)
        self._task = self._progress.add_task("sweep", total=total)
        self._total, self._ended = total, 0
        self._running: list[str] = []

    def started(self, job: Job) -> None:
        """A job has begun."""
        self._running.append(job.name)
        if not self._console.is_terminal:
            self._console.print(f"{time.strftime('%H:%M:%S')} start {job.name}", markup=False)
        self._progress.update(self._task, description=", ".join(self._running))

    def ended(self, job: Job, outcome: str) -> None:
        """A job has ended."""
        if job.name in self._running:
            self._running.remove(job.name)
        self._ended += 1
        count = f"({self._ended} of {self._total})"
        self._console.print(f"{time.strftime('%H:%M:%S')} {outcome} {count}", markup=False)
        self._progress.update(self._task, advance=1, description=", ".join(self._running))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps the view on the screen."""
        with self._progress:
            yield


def run_jobs(
    todo: Sequence[Job], shares: Sequence[Mapping[str, str]], runner: Runner, view: View
) -> dict[Job, str]:
    """Runs jobs, as many at a time as there are shares of the machine.

    Returns:
        The jobs that failed, with what is to be said of each.
    """
    free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
    for share in shares:
        free.put(share)

    def work(job: Job) -> float:
        share = free.get()
        try:
            view.started(job)
            return runner.run(job, share)
        finally:
            free.put(share)

    failures = {}
    with ThreadPoolExecutor(len(shares)) as pool:
        futures: dict[Future[float], Job] = {pool.submit(work, job): job for job in todo}
        try:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    view.ended(job, f"done  {job.name} in {future.result():.0f} s")
                except JobError as failure:
                    failures[job] = str(failure)
                    view.ended(job, str(failure))
        except KeyboardInterrupt:
            runner.stop()
            raise
    return failures


def run_sweep(sweep: Sweep, runner: Runner, at_once: int, retrain: bool = False) -> bool:
    """Runs what is not done yet on this machine and writes the report.

    Returns:
        Whether every cell has its results.

    Raises:
        ValueError: a setting is wrong, or a comparison would not be fair.
    """
    plan = make_plan(sweep)
    bases = base_model_jobs(sweep) if retrain and plan.runs else []
    announce(sweep, plan)
    shares = share_out(at_once, os.cpu_count() or 1, visible_gpus())
    failures: dict[Job, str] = {}
    view = View(len(bases) + len(plan.data) + len(plan.runs))
    with view.shown():
        failures |= run_jobs(bases, shares, runner, view)
        if not failures:
            # a language's data stages use all cores by themselves: one after the other
            failures |= run_jobs(plan.data, [{"OMP_NUM_THREADS": "1"}], runner, view)
            without_data = {job.name for job in failures}
            runs = [job for job in plan.runs if without_data.isdisjoint(job.needs)]
            failures |= run_jobs(runs, shares, runner, view)
    write_report_of(sweep, [*skipped_lines(plan), *failures.values()])
    return not failures


def run_to_the_end(sweep: Sweep, at_once: int, retrain: bool) -> bool:
    """`run_sweep` that a signal ends in order: the jobs are told, and their ends are waited for.

    Raises:
        SystemExit: with INTERRUPTED, after SIGTERM or Ctrl-C.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    make_plan(sweep)  # a mistake is said before anything is made; it is planned under the lock
    runner = Runner(sweep.results)
    try:
        return run_sweep(sweep, runner, at_once, retrain)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", flush=True)
        sys.exit(INTERRUPTED)
    finally:
        runner.close()
