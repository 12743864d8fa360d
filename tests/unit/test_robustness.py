"""The test set of tones under conditions: results beside the clean one, in tables, and again."""

import json
import sys

import pytest

from icetransfer import export, gap, model_card, robustness, score
from icetransfer.experiment import Experiment, create_experiment
from icetransfer.report import tables, write
from icetransfer.streaming.exported import Exported

# Fails with one recording, whose number of samples is odd or even by its words.
PICKY = """import sys, io, soundfile as s
x, r = s.read(io.BytesIO(sys.stdin.buffer.read()))
len(x) > 24000 and sys.exit('too long for me')
s.write(sys.stdout.buffer, x, r, format='WAV')"""
SETTINGS = {
    "decode": {"engines": ["torch", "sherpa"], "precisions": ["fp32"], "chunk_sizes": [8, -1]},
    "robustness": {"conditions": ["softer-40dB", "silence-before", "telephone"]},
}


@pytest.fixture(scope="module")
def measured(tone_recipe, save_random_model):
    commands = {"picky": f'{sys.executable} -c "{PICKY}"'}
    settings = SETTINGS | {"robustness": SETTINGS["robustness"] | {"commands": commands}}
    experiment = tone_recipe(
        "robust", "hours=0.3min", *(f"{k}={json.dumps(v)}" for k, v in settings.items())
    )
    save_random_model(experiment)
    export.export_tiers(experiment)
    robustness.measure(experiment)
    return experiment


def results(experiment):
    paths = experiment.decode_dir.glob("*/*/wer.json")
    return {path.parent.parent.name: json.loads(path.read_text()) for path in paths}


def test_each_condition_has_its_wer_beside_the_clean_one(measured):
    found = results(measured)
    clean = found.pop("tones")
    names = ["softer-40dB", "silence-before", "telephone", "picky"]
    assert found.keys() == {f"tones@{name}" for name in names}
    for name in names:
        result = found[f"tones@{name}"]
        assert result["condition"] == name and result["test_set"] == f"tones@{name}"
        assert result["clean_wer"] == clean["wer"] and result["words"] == clean["words"]
        assert (result["engine"], result["chunk_size"]) == ("sherpa", 8), "what ships; no 320 ms"
        assert result["condition_seed"] == 1
    tokens = {
        path.parent.parent.name: sum(len(row["tokens"]) for row in score.read_rows(path))
        for path in measured.decode_dir.glob("*/*/recogs.jsonl")
    }
    added = tokens["tones@silence-before"] - tokens["tones"]
    assert added == pytest.approx(4 * 50, abs=4 * 4), "2 s more are heard, to a chunk"
    assert 0 < found["tones@picky"]["unchanged"] < 4 and not found["tones@telephone"]["unchanged"]


def test_it_is_done_once(measured):
    files = [*measured.decode_dir.glob("*/*/wer.json")]
    before = [path.stat().st_mtime_ns for path in files]
    robustness.measure(measured)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_another_seed_is_decoded_again_and_off_is_off(measured, tmp_path, caplog):
    section = measured.config.robustness.model_copy(update={"seed": 2, "commands": {}})
    other = create_experiment(
        measured.dir, measured.config.model_copy(update={"robustness": section})
    )
    robustness.measure(other)
    assert results(other)["tones@telephone"]["condition_seed"] == 2
    section = section.model_copy(update={"enabled": False})
    off = create_experiment(
        measured.dir, measured.config.model_copy(update={"robustness": section})
    )
    with caplog.at_level("INFO", logger="icetransfer"):
        robustness.measure(off)
    assert "skip: robustness.enabled=false" in caplog.text


def test_score_has_a_table_of_its_own_for_them(measured):
    table, _ = score.results_table(measured)
    assert not any("@" in str(cell) for column in table.columns for cell in column.cells)
    rows = score.condition_results(measured)
    assert [row["condition"] for row in rows] == [
        *("softer-40dB", "silence-before", "telephone", "picky")
    ], "in the config's order, the user's own last"
    cells = score.condition_cells(rows[0])
    assert len(cells) == len(score.CONDITION_COLUMNS)
    assert cells[0] == "tones" and cells[5].startswith(("+", "-"))
    assert len(score.conditions_table(measured, full=True).rows) == 4


def test_the_model_card_and_the_report_have_them(measured, monkeypatch):
    source = Exported(measured.onnx_dir(8))
    monkeypatch.setattr(Experiment, "final_step", 8)
    card = model_card.bundle_card(measured, source, 8)
    assert "## As if recorded elsewhere" in card and "| telephone |" in card
    assert "As if recorded elsewhere" not in model_card.bundle_card(
        measured, Exported(measured.onnx_dir(-1)), -1
    )
    cell = {"experiment": measured.dir.name, "hours": 0.005}
    rows = write.collect_conditions({"cells": [cell]}, measured.dir.parent)
    header, lines = tables.condition_table(rows)
    assert header == ["condition", "0.3min ml"]
    found = results(measured)
    assert lines[0] == ["as they are", f"{found['tones']['wer']:.1f}"]
    assert ["telephone", f"{found['tones@telephone']['wer']:.1f}"] in lines
    assert tables.condition_table([])[1] == []


def test_the_gap_leaves_them_out(measured):
    found = gap.read_results(measured.decode_dir)
    assert {result.point.test_set for result in found} == {"tones"}


def test_a_command_that_always_fails_is_an_error(measured):
    section = measured.config.robustness.model_copy(
        update={"commands": {"broken": f"{sys.executable} -c 1/0"}, "conditions": ()}
    )
    broken = create_experiment(
        measured.dir, measured.config.model_copy(update={"robustness": section})
    )
    with pytest.raises(ValueError, match=r"broken fails with every recording: .*exit code 1"):
        robustness.measure(broken)
