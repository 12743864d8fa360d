"""Utterances of made-up readings: what is kept, what is not, and why."""

from __future__ import annotations

import itertools

import pytest

from icetransfer.data.long.cutting import Cutter, Limits, Piece
from icetransfer.data.long.words import read_long_text
from icetransfer.long_recordings import align
from tests.unit.data.long.acting import NORMALIZER, Reading, make_tokenizer, read, sentences

TOKENIZER = make_tokenizer()
LIMITS = Limits(2.0, 20.0, 0.4)


def cut(reading: Reading, text: str, limits: Limits = LIMITS) -> list[Piece]:
    heard, names = reading.heard, TOKENIZER.tokens
    long_text = read_long_text(text, NORMALIZER, TOKENIZER, "a text")
    return Cutter(heard, long_text, align(heard, long_text, names), limits, names, " ")()


def kept(pieces: list[Piece]) -> str:
    return " ".join(piece.text for piece in pieces if not piece.reason)


def rejected(pieces: list[Piece]) -> dict[str, str]:
    """What is not kept, by its text, and why."""
    return {piece.text: piece.reason for piece in pieces if piece.reason}


def is_inside(pieces: list[Piece], reading: Reading, number: int) -> bool:
    """Whether a part of the reading lies in an utterance."""
    begin, end = reading.times[number]
    return any(p.start < begin and end < p.end for p in pieces if not p.reason)


def test_all_of_a_text_that_was_read() -> None:
    said = sentences(60)
    reading = read(TOKENIZER, said)
    pieces = cut(reading, "\n".join(said))
    assert kept(pieces) == " ".join(said)
    assert not rejected(pieces)
    assert all(2 <= piece.end - piece.start <= 20 for piece in pieces)
    assert all(is_inside(pieces, reading, number) for number in range(60))
    # A cut is between two sentences, in the pause between them.
    assert all(piece.text[0] == "D" and piece.text[-1] == "." for piece in pieces)
    assert all(0 <= b.start - a.end < 0.5 for a, b in itertools.pairwise(pieces))


def test_a_sentence_without_text_is_in_no_utterance() -> None:
    said = sentences(30)
    reading = read(TOKENIZER, said)
    pieces = cut(reading, "\n".join(said[:10] + said[11:]))
    assert kept(pieces) == " ".join(said[:10] + said[11:])
    (stray,) = (piece for piece in pieces if piece.reason)
    assert (stray.text, stray.reason) == ("", "speech without text")
    begin, end = reading.times[10]
    assert stray.start == pytest.approx(begin, abs=0.3)
    assert stray.end == pytest.approx(end, abs=0.3)
    assert "de" in stray.heard
    assert not is_inside(pieces, reading, 10)


def test_a_sentence_that_nobody_reads_is_listed_and_its_neighbours_are_kept() -> None:
    said = sentences(30)
    note = "Zie ook hoofdstuk zeventien over dit onderwerp."
    reading = read(TOKENIZER, said)
    pieces = cut(reading, "\n".join([*said[:10], note, *said[10:]]))
    assert kept(pieces) == " ".join(said)
    assert rejected(pieces) == {note: "not heard"}
    assert all(is_inside(pieces, reading, number) for number in range(30))


def test_a_jingle_a_title_and_a_licence() -> None:
    """What a reader of audio books says before, what a book has before, and what comes behind."""
    said, others = sentences(20), sentences(26)[20:]
    reading = Reading(TOKENIZER)
    for text in [*others[:3], *said, *others[3:]]:
        reading.say(text)
    title = "HET GROTE VERHAAL\n\nUitgave van negentienhonderd acht.\n\n"
    pieces = cut(reading, title + " ".join(said))
    assert kept(pieces) == " ".join(said)
    assert all(is_inside(pieces, reading, number) for number in range(3, 23))
    assert not any(is_inside(pieces, reading, number) for number in (0, 1, 2, 23, 24, 25))


def test_nothing_of_the_text_of_another_recording_is_kept() -> None:
    texts = sentences(40)
    other = [" ".join(word[::-1] for word in text.strip(".").split()) for text in texts]
    pieces = cut(read(TOKENIZER, texts), "\n".join(other))
    assert not kept(pieces)
    written = " ".join(piece.text for piece in pieces if piece.text)
    assert written == " ".join(other)  # every word has its line


def test_a_text_that_is_much_longer_than_the_recording() -> None:
    """The first sentence may be lost among all those before it."""
    texts = sentences(80)
    found = kept(cut(read(TOKENIZER, texts[30:40]), "\n".join(texts)))
    assert found in " ".join(texts[30:40])
    assert " ".join(texts[31:40]) in found


def test_confidence_parts_what_is_sure_from_what_is_not() -> None:
    said = sentences(20)
    reading = Reading(TOKENIZER, errors=0.0)
    for number, text in enumerate(said):
        reading._errors = 0.7 if number == 9 else 0.0
        reading.say(text)
    pieces = cut(reading, "\n".join(said), Limits(2.0, 20.0, 0.6))
    unsure = " ".join(piece.text for piece in pieces if piece.reason)
    assert said[9].split()[3] in unsure
    assert said[0] in kept(pieces) and said[19] in kept(pieces) and said[9] not in kept(pieces)
    assert all(piece.confidence > 0.6 for piece in pieces if not piece.reason)


def test_speech_without_pauses_is_not_cut() -> None:
    said = sentences(30)
    reading = Reading(TOKENIZER, errors=0.0)
    reading.pause(0.4)
    for text in said:
        reading.say(text, pause=0)
    reading.pause(0.4)
    pieces = cut(reading, " ".join(said))
    assert not kept(pieces)
    assert {piece.reason for piece in pieces} == {"no pauses to cut it at within 20 s"}


def test_what_is_short_and_alone_is_not_kept() -> None:
    reading = Reading(TOKENIZER, errors=0.0)
    reading.say("De hond.", pause=2.0)
    reading.say(sentences(1)[0], pause=2.0)
    pieces = cut(reading, f"De hond.\n{sentences(1)[0]}")
    assert kept(pieces) == sentences(1)[0]
    assert rejected(pieces) == {"De hond.": "shorter than 2 s"}


def test_numbers_stay_as_they_are_written_and_doubts_are_left_out() -> None:
    said = sentences(12)
    spoken = "de kat kost negentienhonderd veertien euro en slaapt altijd thuis bij de boom"
    reading = read(TOKENIZER, [*said[:5], NORMALIZER(spoken), *said[5:10], "Hij zei", *said[10:]])
    written = "De kat kost 1914 euro – en slaapt altijd thuis, bij de boom!"
    pieces = cut(
        reading, "\n".join([*said[:5], written, *said[5:10], "Hij [unk] zei.", *said[10:]])
    )
    assert written in kept(pieces)
    (reason,) = (why for text, why in rejected(pieces).items() if "zei" in text)
    assert reason.startswith("not sure what was said")
