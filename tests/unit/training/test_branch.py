"""A branch is the run of its length, to the bit, at the price of its cool-down."""

import re
import subprocess
import sys

import pytest

from icetransfer import train
from icetransfer.experiment import Experiment, open_experiment
from icetransfer.model.checkpoint import read_checkpoint
from icetransfer.stage.lock import locked
from icetransfer.training import resume
from icetransfer.training.branch import make_branch
from tests.unit.training.test_faults import assert_same, weights

LONG = (
    "train.loss_warmup_steps=2",
    "train.max_steps=40",
    "train.average_period=2",
    "train.schedule.warmup_steps=3",
)
BRANCHES = ("train.branches=[20, 32]",)
RATES = (  # the scheme's depend on the length, a branch has those of its long run
    "train.lr_scale={encoder_embed: 1, encoder: 1, joiner: 1, simple_am_proj: 1, "
    "simple_lm_proj: 1, ctc_output: 1}",
    "train.freeze={encoder_embed: 0, encoder: 0}",
)


@pytest.fixture(scope="module")
def long(prepare) -> Experiment:
    experiment = prepare("long", *LONG, *RATES, *BRANCHES, "train.keep_checkpoints=1")
    train.train(experiment)
    return experiment


def test_a_branch_equals_a_run_of_its_length(prepare, long: Experiment) -> None:
    whole = prepare("whole", *LONG, *RATES, "train.max_steps=20")
    train.train(whole)
    branch = make_branch(long, 20)
    assert branch.dir.name == f"{long.dir.name}-20steps"
    assert resume.saved_steps(branch) == [10]
    assert make_branch(long, 20) == branch, "it may be asked for twice"
    train.train(open_experiment(branch.dir))
    assert_same(weights(whole, 20), weights(branch, 20))
    first, second = (
        read_checkpoint(resume.checkpoint_path(e, 20)).extra["model_avg"] for e in (whole, branch)
    )
    assert_same(first, second)


def test_the_long_run_keeps_where_its_branches_begin(long: Experiment) -> None:
    # half of 20 and of 32, where their rates begin to fall; 28 is where its own average begins
    assert resume.saved_steps(long) == [10, 16, 28, 40]


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ((), 12, r"expected one of train.branches=\[20, 32\], and less than the 40 steps"),
        (("train.branches=[50]",), 50, "less than the 40 steps"),
        (("init=random",), 20, "depend on its length from the start"),
        (("train.average_period=3",), 20, "under 30 steps, depend on its length"),
        ((), 20, r"checkpoint-10\.pt does not exist: train until step 10 first"),
    ],
)
def test_what_cannot_branch_says_why(prepare, settings, steps, message) -> None:
    experiment = prepare("no", *LONG, *RATES, *BRANCHES, *settings)
    with pytest.raises(ValueError, match=message):
        make_branch(experiment, steps)


def test_under_torchrun_it_is_refused(long: Experiment, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=re.escape("--branch 20: first without torchrun")):
        make_branch(long, 20)


def test_a_branch_trains_while_the_long_run_goes_on(long: Experiment) -> None:
    branch = long.dir.with_name(f"{long.dir.name}-32steps")
    command = [sys.executable, "-m", "icetransfer.train", "--exp", str(long.dir), "--branch", "32"]
    with locked(branch, "train", waits=False):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and f"{branch} is in use by train on " in done.stderr
        assert not (branch / "config.yaml").exists()
    with locked(long.dir, "train", waits=False):
        subprocess.run(command, capture_output=True, text=True, check=True)
    assert resume.saved_steps(open_experiment(branch))[-1] == 32
    assert (branch / "log" / "train.log").is_file() and (branch / "log" / "cost.jsonl").is_file()
