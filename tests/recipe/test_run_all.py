"""The main job as a user types it, with a few training steps: minutes, not seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
BASE_MODELS = [REPO / "egs" / "base_models" / f"{name}.pt" for name in ("en", "ml")]
SMOKE_SECONDS = 1200  # it promises 240 on two free cores; tests share theirs


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        [str(REPO / "run_all.sh"), *arguments],
        env=os.environ | here,
        capture_output=True,
        text=True,
        timeout=SMOKE_SECONDS,
    )


def test_help() -> None:
    done = run_all("--help")
    assert done.returncode == 0
    for option in ("--preset", "--langs", "--tiers", "--cmd", "--dry-run", "--status", "--cancel"):
        assert option in done.stdout


def test_dry_run_names_every_cell() -> None:
    done = run_all("--dry-run", "--langs", "nl", "--hours", "8min")
    assert done.returncode == 0, done.stderr
    for init in ("en", "ml", "random"):
        assert f"egs/nl/exp/mini/{init}-8min-seed1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "none"], "known are mini, paper, smoke"),
        (["--jobs", "0"], "--jobs 0"),
        (["--tiers", "100"], "expected chunks as 160ms"),
        (["--cmd", "slurm", "--slurm-conf", "none.yaml"], "none.yaml cannot be read"),
        (["--status", "--dry-run"], "not allowed with argument"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    done = run_all(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_status_of_what_was_not_begun() -> None:
    done = run_all("--status", "--preset", "paper", "--langs", "nl", "--hours", "100h")
    assert done.returncode == 0, done.stderr
    assert "paper: 2 waiting" in done.stdout


def test_smoke() -> None:
    """Everything from speech to the report, then a second run that finds it done."""
    missing = [path.name for path in BASE_MODELS if not path.is_file()]
    if missing:
        pytest.skip(
            f"egs/base_models has no {', '.join(missing)}: train with egs/en, egs/multilingual"
        )
    done = run_all("--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    results = REPO / "results" / "smoke"
    assert "report: results/smoke/report.md" in done.stdout
    # after eight steps no model says anything, and the report knows
    assert "models that say next to nothing (WER over 90 %, mostly deletions)" in done.stdout
    report = json.loads((results / "report.json").read_text())
    assert not report["missing"]
    assert not report["failures"]
    assert {row["init"] for row in report["results"]} == {"en", "ml", "random"}
    assert {row["chunk_ms"] for row in report["results"]} == {160, 320, 640, -1}
    assert {row["precision"] for row in report["results"]} == {"fp32", "int8"}
    assert report["gap"] is None
    again = run_all("--smoke")
    assert again.returncode == 0
    assert "3 cells, 3 done already" in again.stdout
