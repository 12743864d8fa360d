"""What the doctor finds, and that it needs no package to say so."""

import subprocess
import sys
from pathlib import Path

import pytest

from icetransfer import doctor

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two recipes, of which one has data and a model."""
    (tmp_path / "icetransfer").mkdir()
    (tmp_path / "icetransfer/base_models.yaml").write_text(
        "here: {path: here.pt}\nelsewhere: {path: there.pt, get: 'https://example.org/there.pt'}\n"
    )
    (tmp_path / "here.pt").touch()
    (tmp_path / "requirements.txt").write_text(
        '# some\nnumpy==0.1; python_version >= "3.11"\nnumpy==0.1; python_version < "3.11"\n'
        "no-such-package==1.2\n"
    )
    for name in ("aa", "bb", "TEMPLATE"):
        (tmp_path / "egs" / name).mkdir(parents=True)
        (tmp_path / "egs" / name / "run.sh").touch()
    manifests = tmp_path / "egs/aa/data/manifests"
    manifests.mkdir(parents=True)
    (manifests / "own_train.jsonl.gz").touch()
    (tmp_path / "egs/aa/exp/ml").mkdir(parents=True)
    (tmp_path / "egs/aa/exp/ml/averaged.pt").touch()
    return tmp_path


def found(root: Path) -> dict[str, list[doctor.Finding]]:
    by_subject: dict[str, list[doctor.Finding]] = {}
    for finding in doctor.examine(root):
        by_subject.setdefault(finding.what, []).append(finding)
    return by_subject


def test_packages_are_held_against_their_pins(root: Path) -> None:
    missing, other = found(root)["packages"]
    assert (missing.state, missing.found) == ("needed", "missing: no-such-package")
    assert other.state == "optional" and "(pinned: 0.1)" in other.found
    assert "pip install -r requirements.txt" in missing.advice


def test_models_and_recipes(root: Path) -> None:
    by_subject = found(root)
    assert by_subject["base model here"][0].state == "ok"
    assert by_subject["base model elsewhere"][0].advice == "https://example.org/there.pt"
    assert by_subject["egs/aa"][0].found == "manifests in data; 1 trained model"
    assert by_subject["recipes"][0].found == "no data prepared in bb"


def test_this_environment_is_complete() -> None:
    states = {finding.what: finding.state for finding in doctor.examine(REPO)}
    assert "needed" not in states.values(), states
    assert states["Python"] == states["espeak-ng"] == "ok"


def test_it_runs_without_any_package() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "icetransfer.doctor"],  # -S: no site-packages
        cwd=REPO,
        env={"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "  MISSING  packages: missing: torch," in done.stdout
    assert "           -> python -m pip install -r requirements.txt" in done.stdout
    needed, _, rest = done.stdout.partition("Used where it is there")
    assert "MISSING" in needed and "MISSING" not in rest
    assert "without  tools: missing: codespell, mypy," in rest.partition("For developers")[2]
    assert done.stdout.endswith("\nmissing: packages\n")
