"""The commands of analysis and planning, as the README has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PUBLISHED = REPO / "results-data"


def call(*words: str | Path) -> str:
    """Runs a command in the repository; returns what it prints."""
    here = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(word) for word in words], cwd=REPO, env=os.environ | here,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module(name: str, *words: str | Path) -> str:
    return call("python", "-m", f"icetransfer.{name}", *words)


def test_gap(tmp_path: Path) -> None:
    module("gap", "--results", PUBLISHED / "results.csv", "--out", tmp_path)
    ours, published = (
        {
            (row["precision"], row["chunk_ms"], row["hours"]): row["gap"]
            for row in json.loads((folder / "gap.json").read_text())["mean_gap"]
        }
        for folder in (tmp_path, PUBLISHED)
    )
    assert ours == {key: pytest.approx(gap) for key, gap in published.items()}
    assert "# The gap between" in (tmp_path / "gap.md").read_text()


def test_recommend(tmp_path: Path) -> None:
    said = module("recommend", "--hours", "300", "--language", "de", "--chunk-ms", "160")
    assert said.startswith("ML: expected WER(en) - WER(ml) +1.49 points\npublished law")
    own = ("--hours", "8min", "--results", PUBLISHED / "results.csv")
    assert "own mini sweep: rests on" in module("recommend", *own)
    (tmp_path / "plan.csv").write_text("language,hours,chunk_ms\npl,500,\nde,300,160\n")
    table = module("recommend", "--plan", tmp_path / "plan.csv")
    assert "500h" in table
    assert "+1.49" in table


def test_compare(tmp_path: Path) -> None:
    for name, heard in (("A", "een twee vier"), ("B", "een twee drie")):
        rows = [
            {"id": f"{i}", "speaker": f"s{i}", "ref": "een twee drie", "hyp": heard}
            for i in range(40)
        ]
        (tmp_path / name).mkdir()
        lines = (json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "recogs.jsonl").write_text("".join(lines))
    said = module("score", "--compare", *(tmp_path / x / "recogs.jsonl" for x in ("A", "B")))
    assert "difference +33.33 points" in said


def test_status() -> None:
    said = call("./run_all.sh", "--preset", "paper", "--langs", "nl", "--status")
    assert "nl ml 2500h seed 1" in said
