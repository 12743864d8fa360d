"""Anchors between a transcript with errors and a text, and the sections between them."""

from __future__ import annotations

import random

from icetransfer.data.long.anchors import Run, runs, sections
from tests.unit.data.long.acting import NORMALIZER, sentences


def letters(texts: list[str]) -> str:
    return NORMALIZER(" ".join(texts)).replace(" ", "")


def with_errors(text: str, share: float, seed: int = 0) -> tuple[str, list[int]]:
    """A text with letters replaced, left out or added, and the place that each comes from."""
    rng = random.Random(seed)
    heard, places = "", []
    for place, letter in enumerate(text):
        kind = rng.random() / share
        new = (
            letter
            if kind > 1
            else ""
            if kind < 0.33
            else rng.choice("aeinrt") * (1 + (kind > 0.66))
        )
        heard += new
        places += [place] * len(new)
    return heard, places


def test_anchors_are_where_the_text_is() -> None:
    text = letters(sentences(200))
    heard, places = with_errors(text, 0.3)
    found = runs(heard, text)
    assert len(found) > 50
    right = [all(abs(places[r.heard + i] - r.text - i) < 3 for i in (0, r.size - 1)) for r in found]
    assert sum(right) >= 0.99 * len(found)


def test_no_anchors_in_the_text_of_another_recording() -> None:
    texts = sentences(120)
    heard, _ = with_errors(letters(texts[:60]), 0.3)
    assert len(runs(heard, letters(texts[60:]))) < 5
    assert runs("", "abc") == runs("abc", "") == []


def test_what_comes_again_and_again_is_no_anchor() -> None:
    refrain = "mijnheerdevoorzitterdamesenheren"
    parts = [letters([text]) for text in sentences(20)]
    text = refrain.join(parts)
    heard = refrain + text  # once more at the beginning
    assert all(run.heard - run.text == len(refrain) for run in runs(heard, text))


def test_sections_are_cut_between_entries_that_an_anchor_holds() -> None:
    frames = [*range(0, 200, 2)]  # of each letter
    found = [Run(8, 8, 10), Run(40, 40, 8), Run(95, 95, 5)]
    got = [*sections(found, frames, [10] * 10, range(10), 210, 15)]
    assert [tuple(section) for section in got] == [(0, 1, 0, 19), (1, 10, 19, 210)]
    assert len([*sections(found, frames, [10] * 10, [0] * 10, 210, 15)]) == 1  # all one phrase
    assert [*sections([], [], [10], [0], 50, 20)] == [(0, 1, 0, 50)]
