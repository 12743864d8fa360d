"""Figures of a look at the data, in the style of the report's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icetransfer.analysis.gap_report import COLOURS
from icetransfer.data.survey.findings import Findings
from icetransfer.report.figures import INK, Figure
from icetransfer.report.page import Drawing

_BINS = 30
_CHARACTERS = 40
_POINTS = 700  # of a cloud: more make the page large and no clearer
_EDGE = 0.1  # percent of utterances beyond each end of an axis
_SPLIT_COLOURS = {"train": COLOURS[0], "dev": COLOURS[4], "test": COLOURS[1]}


def drawings(findings: Findings) -> list[Drawing]:
    """All figures; those without data are left out."""
    survey = findings.survey
    found = [
        Drawing(
            "lengths",
            _distribution(findings, survey.seconds.astype(np.float64), "seconds"),
            "Length of the utterances, as a share of their split",
        ),
        Drawing(
            "rates",
            _distribution(findings, survey.rates(), "characters a second"),
            "Speaking rate, without spaces, as a share of the split",
        ),
        Drawing("cloud", _cloud(findings), "Text against audio; crosses are likely mismatches"),
    ]
    _, seconds = findings.seconds_by_speaker()
    if len(seconds) > 1:
        found.append(
            Drawing("speakers", _speakers(seconds), "Training speech of each speaker, most first")
        )
    found.append(Drawing("letters", _letters(findings), "Characters of the training text"))
    if findings.recognised:
        found.append(Drawing("cer", _cer(findings), "CER of the model on each training utterance"))
    return found


def _distribution(findings: Findings, values: NDArray[np.float64], label: str) -> str:
    low, high = np.percentile(values, [_EDGE, 100 - _EDGE])
    edges = np.linspace(low, max(high, low + 1e-3), _BINS + 1)
    figure = Figure(f"{label}")
    with figure as axes:
        for split, colour in _SPLIT_COLOURS.items():
            rows = findings.survey.rows_of(split)
            if len(rows):
                counts, _ = np.histogram(np.clip(values[rows], low, high), edges)
                axes.stairs(100 * counts / len(rows), edges, color=colour, label=split, lw=1.6)
        axes.set_ylabel("utterances, %")
        axes.set_xlabel(label)
    return figure.svg


def _cloud(findings: Findings) -> str:
    """Characters against seconds: a spread sample, and the suspects."""
    survey = findings.survey
    sample = np.unique(np.linspace(0, len(survey) - 1, _POINTS).astype(np.int64))
    suspects = findings.suspects[:_POINTS]
    figure = Figure("text against audio")
    with figure as axes:
        axes.plot(
            survey.seconds[sample], survey.characters[sample], ".", color=COLOURS[0], ms=3,
            label="utterance",
        )  # fmt: skip
        axes.plot(
            survey.seconds[suspects], survey.characters[suspects], "x", color=COLOURS[1], ms=6,
            label="likely mismatch",
        )  # fmt: skip
        axes.set_xlabel("seconds")
        axes.set_ylabel("characters")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return figure.svg


def _speakers(seconds: NDArray[np.float64]) -> str:
    figure = Figure("speech by speaker")
    with figure as axes:
        ranks = np.arange(1, len(seconds) + 1)
        shown = np.unique(np.geomspace(1, len(seconds), _POINTS).astype(np.int64)) - 1
        axes.plot(ranks[shown], seconds[shown] / 60, ".-", color=COLOURS[0], ms=4)
        axes.set_xlabel("speaker, by rank")
        axes.set_ylabel("minutes")
        axes.set_ylim(bottom=0)
        if len(seconds) > 20:
            axes.set_xscale("log")
    return figure.svg


def _letters(findings: Findings) -> str:
    """The most frequent characters as bars on a log scale."""
    counts: dict[str, int] = {}
    for letters, manifest in zip(findings.survey.letters, findings.survey.manifests, strict=True):
        if manifest.split == "train":
            for char, count in letters.counts.items():
                counts[char] = counts.get(char, 0) + count
    counts.pop(" ", None)
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_CHARACTERS]
    figure = Figure(
        "characters" if len(counts) <= _CHARACTERS else f"the {_CHARACTERS} most frequent"
    )
    with figure as axes:
        places = range(len(shown))
        axes.bar(places, [count for _, count in shown], color=COLOURS[0])
        axes.set_yscale("log")
        # A character that fonts lack is drawn by the reader's browser: the SVG holds text.
        axes.set_xticks(places, [char for char, _ in shown], fontsize=8)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("times")
    return figure.svg


def _cer(findings: Findings) -> str:
    known = findings.cers[~np.isnan(findings.cers)]
    figure = Figure("CER of the training utterances")
    with figure as axes:
        counts, edges = np.histogram(np.clip(known, 0, 120), _BINS)
        axes.stairs(100 * counts / len(known), edges, color=COLOURS[0], fill=True)
        axes.axvline(findings.cer_limit, color=INK, lw=0.8, ls="--", label="limit")
        axes.set_xlabel("CER, %, up to 120")
        axes.set_ylabel("utterances, %")
    return figure.svg
