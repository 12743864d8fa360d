"""Intervals and tests of word error rates, on made-up recognition results."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from icetransfer.analysis import significance
from icetransfer.analysis.significance import Utterances


def made_up(errors: np.ndarray, words: float = 10, per_cluster: int = 1) -> Utterances:
    """A test set of utterances of `words` words, `per_cluster` to a speaker."""
    count = len(errors)
    clusters = np.arange(count) // per_cluster
    unit = "utterance" if per_cluster == 1 else "speaker"
    ids = tuple(f"u{i:04d}" for i in range(count))
    return Utterances(ids, errors.astype(float), np.full(count, float(words)), clusters, unit)


def write_recogs(path: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    names = ("id", "speaker", "ref", "hyp")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_the_interval_is_that_of_theory() -> None:
    rng = np.random.default_rng(0)
    errors = rng.binomial(10, 0.2, 600)
    low, high = significance.wer_interval(made_up(errors))
    width = 2 * 1.96 * 10 * errors.std() / math.sqrt(600)
    assert high - low == pytest.approx(width, rel=0.06)
    assert low < 10 * errors.mean() < high


@pytest.mark.parametrize(("speakers", "floor"), [(100, 0.91), (5, 0.90)])
def test_intervals_over_speakers_cover_the_truth(speakers: int, floor: float) -> None:
    """Speakers differ from one another: what is drawn must be speakers, be they few or many."""
    rng = np.random.default_rng(speakers)
    each, covered, naive = 6, 0, 0
    for _ in range(300):
        rate = rng.beta(4, 16, speakers).repeat(each)  # a mean WER of 20 %
        errors = rng.binomial(10, rate)
        low, high = significance.wer_interval(made_up(errors, per_cluster=each))
        covered += low <= 20 <= high
        low, high = significance.wer_interval(made_up(errors))
        naive += low <= 20 <= high
    assert floor < covered / 300 < 0.985
    assert naive / 300 < 0.85, "utterances drawn one by one would have been too sure"


def test_matched_pairs_errs_at_its_rate_and_sees_a_difference() -> None:
    rng = np.random.default_rng(3)
    wrongly = rightly = 0
    for _ in range(400):
        hard = rng.beta(2, 8, 300)
        first, same, better = (rng.binomial(10, hard * scale) for scale in (1, 1, 0.85))
        wrongly += significance.matched_pairs(first - same) < 0.05
        rightly += significance.matched_pairs(first - better) < 0.05
    assert 0.025 < wrongly / 400 < 0.08
    assert rightly / 400 > 0.8


def test_matched_pairs_is_a_t_test_of_the_differences() -> None:
    differences = np.array([1.0, 0, 0, 2, -1, 0, 3])
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert significance.matched_pairs(differences) == pytest.approx(expected)
    assert significance.matched_pairs(np.zeros(5)) == 1
    assert significance.matched_pairs(np.ones(5)) == 0


def test_the_paired_interval_is_narrower_than_the_two_alone() -> None:
    rng = np.random.default_rng(5)
    shared = rng.binomial(8, 0.3, 600)
    first = made_up(shared + (rng.random(600) < 0.1))
    second = made_up(shared)
    found = significance.compare(first, second)
    assert found.winner == 1
    assert found.low > 0.5
    assert found.second_better == 1
    assert found.high - found.low < (found.intervals[0][1] - found.intervals[0][0]) / 2
    swapped = significance.compare(second, first)
    assert swapped.winner == 0
    assert swapped.low == pytest.approx(-found.high)
    same = significance.compare(first, first)
    assert (same.winner, same.difference, same.p_value, same.second_better) == (None, 0, 1, 0.5)


def test_clusters() -> None:
    speakers = ["a", "a", "b", "b"]
    labels, unit = significance.cluster(speakers, ["w", "x", "y", "z"])
    assert (labels.tolist(), unit) == ([0, 0, 1, 1], "speaker")
    labels, unit = significance.cluster(speakers, ["w", "x", "w", "x"])
    assert (labels.tolist(), unit) == ([0, 1, 0, 1], "sentence")
    # a short answer that several gave by chance does not make it a corpus of read sentences
    assert significance.cluster(speakers, ["yes", "x", "yes", "z"])[1] == "speaker"
    for unknown in ("", "unknown"):
        labels, unit = significance.cluster([unknown] * 3, ["w", "x", "y"])
        assert (sorted(labels.tolist()), unit) == ([0, 1, 2], "utterance")
        assert significance.cluster([unknown] * 4, ["w", "w", "x", "x"])[1] == "sentence"
    assert significance.cluster(["a"] * 3, ["w", "x", "y"])[1] == "utterance"


def test_recogs_are_read_and_compared(tmp_path: Path) -> None:
    rows = [(f"u{i}", f"s{i // 4}", "een twee drie", "een twee drie") for i in range(48)]
    good = write_recogs(tmp_path / "good.jsonl", rows)
    worse = [(*row[:3], "een twee" if i % 2 else row[3]) for i, row in enumerate(rows)]
    bad = write_recogs(tmp_path / "bad.jsonl", worse[::-1])
    command = [sys.executable, "-m", "icetransfer.score", "--compare", str(bad), str(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{bad}: WER 16.67 %" in done.stdout
    assert f"winner: {good}" in done.stdout
    assert "difference +16.67 points" in done.stdout
    assert "48 utterances, drawn by 12 speakers" in done.stdout
    write_recogs(tmp_path / "other.jsonl", rows[1:])
    done = subprocess.run([*command[:-1], str(tmp_path / "other.jsonl")], capture_output=True)
    assert done.returncode == 2
    assert b"1 utterances, 'u0' the first, are in one alone" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a"}\n', r"r.jsonl:1: KeyError\('ref'\)"),
        ("not json\n", "r.jsonl:1: JSONDecodeError"),
        ('{"id": "a", "ref": "", "hyp": "x"}\n', "no reference has a word"),
        ('{"id": "a", "ref": "x", "hyp": "x"}\n' * 2, "'a' stands twice"),
    ],
)
def test_broken_recogs_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        significance.read_utterances(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        significance.read_utterances(tmp_path / "none.jsonl")


def test_other_references_are_an_error() -> None:
    errors = np.ones(5)
    with pytest.raises(ValueError, match="'u0000' has 10 and 9 words"):
        significance.compare(made_up(errors), made_up(errors, words=9))
