"""What Slurm is asked for, with commands that pretend; see tests/recipe for the real ones."""

import os
import shutil
from pathlib import Path

import pytest

from icetransfer.sweep import slurm
from icetransfer.sweep.jobs import FAILED, Job, JobError
from icetransfer.sweep.plan import Preset, Sweep, make_plan

REPO = Path(__file__).resolve().parents[3]
NASTY = "n l $(touch owned) 'a' \"b\"\n;|%j"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where sbatch, squeue, ... write down their arguments; $SBATCH_REFUSES refuses."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo"):
        path = commands / name
        path.write_text(
            "#!/usr/bin/env bash\n"
            f'printf \'%s\\0\' {name} "$@" END >>"$ASKED"\n'
            f'[ {name} != squeue ] || cat "$QUEUE"\n'
            f'[ {name} != sbatch ] || [ -z "${{REFUSES:-}}" ] || {{ echo full >&2; exit 1; }}\n'
            f"[ {name} != sbatch ] || echo 41\n"
        )
        path.chmod(0o755)
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    return tmp_path / NASTY.replace("/", "")


def asked(root: Path) -> list[list[str]]:
    text = (root.parent / "asked").read_text()
    return [call.strip("\0").split("\0") for call in text.split("END\0") if call]


def job(root: Path, name: str = NASTY) -> Job:
    return Job("cell", name, root, ("--exp", NASTY), root / "log", root / "status.json")


def submission(root: Path, count: int, **resources: object) -> slurm.Submission:
    own = [job(root, f"{NASTY} {number}") for number in range(count)]
    return slurm.Submission(own, [], slurm.Resources.model_validate(resources))


def test_arrays_with_limits_dependencies_and_resources(root: Path) -> None:
    queue = slurm.Queue("my sweep", root / "results", root)
    wanted = {"partition": "gpu", "account": "me", "gpus": 2, "memory": "8G", "at_once": 3}
    array = submission(root, 5, **wanted, options=["--qos=low"])
    assert queue.submit("cell", array, ["7"], array_size=4) == ["41", "41"]
    first, second = asked(root)
    assert first[0] == "sbatch"
    for option in (
        *("--array=0-3%3", "--partition=gpu", "--account=me", "--gpus-per-node=2", "--mem=8G"),
        *("--qos=low", "--requeue", "--signal=B:USR1@300", "--dependency=afterany:7"),
        *("--job-name=icetransfer-my_sweep-cell", "--comment=4_cell_jobs"),
    ):
        assert option in first
    assert "--array=0-0%3" in second
    assert "--dependency=afterany:7:41" in second, "the limit holds for all arrays together"


def test_nasty_names_are_arguments_and_files(root: Path) -> None:
    queue = slurm.Queue(NASTY, root / "results", root)
    queue.submit("cell", submission(root, 1))
    (call,) = asked(root)
    script, folder, file = call[-3:]
    assert script == f"{root}/tools/slurm_job.sh"
    assert folder == str(root)
    assert slurm.read_submission(Path(file)).jobs == submission(root, 1).jobs
    for name in ("--job-name=", "--comment="):
        (value,) = (part[len(name) :] for part in call if part.startswith(name))
        assert value == slurm.plain(value)
    assert not list(root.parent.rglob("owned"))
    script_text = (REPO / "tools" / "slurm_job.sh").read_text()
    assert "eval" not in script_text


def test_what_was_refused_is_said_and_what_was_submitted_is_remembered(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = slurm.Queue("try", root / "results", root)
    queue.submit("data", submission(root, 1))
    monkeypatch.setenv("REFUSES", "1")
    with pytest.raises(ValueError, match="Slurm refused 2 cell jobs: full"):
        queue.submit("cell", submission(root, 2))
    assert [entry["kind"] for entry in queue.submitted()] == ["data"]


def test_what_needs_a_share_that_failed_is_not_begun_and_says_why(root: Path) -> None:
    """The chain ends in the report, with the last line of the share."""
    names = ["nl features 2 of 3", "nl data", "nl en 2min seed 1"]
    status = root / "status"
    share, data, cell = (
        Job("data", name, root, (), root / f"{name}.log", status / f"{name}.json", needs)
        for name, needs in zip(names, [(), (names[0],), (names[1],)], strict=True)
    )
    share.note(FAILED, reason="exit code 2: error: broken on purpose (tried 3 times)")
    allocation = slurm.Allocation.__new__(slurm.Allocation)  # that hears no signals
    for job, needed in ((data, share), (cell, data)):
        with pytest.raises(JobError, match=f"{needed.name} did not end well"):
            slurm.run_job(job, slurm.Resources(), allocation, [needed])
        assert job.read_status()["state"] == FAILED
        assert "error: broken on purpose (tried 3 times)" in job.read_status()["reason"]
        assert not job.log.exists()


def test_only_our_jobs_are_cancelled(root: Path) -> None:
    queue = slurm.Queue("try", root / "results", root)
    queue.submit("cell", submission(root, 2))
    (root.parent / "queue").write_text(
        "41|1|PENDING|Resources|icetransfer-try-cell\n"
        "40|1|RUNNING|None|icetransfer-try-cell\n"  # of another folder's sweep of that name
        "41|0|RUNNING|None|other\n"  # an id that Slurm has given again
    )
    assert queue.cancel() == [f"{NASTY} 1"]
    assert ["scancel", "41"] in asked(root)


def test_squeue_is_asked_every_half_minute_at_most(root: Path) -> None:
    queue = slurm.Queue("try", root / "results", root)
    queue.submit("cell", submission(root, 1))
    for _ in range(5):
        queue.queued()
    assert [call[0] for call in asked(root)].count("squeue") == 1


def test_settings_by_stage(tmp_path: Path) -> None:
    settings = slurm.read_settings(REPO / "conf" / "slurm.yaml")
    assert settings.resources("cell").gpus == 1
    assert settings.resources("data").gpus == 0
    path = tmp_path / "slurm.yaml"
    for text, message in (
        ("partiton: x", "did you mean partition"),
        ("stages: {cell: {gpu: 1}}", "stages.cell: unknown config key gpu"),
        ("options: [-x]", "like --qos=low"),
        ("a: [", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            slurm.read_settings(path)


def test_the_steps_of_shared_data_wait_for_each_other(root: Path) -> None:
    """Each step is one array over the languages."""
    for language in ("nl", "pl"):
        conf = root / "egs" / language / "conf"
        conf.mkdir(parents=True)
        shutil.copy(REPO / "egs" / "nl" / "conf" / "default.yaml", conf)
    preset = Preset.model_validate({"languages": ["nl", "pl"], "inits": ["en"], "hours": ["2min"]})
    sweep = Sweep("try", preset, (), root)
    settings = root / "slurm.yaml"
    settings.write_text("data_shares: 3\nstages: {data: {at_once: 5}}\n")
    slurm.submit(sweep, make_plan(sweep), settings, ["--report"], retrain=False)
    sent = [call for call in asked(root) if "--parsable" in call]
    arrays = [part for call in sent for part in call if part.startswith("--array")]
    assert arrays == [
        *("--array=0-1%5", "--array=0-5%5", "--array=0-1%5", "--array=0-5%5", "--array=0-1%5"),
        *("--array=0-1%8", "--array=0-0%8"),  # cells, report
    ]
    assert not any("--dependency" in part for part in sent[0])
    assert all(any("--dependency=afterany:41" in part for part in call) for call in sent[1:])


@pytest.mark.parametrize(
    ("gpus", "nodes", "prefix", "extra"),
    [
        (0, 1, [], []),
        (1, 1, [], []),
        (4, 1, [], ["--gpus", "4"]),
        (4, 2, ["srun", "--ntasks-per-node=1", "--ntasks=2"], ["--gpus", "4"]),
    ],
)
def test_several_gpus_and_nodes(
    tmp_path: Path, gpus: int, nodes: int, prefix: list[str], extra: list[str]
) -> None:
    resources = slurm.Resources(gpus=gpus, nodes=nodes)
    begin, end = slurm.command_parts(resources, job(tmp_path))
    assert begin[:3] == prefix
    assert end == extra
