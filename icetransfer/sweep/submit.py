"""Hands a whole sweep to Slurm: seeds, data, cells, report, each after what it needs."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from icetransfer.sweep import jobs
from icetransfer.sweep.jobs import Job
from icetransfer.sweep.plan import Plan, Sweep, seed_jobs
from icetransfer.sweep.slurm import Queue, Settings, Submission, read_settings


def submit(
    sweep: Sweep, plan: Plan, settings_file: Path | None, report: Sequence[str], retrain: bool
) -> None:
    """Submits what is neither done nor in the queue.

    Args:
        sweep: whose plan it is.
        plan: what is left to do.
        settings_file: resources; None for conf/slurm.yaml.
        report: arguments of the run_all.sh that writes the report.
        retrain: train the seeds first.

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
    wanted = {job.needs for job in new}
    data = [job for job in plan.data if job.name in wanted and job.name not in queued]
    seeds = [job for job in seed_jobs(sweep) if job.name not in queued] if retrain and new else []
    for job in (*seeds, *data, *new):
        job.status.unlink(missing_ok=True)  # of an earlier try

    def send(own: Sequence[Job], kind: str, after: Sequence[str]) -> list[str]:
        resources = settings.resources(kind)  # type: ignore[arg-type]
        ids = queue.submit(kind, Submission(list(own), plan.data, resources), after, size)  # type: ignore[arg-type]
        for array_id in ids:
            print(f"submitted {array_id}: {len(own)} {kind} job{'s' * (len(own) > 1)}", flush=True)
        return ids

    seed_ids = send(seeds, "cell", [])
    before = {queued[name][0] for name in wanted if name in queued}
    data_ids = [*send(data, "data", seed_ids), *sorted(before)]
    cell_ids = send(new, "cell", [*seed_ids, *data_ids])
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
