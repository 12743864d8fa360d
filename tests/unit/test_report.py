import csv
import io
import json
from pathlib import Path

import pytest

from icetransfer import report
from icetransfer.config import chunk_ms, dump_config, load_config
from icetransfer.score import planned_runs

REPO = Path(__file__).resolve().parent.parent.parent
WERS = {"en": 40.0, "ml": 35.0, "random": 80.0}


def make_cell(root: Path, language: str, init: str, seed: int = 1, lost: int = 0) -> dict:
    """An experiment with all of its results but `lost`, and its entry in the plan."""
    folder = root / "egs" / language / "exp" / f"{init}-{seed}"
    settings = [f"language={language}", f"init={init}", "hours=8min", f"seed={seed}"]
    config = load_config([REPO / "egs" / "nl" / "conf" / "default.yaml"], settings)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    for run in planned_runs(config)[lost:]:
        target = run.folder(folder / "decode")
        target.mkdir(parents=True)
        wer = WERS[init] + (1 if run.precision == "int8" else 0) + seed - 1
        wer += 0.5 if run.engine == "torch" else 0
        result = {
            "language": language,
            "init": init,
            "hours": config.hours,
            "seed": seed,
            "test_set": run.test_set,
            "engine": run.engine,
            "precision": run.precision,
            "chunk_ms": chunk_ms(run.chunk_size),
            "wer": wer,
            "cer": wer / 2,
            "words": 100,
            "errors": round(wer),
            "utterances": 10,
            "failed": 0,
            "rtf": 0.1,
            "model_bytes": 400 if run.precision == "fp32" else 100,
        }
        (target / "wer.json").write_text(json.dumps(result))
    place = folder.relative_to(root)
    return {
        "language": language,
        "init": init,
        "hours": config.hours,
        "seed": seed,
        "experiment": str(place),
    }


def write_report(root: Path, cells: list[dict], failures: tuple[str, ...] = ()) -> Path:
    results = root / "results" / "try"
    results.mkdir(parents=True)
    plan = {"sweep": "try", "cells": cells, "failures": list(failures)}
    (results / "plan.json").write_text(json.dumps(plan))
    report.write(results, root)
    return results


def test_a_full_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [make_cell(tmp_path, lang, init) for lang in ("nl", "it") for init in WERS]
    cells += [make_cell(tmp_path, "nl", init, seed=2) for init in ("en", "ml")]
    results = write_report(tmp_path, cells)
    out = capsys.readouterr().out
    text = (results / "report.md").read_text()
    assert "| slots | it | 8min | en | 1 | 40.0 / 20.0 |" in text
    assert "| slots | nl | 8min | en | 2 | 40.5 / 20.2 |" in text, "a mean over two seeds"
    assert "| slots | it | 8min | random | 1 | 81.0 / 40.5 |" in text, "int8"
    assert "Better than random initialisation" in text
    assert "ml by +44.8 points at 8min" in text
    assert "Engines agree to 0.50 WER points" in text
    assert "Repeated with other seeds: nl at 8min" in text
    assert "## Missing" not in text
    assert "## Failed" not in text
    assert "Commit" in text
    assert "+5.00" in out
    assert "[results" not in out
    assert out.rstrip().endswith(f"report: {results / 'report.md'}")
    tree = json.loads((results / "report.json").read_text())
    assert len(tree["results"]) == 8 * 12
    gaps = tree["gap"]["mean_gap"]
    assert {row["gap"] for row in gaps} == {5.0}
    assert [row["size_ratio"] for row in tree["gap"]["quantisation"]] == [4.0]
    assert (results / "gap-slots.png").is_file()
    lines = list(csv.DictReader(io.StringIO((results / "results.csv").read_text())))
    assert lines[0]["chunk_ms"] in ("160", "320", "640", "-1")
    assert (results / lines[0]["recogs"]).parent.joinpath("wer.json").is_file()


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [make_cell(tmp_path, "nl", "en"), make_cell(tmp_path, "nl", "ml", lost=3)]
    cells.append(cells[0] | {"seed": 7, "experiment": "egs/nl/exp/none"})
    results = write_report(tmp_path, cells, ("nl ml 8min seed 1 failed: no [bold] space",))
    out = capsys.readouterr().out
    text = (results / "report.md").read_text()
    for line in (
        "nl ml 8min seed 1: 3 of 12 results missing",
        "nl en 8min seed 7: not begun",
        "no [bold] space",
    ):
        assert line in text
        assert line in out.replace("\n", "")


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_all"):
        report.write(tmp_path, tmp_path)
