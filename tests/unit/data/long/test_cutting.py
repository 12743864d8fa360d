"""Utterances of made-up readings: what is kept, what is not, and why."""

from __future__ import annotations

import pytest
from tests.unit.data.long.acting import NORMALIZER, Reading, make_tokenizer, read, sentences

from icetransfer.data.long.cutting import Cutter, Limits, Piece
from icetransfer.data.long.words import read_long_text
from icetransfer.long_recordings import align

TOKENIZER = make_tokenizer()
LIMITS = Limits(2.0, 20.0, 0.4)


def cut(reading: Reading, text: str, limits: Limits = LIMITS) -> list[Piece]:
    heard, names = reading.heard, TOKENIZER.tokens
    long_text = read_long_text(text, NORMALIZER, TOKENIZER, "a text")
    return Cutter(heard, long_text, align(heard, long_text, names), limits, names, " ")()


def kept(pieces: list[Piece]) -> str:
    return " ".join(piece.text for piece in pieces if not piece.reason)


def inside(pieces: list[Piece], reading: Reading, number: int) -> bool:
    """Whether a part of the reading lies in an utterance, with a part of the pauses around it."""
    begin, end = reading.times[number]
    return any(p.start < begin and end < p.end for p in pieces if not p.reason)


def test_all_of_a_text_that_was_read() -> None:
    said = sentences(60)
    reading = read(TOKENIZER, said)
    pieces = cut(reading, "\n".join(said))
    assert kept(pieces) == " ".join(said)
    utterances = [piece for piece in pieces if not piece.reason]
    assert pieces == utterances
    assert all(2 <= piece.end - piece.start <= 20 for piece in utterances)
    assert all(inside(pieces, reading, number) for number in range(60))
    # A cut is between two sentences, in the pause between them.
    assert all(piece.text[0] == "D" and piece.text[-1] == "." for piece in utterances)
    ends = [(b.end, a.start) for b, a in zip(utterances, utterances[1:], strict=False)]
    assert all(0 <= after - before < 0.5 for before, after in ends)
