"""`python -m icetransfer` names what there is."""

import subprocess
import sys
from pathlib import Path

from icetransfer import __main__ as overview

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
