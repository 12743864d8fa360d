"""`python -m icetransfer` names what there is."""

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import icetransfer
from icetransfer import __main__ as overview
from icetransfer.experiment import provenance

PACKAGE = Path(overview.__file__).parent
#: Not typed by a person, or typed inside a bundle, in which a copy lies.
STARTED_BY_OTHERS = {"sweep.guard", "sweep.slurm", "bundle.check"}


def test_every_command_is_listed_and_every_listed_one_is_there() -> None:
    runnable = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__main__")
        for path in PACKAGE.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert {*overview.STAGES, *overview.BESIDE} == runnable - STARTED_BY_OTHERS - {"__main__"}


def test_the_stages_stand_in_their_order() -> None:
    numbers = [overview.summary(stage).partition(":")[0] for stage in overview.STAGES]
    assert numbers == [f"Stage {number}" for number in range(len(numbers))]


def test_it_runs_without_importing_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "icetransfer"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert "  train           Stage 6: multi-latency fine-tuning" in done.stdout
    assert "torch" not in done.stderr


def called(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "icetransfer", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)


def test_a_command_can_be_named_after_icetransfer() -> None:
    done = called("doctor", "--help")
    assert done.returncode == 0 and "icetransfer.doctor" in done.stdout
    assert called("doctor", "--bogus").returncode == 2


def test_a_command_that_is_not_there_names_the_nearest() -> None:
    done = called("trasncribe")
    assert done.returncode == 2
    assert done.stderr == "error: trasncribe is not a command; did you mean transcribe?\n"


def test_the_version_stands_in_one_place_and_is_carried() -> None:
    root = PACKAGE.parent
    version = icetransfer.__version__
    assert provenance()["icetransfer"] == version
    assert version not in (root / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+),", (root / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == version


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", [*overview.STAGES, *overview.BESIDE])
def test_help_shows_two_examples_and_where_the_reference_is(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"icetransfer.{command}", run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    examples = re.findall(r"^ {4}(?:python -m|\S+\.sh|.* \| python -m) .*", printed, re.M)
    assert len(examples) >= 2, printed
    (reference,) = re.findall(r"^Reference: (.+)$", printed, re.M)
    for document in reference.split(", "):
        assert (PACKAGE.parent / document).is_file()
    if command in overview.STAGES:
        assert re.search(r"^ {4}egs/nl/run.sh .*--stage \d+ .*\S+=\S+$", printed, re.M)


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")  # as if pressed just then
    command = [sys.executable, "-m", "icetransfer.gap", "--help"]
    environment = {"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "interrupted\n"


def test_the_list_fits_a_terminal() -> None:
    assert max(len(line) for text in overview.lines() for line in text.splitlines()) <= 80
