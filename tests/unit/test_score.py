"""Error rates, errs.txt and the table of results."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from icetransfer import score
from icetransfer.config import Config, load_config
from icetransfer.experiment import Experiment, create_experiment


def row(key: str, ref: str, hyp: str, failed: str | None = None) -> score.Row:
    return {
        "id": key,
        "speaker": "s",
        "ref": ref,
        "hyp": hyp,
        "raw_ref": f"{ref.capitalize()}.",
        "raw_hyp": hyp,
        "audio_seconds": 1.0,
        "tokens": [],
        "timestamps": [],
        "failed": failed,
    }


ROWS = [
    row("a", "een twee drie", "een drie vier"),
    row("b", "vijf", "vijf"),
    row("c", "zes zeven", "", failed="c.flac: not a sound file"),
]


def test_word_and_character_errors() -> None:
    words = score.word_errors(ROWS)
    assert (words.insertions, words.deletions, words.substitutions) == (1, 3, 0)
    assert words.errors == 4 and words.length == 6
    assert words.rate == pytest.approx(100 * 4 / 6)
    characters = score.character_errors(ROWS[1:])
    assert (characters.deletions, characters.length) == (9, 13)
    raw = score.raw_word_errors(ROWS)  # Een, twee and drie. are wrong, Vijf. is, two are missing
    assert (raw.errors, raw.length) == (6, 6)


def test_no_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="every reference is empty"):
        score.word_errors([row("a", "", "iets")])


def test_errors_text_shows_failures_and_alignments() -> None:
    text = score.errors_text(ROWS, "nl torch")
    assert text.startswith("nl torch\n")
    assert "WER 66.67 %: 4 errors in 6 words (1 insertions, 3 deletions" in text
    assert "failed recordings: 1\n  c: c.flac: not a sound file" in text
    assert "  ref: een TWEE drie *\n  hyp: een *    drie VIER" in text


def experiment(tmp_path: Path) -> Experiment:
    tree = {
        "language": "nl",
        "data": {"corpora": {"toy": {"kind": "synthetic"}}},
        "decode": {"engines": ["torch", "sherpa"], "chunk_sizes": [16, -1]},
    }
    return Experiment(tmp_path, Config.model_validate(tree))


def test_engines_that_disagree_are_counted(tmp_path: Path) -> None:
    toy = experiment(tmp_path)
    for run in score.planned_runs(toy.config):
        folder = run.folder(toy.decode_dir)
        folder.mkdir(parents=True)
        last = 9 if (run.engine, run.precision, run.chunk_size) == ("sherpa", "fp32", 16) else 3
        rows = [{"id": "a", "tokens": [1, 2]}, {"id": "b", "tokens": [last]}]
        (folder / "recogs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert len(score.agreement(toy, full=False)) == 2, "they do not agree"
    assert score.agreement(toy) == [
        "toy, fp32, 320 ms (+130 ms look-ahead): the same tokens from sherpa, torch in 1 of 2 "
        "utterances",
        "toy, fp32, offline: the same tokens from sherpa, torch in 2 of 2 utterances",
    ]


def test_planned_runs_and_their_folders(tmp_path: Path) -> None:
    runs = score.planned_runs(experiment(tmp_path).config)
    names = [str(run.folder(Path("decode"))) for run in runs]
    assert names == [
        "decode/toy/torch-fp32-chunk-16-left-128-greedy_search",
        "decode/toy/torch-fp32-offline-greedy_search",
        "decode/toy/sherpa-fp32-chunk-16-left-128-greedy_search",
        "decode/toy/sherpa-fp32-offline-greedy_search",
        "decode/toy/sherpa-int8-chunk-16-left-128-greedy_search",
        "decode/toy/sherpa-int8-offline-greedy_search",
    ]


def test_the_table_names_what_failed_and_what_is_missing(tmp_path: Path) -> None:
    toy = experiment(tmp_path)
    for run in score.planned_runs(toy.config)[1:]:
        folder = run.folder(toy.decode_dir)
        folder.mkdir(parents=True)
        numbers = {"wer": 12.345, "cer": 6.0, "failed": 3, "rtf": 0.01, "model_bytes": 2500000}
        counts = dict.fromkeys(("insertions", "deletions", "substitutions", "words"), 7)
        (folder / "wer.json").write_text(json.dumps(run.__dict__ | numbers | counts))
    decoded = score.planned_runs(toy.config)[1].folder(toy.decode_dir)
    rows = [{"id": str(i), "ref": "a b", "hyp": "a x" if i % 2 else "a b"} for i in range(40)]
    (decoded / "recogs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table, missing = score.results_table(toy)
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    text = console.export_text()
    assert missing == 1 and text.count("not decoded") == 1
    assert text.count("12.35") + text.count("12.34") == 5
    # 25 % of the words, wrong in half of 40 utterances: 1.96 * 25 / sqrt(40) = 7.7 to either side
    low, high = map(float, re.search(r"([0-9.]+) to ([0-9.]+)", text).groups())
    assert low == pytest.approx(25 - 7.7, abs=1) and high == pytest.approx(25 + 7.7, abs=1)
    assert "320 ms (+130 ms look-ahead)" in text and "offline" in text


def test_the_short_table_fits_a_terminal(tmp_path: Path) -> None:
    toy = experiment(tmp_path)
    tiers = {"chunk_sizes": (8, 16, 32, -1)}
    config = toy.config.model_copy(update={"decode": toy.config.decode.model_copy(update=tiers)})
    toy = Experiment(tmp_path, config)
    rows = [{"id": str(i), "ref": "a b", "hyp": "a x" if i % 2 else "a b"} for i in range(40)]
    for number, run in enumerate(score.planned_runs(config)[1:]):
        folder = run.folder(toy.decode_dir)
        folder.mkdir(parents=True)
        numbers = {"wer": 98.765, "cer": 6.0, "failed": int(number == 0), "rtf": 0.01}
        counts = dict.fromkeys(("insertions", "deletions", "substitutions", "words"), 7)
        tree = run.__dict__ | numbers | counts | {"model_bytes": 2500000}
        (folder / "wer.json").write_text(json.dumps(tree))
        (folder / "recogs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table, missing = score.short_table(toy)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    assert missing == 1 and max(map(len, lines)) <= 80
    heads = next(line for line in lines if "test set" in line)
    assert re.sub(r" {2,}", "|", heads.strip()) == (
        "test set|precision|engine|160 ms|320 ms|640 ms|offline"
    )
    (torch,) = [line for line in lines if "torch" in line]
    assert re.fullmatch(r"toy +fp32 +torch +– +98\.8 ±7\.\d !( +98\.8 ±7\.\d){2}", torch)
    assert len([line for line in lines if "toy " in line]) == 3, "a line each"


def test_of_characters_the_table_shows_cer_and_no_wer(tmp_path: Path) -> None:
    toy = experiment(tmp_path)
    run = score.planned_runs(toy.config)[0]
    folder = run.folder(toy.decode_dir)
    folder.mkdir(parents=True)
    numbers = {"wer": 6.0, "cer": 6.0, "failed": 0, "rtf": 0.01, "model_bytes": 1, "words": 7}
    counts = dict.fromkeys(("insertions", "deletions", "substitutions"), 7)
    row = run.__dict__ | numbers | counts | {"unit": "character"}
    (folder / "wer.json").write_text(json.dumps(row))
    names = [str(column.header) for column in score.results_table(toy)[0].columns]
    assert names[5] == "CER %" and "characters" in names
    assert "WER %" not in names and "words" not in names


def test_a_precision_that_costs_too_much_is_told_with_its_numbers(tmp_path: Path) -> None:
    toy = experiment(tmp_path)
    wers = {"fp32": {16: 10.0, -1: 8.0}, "int8": {16: 10.31, -1: 8.29}}  # the margin is 0.3
    for run in score.planned_runs(toy.config):
        folder = run.folder(toy.decode_dir)
        folder.mkdir(parents=True)
        result = {"wer": wers[run.precision][run.chunk_size], "words": 500}
        (folder / "wer.json").write_text(json.dumps(result))
    (line,) = score.costs_above_margin(toy)
    assert line.startswith("toy, sherpa, 320 ms (+130 ms look-ahead): int8 costs 0.31 WER points")
    assert "(10.31 against 10.00, 500 words), more than 0.3; python -m icetransfer.remedy" in line


def test_a_model_that_says_next_to_nothing_is_named(tmp_path: Path) -> None:
    toy = experiment(tmp_path)
    counts = {  # wer, errors, deletions
        "fp32": {
            16: (96.7, 578, 454),
            -1: (96.7, 578, 200),
        },  # mostly others: it speaks, if wrongly
        "int8": {16: (90.0, 538, 500), -1: (3.3, 20, 19)},
    }
    for run in score.planned_runs(toy.config):
        folder = run.folder(toy.decode_dir)
        folder.mkdir(parents=True)
        values = counts[run.precision][run.chunk_size]
        result = dict(zip(("wer", "errors", "deletions"), values, strict=True))
        (folder / "wer.json").write_text(json.dumps(result))
    assert score.collapsed_results(toy) == [
        "toy, sherpa, fp32, 320 ms (+130 ms look-ahead)",
        "toy, torch, fp32, 320 ms (+130 ms look-ahead)",
    ]


def test_scoring_starts_without_torch() -> None:
    code = "import sys, icetransfer.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_read_only_experiment_is_scored_to_standard_output(small_disk: Path) -> None:
    words = ["language=nl", "data.corpora={a: {kind: folder, path: x}}"]
    experiment = create_experiment(
        small_disk / "exp", load_config([], [*words, f"data.dir={small_disk / 'data'}"])
    )
    before = sorted(small_disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    command = [sys.executable, "-m", "icetransfer.score", "--exp", str(experiment.dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "–" in done.stdout and sorted(small_disk.rglob("*")) == before
    assert "score.log is not written (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr
