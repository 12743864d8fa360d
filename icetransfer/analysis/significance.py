"""How sure a word error rate is, and which of two systems on one test set is the better one.

Utterances of one speaker, or of one sentence read by several, go wrong together, so they are drawn
together: a bootstrap over clusters (Bisani and Ney 2004, "Bootstrap estimates for confidence
intervals in ASR performance evaluation"; Davison and Hinkley 1997, section 3.8).  Two systems are
compared on the same draws, and by a matched-pairs test on the differences of their errors (Gillick
and Cox 1989, "Some statistical issues in the comparison of speech recognition algorithms").

Shapes: U utterances, K clusters, R resamples.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import kaldialign
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from icetransfer.stage.text import read_text

RESAMPLES = 2000
CONFIDENCE = 95  # percent
SEED = 1
UNKNOWN = ("", "unknown")  # a speaker of whom nothing is known; see data/corpora.py
LEVEL = 1 - CONFIDENCE / 100  # of tests
NORMAL = float(stats.norm.ppf(0.5 + CONFIDENCE / 200))

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Utterances:
    """What is known of each utterance of a test set as one system recognised it.

    Attributes:
        ids: sorted, (U,).
        errors: insertions, deletions and substitutions, (U,).
        words: of the reference, (U,).
        clusters: the cluster of each, 0 to K - 1, (U,).
        unit: what a cluster is: "speaker", "sentence" or "utterance".
    """

    ids: tuple[str, ...]
    errors: Array
    words: Array
    clusters: NDArray[np.int64]
    unit: str

    @property
    def count(self) -> int:
        """K, the number of clusters."""
        return int(self.clusters.max()) + 1

    @property
    def wer(self) -> float:
        """In percent, over all utterances together."""
        return float(100 * self.errors.sum() / self.words.sum())

    def by_cluster(self, values: Array) -> Array:
        """Sums (U,) over clusters to (K,)."""
        sums: Array = np.bincount(self.clusters, values, self.count).astype(np.float64)
        return sums


def read_utterances(path: Path) -> Utterances:
    """Reads a recogs.jsonl and counts the errors of each utterance.

    Raises:
        ValueError: the file is missing, broken or empty, or an utterance stands twice.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; stage 9 (decode) writes it")
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path)), 1):
        try:
            row = json.loads(line)
            texts = [row[key] for key in ("id", "ref", "hyp")] + [row.get("speaker") or ""]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"{texts} are not all texts")
            rows.append((texts[0], texts[3], texts[1], texts[2]))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number}: {error!r}; expected an object with id, ref and hyp"
            ) from None
    return make_utterances(sorted(rows), str(path))


def make_utterances(rows: Sequence[tuple[str, str, str, str]], where: str) -> Utterances:
    """Counts the errors of (id, speaker, reference, hypothesis) rows, sorted by id.

    Raises:
        ValueError: there is no reference word, or an id stands twice.
    """
    ids = tuple(row[0] for row in rows)
    twice = [first for first, second in itertools.pairwise(ids) if first == second]
    if twice:
        raise ValueError(f"{where}: utterance {twice[0]!r} stands twice")
    refs = [row[2].split() for row in rows]
    words = np.array([len(ref) for ref in refs], np.float64)
    if not words.any():
        raise ValueError(f"{where}: no reference has a word, so there is no word error rate")
    pairs = zip(refs, rows, strict=True)
    errors = [kaldialign.edit_distance(ref, row[3].split())["total"] for ref, row in pairs]
    clusters, unit = cluster([row[1] for row in rows], [row[2] for row in rows])
    return Utterances(ids, np.array(errors, np.float64), words, clusters, unit)


def cluster(speakers: Sequence[str], sentences: Sequence[str]) -> tuple[NDArray[np.int64], str]:
    """Groups utterances whose errors are not independent.

    By sentence where most utterances are of a sentence that several speakers read (FLEURS), else by
    speaker.  An unknown speaker counts as one more speaker, so without speakers utterances stand
    alone; so they do where a single speaker read all: nothing is known of others then.

    Returns:
        The cluster of each utterance, from 0, and what a cluster is.
    """
    alone = [f"utterance {number}" for number in range(len(speakers))]
    voices = [
        own if speaker in UNKNOWN else f"speaker {speaker}"
        for speaker, own in zip(speakers, alone, strict=True)
    ]
    readers = defaultdict(set)
    for voice, sentence in zip(voices, sentences, strict=True):
        readers[sentence].add(voice)
    shared = sum(len(readers[sentence]) > 1 for sentence in sentences)
    if shared > len(sentences) / 2 and len(readers) > 1:
        labels, unit = list(sentences), "sentence"
    elif 1 < len(set(voices)) < len(voices):
        labels, unit = voices, "speaker"
    else:
        labels, unit = alone, "utterance"
    return np.unique(np.array(labels), return_inverse=True)[1].astype(np.int64), unit


@lru_cache(maxsize=32)
def cluster_weights(count: int, resamples: int, seed: tuple[int, ...]) -> Array:
    """How often each cluster is drawn, (R, K); the same for the same arguments."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def student_factor(freedom: float) -> float:
    """By how much an interval must be wider because its width was itself estimated."""
    if math.isinf(freedom):
        return 1.0
    return float(stats.t.ppf(0.5 + CONFIDENCE / 200, max(freedom, 1))) / NORMAL


def small_sample_factor(count: int) -> float:
    """By how much resampled means of `count` things must be spread for their interval to hold.

    The bootstrap's variance is (K - 1) / K of the unbiased one, and its quantiles are the normal's
    where Student's with K - 1 degrees of freedom are due (Hesterberg 2015, section 4.3).  That is
    nothing to speak of for 100 clusters, and 1.9 for four speakers.
    """
    if count < 2:
        return 1.0
    return math.sqrt(count / (count - 1)) * student_factor(count - 1)


def resampled_wers(
    systems: Sequence[Utterances],
    resamples: int = RESAMPLES,
    seed: tuple[int, ...] = (SEED,),
) -> Array:
    """WERs in percent of systems on one test set, all over the same draws.

    Args:
        systems: of the same utterances.
        resamples: R.
        seed: equal seeds and numbers of clusters give equal draws.

    Returns:
        (len(systems), 1 + R): first the WER as it is, then the draws, spread as
        `small_sample_factor` says.
    """
    first = systems[0]
    words = first.by_cluster(first.words)
    errors = np.stack([s.by_cluster(s.errors) for s in systems], axis=1)  # (K, systems)
    weights = cluster_weights(first.count, resamples, seed)
    # a draw may hold nothing but empty references: no words, no rate, and no errors but insertions
    drawn = 100 * (weights @ errors).T / np.maximum(weights @ words, 1)
    exact = 100 * errors.sum(0)[:, None] / words.sum()
    result: Array = np.hstack([exact, exact + (drawn - exact) * small_sample_factor(first.count)])
    return result


def percentile_interval(draws: Array) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.percentile(draws, [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2])
    return float(low), float(high)


def wer_interval(utterances: Utterances) -> tuple[float, float] | None:
    """The interval of a WER, in percent; None where one cluster is all there is."""
    if utterances.count < 2:
        return None
    low, high = percentile_interval(resampled_wers([utterances])[0, 1:])
    return max(low, 0.0), high


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same utterances; differences are WER(first) - WER(second), in points."""

    wers: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    difference: float
    low: float
    high: float
    second_better: float  # share of resamples in which the second has fewer errors
    p_value: float  # matched pairs, two-sided
    utterances: int
    clusters: int
    unit: str

    @property
    def winner(self) -> int | None:
        """0 or 1, or None where the matched-pairs test does not tell them apart at 5 %."""
        if self.p_value >= LEVEL:
            return None
        return 1 if self.difference > 0 else 0


def matched_pairs(differences: Array) -> float:
    """The two-sided p-value of errors differing by nothing but chance.

    Gillick and Cox's test, whose segments are the clusters: independent of one another, though
    what lies within is not.  Student's distribution stands for the normal one: clusters may be few.

    Args:
        differences: errors of one system less those of the other, in each cluster, (K,).
    """
    spread = differences.std(ddof=1)
    if spread == 0:
        return 1.0 if differences[0] == 0 else 0.0
    statistic = differences.mean() / (spread / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(statistic), len(differences) - 1))


def compare(first: Utterances, second: Utterances) -> Comparison:
    """Compares two systems by a paired bootstrap and a matched-pairs test.

    Raises:
        ValueError: they are not of the same utterances, or there is one cluster only.
    """
    if first.ids != second.ids:
        odd = sorted(set(first.ids) ^ set(second.ids))
        raise ValueError(
            f"the two systems are not of the same test set: {len(odd)} utterances, {odd[0]!r} the "
            f"first, are in one alone"
        )
    other = np.flatnonzero(first.words != second.words)
    if other.size:
        raise ValueError(
            f"the two systems have other references: utterance {first.ids[other[0]]!r} has "
            f"{first.words[other[0]]:.0f} and {second.words[other[0]]:.0f} words"
        )
    if first.count < 2:
        raise ValueError("one utterance, speaker or sentence alone cannot tell two systems apart")
    draws = resampled_wers([first, second])
    delta = draws[0] - draws[1]
    low, high = percentile_interval(delta[1:])
    return Comparison(
        wers=(first.wer, second.wer),
        intervals=(percentile_interval(draws[0, 1:]), percentile_interval(draws[1, 1:])),
        difference=float(delta[0]),
        low=low,
        high=high,
        second_better=float((delta[1:] > 0).mean() + (delta[1:] == 0).mean() / 2),
        p_value=matched_pairs(first.by_cluster(first.errors - second.errors)),
        utterances=len(first.ids),
        clusters=first.count,
        unit=first.unit,
    )


def describe(comparison: Comparison, names: tuple[str, str]) -> str:
    """Says in a few lines who wins and how surely."""
    lines = []
    for name, wer, (low, high) in zip(names, comparison.wers, comparison.intervals, strict=True):
        lines.append(f"{name}: WER {wer:.2f} % [{low:.2f}, {high:.2f}]")
    lines.append(
        f"difference {comparison.difference:+.2f} points [{comparison.low:+.2f}, "
        f"{comparison.high:+.2f}]; the second is better in {100 * comparison.second_better:.1f} % "
        f"of {RESAMPLES} resamples; matched pairs p = {_probability(comparison.p_value)}"
    )
    plural = f"{comparison.unit}s"
    clusters = "" if plural == "utterances" else f", drawn by {comparison.clusters} {plural}"
    lines.append(
        f"{comparison.utterances} utterances{clusters}; brackets: {CONFIDENCE} % intervals"
    )
    if comparison.winner is None:
        lines.append("no winner: the difference may be chance (5 % level)")
    else:
        lines.append(f"winner: {names[comparison.winner]}")
    if comparison.clusters < 10:
        lines.append(f"few {plural}: the intervals and the test are rough")
    return "\n".join(lines)


def _probability(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
