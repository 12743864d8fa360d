import csv
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from icetransfer.config import chunk_ms, dump_config, load_config
from icetransfer.report import page, tables, terminal, write
from icetransfer.report.document import _latency_drawings, document
from icetransfer.report.terminal import show
from icetransfer.score import planned_runs

REPO = Path(__file__).resolve().parents[3]
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


def report_on(root: Path, cells: list[dict], failures: tuple[str, ...] = ()) -> Path:
    results = root / "results" / "try"
    results.mkdir(parents=True)
    plan = {"sweep": "try", "cells": cells, "failures": list(failures)}
    (results / "plan.json").write_text(json.dumps(plan))
    show(write.write_report(results, root), results)
    return results


def test_a_full_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [make_cell(tmp_path, lang, init) for lang in ("nl", "it") for init in WERS]
    cells += [make_cell(tmp_path, "nl", init, seed=2) for init in ("en", "ml")]
    results = report_on(tmp_path, cells)
    out = capsys.readouterr().out
    text = (results / "report.md").read_text()
    assert "| slots | it | 8min | en | 1 | 40.0 / 20.0 |" in text
    assert "| slots | nl | 8min | en | 2 | 40.5 / 20.2 |" in text, "a mean over two seeds"
    assert "| slots | it | 8min | random | 1 | 81.0 / 40.5 |" in text, "int8"
    assert "Better than random initialisation" in text
    assert "ml by +44.8 points at 8min" in text
    assert "Repeated with other seeds: nl at 8min" in text
    assert "## Missing" not in text
    assert "## Failed" not in text
    assert "Commit" in text
    assert "+5.00" in out
    assert "[results" not in out
    assert out.rstrip().endswith(f"report: {os.path.relpath(results)}/report.md")
    assert "With 8min of data (slots, fp32, 160 ms): gap +5.00" in out
    tree = json.loads((results / "report.json").read_text())
    assert len(tree["results"]) == 8 * 12
    gaps = tree["gap"]["mean_gap"]
    assert {row["gap"] for row in gaps} == {5.0}
    assert [row["size_ratio"] for row in tree["gap"]["quantisation"]] == [4.0]
    assert (results / "gap-slots.png").is_file()
    lines = list(csv.DictReader(io.StringIO((results / "results.csv").read_text())))
    assert lines[0]["chunk_ms"] in ("160", "320", "640", "-1")
    assert (results / lines[0]["recogs"]).parent.joinpath("wer.json").is_file()


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [make_cell(tmp_path, lang, init) for lang in ("nl", "it") for init in WERS]
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    monkeypatch.setattr(terminal, "printer", lambda: console)
    report_on(tmp_path, cells)
    text = console.export_text()
    rows = [line for line in text.splitlines() if re.search(r"\b(it|nl)\b.*40\.0", line)]
    assert rows and max(map(len, rows)) <= width
    assert re.search(r"\bit\W+(8min\W+)?en\W+(1\W+)?40\.0", text), "a row stands in one line"


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [make_cell(tmp_path, "nl", "en"), make_cell(tmp_path, "nl", "ml", lost=3)]
    cells.append(cells[0] | {"seed": 7, "experiment": "egs/nl/exp/none"})
    results = report_on(tmp_path, cells, ("nl ml 8min seed 1 failed: no [bold] space",))
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
        write.write_report(tmp_path, tmp_path)


def add_utterances(root: Path) -> None:
    """Gives every result recognised utterances of its WER: 20 of ten words, two a speaker."""
    for path in root.rglob("wer.json"):
        errors = round(2 * json.loads(path.read_text())["wer"])
        lines = []
        for number in range(20):
            wrong = errors // 20 + (number < errors % 20)
            words = [f"w{n}" for n in range(10)]
            hyp = " ".join(["x"] * wrong + words[wrong:])
            row = {"id": f"u{number:02d}", "speaker": f"s{number // 2}", "ref": " ".join(words)}
            odd = number == 7 and "torch" in path.parent.name  # one utterance, heard otherwise
            lines.append(json.dumps(row | {"hyp": hyp, "tokens": [number, int(odd)]}))
        path.with_name("recogs.jsonl").write_text("\n".join(lines) + "\n")


class Page(HTMLParser):
    """What a browser would load, the ids, and the tags that were opened and not closed."""

    VOID = ("meta", "path", "use", "rect", "line", "circle", "stop")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.ids, self.open, self.links = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.loaded += [found[key] for key in ("src", "xlink:href", "data") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a sweep with utterances."""
    root = tmp_path_factory.mktemp("full")
    cells = [make_cell(root, lang, init) for lang in ("nl", "it") for init in WERS]
    add_utterances(root)
    return report_on(root, cells)


def test_the_page_needs_no_other_file(full: Path) -> None:
    text = (full / "report.html").read_text()
    found = Page(text)
    assert not found.open
    assert all(target.startswith("#") for target in found.loaded)
    assert "url(http" not in text and "<script" not in text and "<link" not in text
    assert len(found.ids) == len(set(found.ids))
    assert all((full / target).is_file() for target in found.links)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_answer_comes_first(full: Path) -> None:
    text = (full / "report.md").read_text()
    first, second = text.split("\n\n")[1:3]
    assert first == "**Start from ML for Italian and Dutch.**"
    assert "mean of 2 languages): 8min +5.00" in second
    assert "int8 changes WER by +1.00" in second
    assert "4.0 times smaller" in second
    assert "This is a miniature, of at most 8min" in second
    html = (full / "report.html").read_text()
    assert html.index("<strong>Start from ML for") < html.index("<svg")


def test_markdown_and_page_say_the_same(full: Path) -> None:
    markdown = (full / "report.md").read_text()
    text = re.sub(r"<svg.*?</svg>", "", (full / "report.html").read_text(), flags=re.DOTALL)
    headings = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert re.findall(r"<h2>(.*?)</h2>", text) == headings
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert text.count("<tr><td") == len(lines) - 2 * text.count("<table>")
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        ElementTree.parse(full / figure)


def test_what_is_not_ours_is_labelled(full: Path) -> None:
    text = (full / "report.md").read_text()
    part = text[text.index("## Beside the published trend") :].split("\n## ")[0]
    assert "Published elsewhere, on another architecture and other data" in part
    assert "not a result of this sweep" in part
    assert "hours^-0.95, 0.52 per doubling; two points fix such a law and cannot test it" in part
    assert "| gap, points | 100h +4.21, 2500h +0.20 | 8min +5.00" in part
    assert "about 3 times smaller, about +0.5 WER points" in part


def test_figures_are_labelled_and_follow_the_page(full: Path) -> None:
    files = sorted((full / "figures").glob("*.svg"))
    assert {path.stem for path in files} >= {
        *("gap-slots-160", "gap-slots-offline", "tiers-slots", "precisions", "published"),
        *("languages-slots", "language-nl-slots", "language-it-slots", "curve-slots-160"),
    }
    for path in files:
        svg = path.read_text()
        labels = "".join(ElementTree.fromstring(svg).itertext())
        assert any(unit in labels for unit in ("points", "WER, %"))
        assert any(unit in labels for unit in ("training data, minutes", "hours", "chunk, ms"))
        assert "--ink: #e4e4e4" in svg, "has colours for a dark background"
        assert "#010203" not in svg and "var(--ink, #222222)" in svg
    panel = "".join(ElementTree.parse(full / "figures" / "published.svg").getroot().itertext())
    assert "published elsewhere" in panel


def result(init: str, wer: float, **more: object) -> dict:
    return {
        **{"language": "nl", "init": init, "hours": 1.0, "test_set": "t", "chunk_ms": 160},
        **{"precision": "fp32", "wer": wer, "cer": wer / 2, "engine": "sherpa", "seed": 1},
        **more,
    }


def test_best_is_bold_and_ties_are_marked() -> None:
    rows = [result("en", 30.0), result("ml", 28.0, wer_ci_low=27.0, wer_ci_high=29.4)]
    point = {"test_set": "t", "precision": "fp32", "chunk_ms": 160, "hours": 1.0, "language": "nl"}
    for low, mark in ((-0.5, " ≈"), (0.5, "")):
        analysis = {"language_gap": [point | {"gap": 2.0, "ci_low": low, "ci_high": 4.0}]}
        (table,) = tables.error_tables(rows, analysis, bold=True).values()
        assert [line[-1] for line in table[1]] == [
            f"30.0 / 15.0{mark}",
            f"**28.0** ± 1.2 / 14.0{mark}",
        ]
    (table,) = tables.error_tables(rows[:1], None, bold=True).values()
    assert table[1][0][-1] == "30.0 / 15.0", "nothing to be better than"


def test_a_language_scored_by_characters_has_its_cer_alone() -> None:
    rows = [result("ml", 28.0, unit="character", wer_ci_low=27.0, wer_ci_high=29.4)]
    (table,) = tables.error_tables(rows, None, bold=False).values()
    assert table[1][0][-1] == "CER 28.0 ± 1.2"
    said = tables.remarks([row | {"failed": 0, "recogs": ""} for row in rows], Path())
    assert said[0].startswith("The script of nl has no spaces") and "is the CER" in said[0]


def test_a_collapsed_result_is_marked_and_gives_no_control() -> None:
    silent = {"errors": 97, "deletions": 90, "words": 100, "failed": 0}
    rows = [result("ml", 30.0, failed=0), result("random", 97.0, **silent)]
    (table,) = tables.error_tables(rows, None, bold=False).values()
    assert [line[-1] for line in table[1]] == ["30.0 / 15.0", "97.0 / 48.5 †"]
    (said,) = tables.remarks(rows, Path())
    assert said.startswith("Random initialisation has not begun to recognise anything at 1h ")
    rows[1] |= {"wer": 80.0}
    (said,) = tables.remarks(rows, Path())
    assert "ml by +50.0 points at 1h" in said


def test_intervals_and_cost_are_reported(full: Path) -> None:
    tree = json.loads((full / "report.json").read_text())
    for row in tree["results"]:
        if row["engine"] == "sherpa":
            assert row["wer_ci_low"] <= row["wer"] <= row["wer_ci_high"]
    same = "The same tokens from sherpa and torch in 456 of 480 decoded utterances"
    assert any(same in remark for remark in tree["remarks"])
    assert len(tree["costs"]) == 6
    training = {"train": {"seconds": 5400, "device": "cuda:0", "steps": [100, 200]}}
    folder = full / "cell"
    folder.mkdir()
    (folder / "provenance.json").write_text(json.dumps(training))
    cell = {"language": "nl", "init": "ml", "hours": 1, "seed": 1}
    cost = write._cost(cell, folder, [{"rtf": 0.5, "audio_seconds": 7200}])
    (line,) = tables.cost_table([cost])[1]
    assert line[4:] == ["cuda:0", "1.500", "1.000", "its last part, from step 100"]


def test_publishing(full: Path, tmp_path: Path) -> None:
    target = tmp_path / "RESULTS.md"
    write.publish(full, target)
    folder = tmp_path / write.PUBLISHED_DATA
    text = target.read_text()
    tree = json.loads((folder / "report.json").read_text())
    assert write.published_markdown(tree) == text
    assert "recogs" not in tree["results"][0]
    for place in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / place).is_file()
    lines = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(lines) == len(tree["results"])
    # what is published can be analysed again, without its utterances
    assert page.to_html(document(tree, "")).count("<svg") == len(list(folder.glob("*.svg")))
    (full / "holes").mkdir()
    (full / "holes" / "report.json").write_text(json.dumps(tree | {"missing": ["a cell"]}))
    with pytest.raises(ValueError, match="not to be published with 1 holes"):
        write.publish(full / "holes", target)
    with pytest.raises(ValueError, match="without --publish first"):
        write.publish(tmp_path, target)


def test_wer_against_the_latency_of_words_by_tier_and_delay_penalty() -> None:
    def heard(penalty: float, chunk_ms: int, latency: float | None, wer: float) -> dict:
        of_tier = {"chunk_ms": chunk_ms, "delay_penalty": penalty, "latency_ms_median": latency}
        return result("ml", wer, **of_tier)

    rows = [heard(0.0, 160, 480.0, 20.0), heard(0.0, 640, 800.0, 17.0), heard(0.0, -1, None, 15.0)]
    rows += [heard(0.05, 160, 400.0, 21.0), heard(0.05, 160, 420.0, 23.0) | {"seed": 2}]
    rows.append(heard(0.05, 640, 730.0, 18.0) | {"precision": "int8"})
    (drawing,) = _latency_drawings(rows)
    assert drawing.name == "latency-t"
    root = ElementTree.fromstring(drawing.svg)
    labels = [text for text in root.itertext() if text.strip()]
    assert labels.count("160") >= 2 and labels.count("640") >= 1 and "offline" not in labels
    assert {"delay penalty", "none", "0.05"} <= {*labels}
    lines = [path for path in root.iter() if path.tag.endswith("path")]
    assert any(path.get("style", "").count("stroke: var(--series-1") for path in lines)
    assert _latency_drawings([heard(0.0, -1, None, 15.0)]) == []
