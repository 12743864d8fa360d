"""Two at once: the second waits, or is told who has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icetransfer.stage.lock import LOCK, locked

REPO = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from pathlib import Path
from icetransfer.stage.lock import locked
with locked(Path(sys.argv[1]), "features", waits=True, shares="shares" in sys.argv):
    print("has it", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


def test_one_that_does_not_wait_is_told_who_has_it(tmp_path: Path, holder) -> None:
    message = rf"in use by features on .* \(process {holder.pid}, since 20\d\d-.*another --exp"
    with pytest.raises(ValueError, match=message), locked(tmp_path, "train", waits=False):
        pass


def test_one_that_waits_has_it_next(tmp_path: Path, holder, caplog) -> None:
    second = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    holder.communicate("\n")
    assert second.stdout.readline() == "has it\n"
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == second.pid
    second.communicate("\n")
    assert (tmp_path / LOCK).read_text() == "", "nobody has it"


def test_those_that_share_have_it_together_and_the_others_wait(tmp_path: Path) -> None:
    with locked(tmp_path, "features", waits=False, shares=True):
        sharing = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), "shares"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )  # fmt: skip
        assert sharing.stdout.readline() == "has it\n"
    with pytest.raises(ValueError, match="in use by"), locked(tmp_path, "train", waits=False):
        pass
    sharing.communicate("\n")
    with locked(tmp_path, "train", waits=False):
        pass


def test_a_killed_one_does_not_keep_it(tmp_path: Path, holder) -> None:
    holder.kill()
    holder.wait()
    with locked(tmp_path, "train", waits=False):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_other_processes_of_the_same_training_pass(tmp_path: Path, holder, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path, "train", waits=False):
        pass
