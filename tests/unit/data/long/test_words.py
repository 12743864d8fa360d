"""A long text as words that are written, said and have tokens."""

from __future__ import annotations

import pytest

from icetransfer.data.long.words import Spelling, read_long_text, sentences, written_and_said
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer

DUTCH = Normalizer("nl")


def tokenizer(letters: str, kind: str = "bpe") -> Tokenizer:
    return Tokenizer(train_tokenizer([" ".join(letters), letters], len(letters) + 8, kind))


ASCII = tokenizer("abcdefghijklmnopqrstuvwxyz'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Een. Twee! Drie?\nVier", ["Een.", "Twee!", "Drie?", "Vier"]),
        ("Der 2. Weltkrieg, z. B. hier.", ["Der 2. Weltkrieg, z. B. hier."]),
        ("Zij\tzei: “Kom.” Hij kwam.\n\nEn toen…", ["Zij zei:", "“Kom.”", "Hij kwam.", "En toen…"]),
        ("\n \n", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert [*sentences(text)] == expected


@pytest.mark.parametrize(
    "sentence",
    [
        "Ja, ja – zei hij.",
        "In 1914 kostte het € 1,50 per kilo, niet 3 %.",
        "1914",
        "- Nee!",
        "Foto's en zo'n e-mail-adres van dr. Jansen",
        "[lachen] Goed (muziek) zo [lachen]",
    ],
)
def test_all_that_is_written_and_said_is_paired(sentence: str) -> None:
    said = DUTCH(sentence)
    pairs = [*written_and_said(sentence, said, DUTCH)]
    assert " ".join(written for written, _ in pairs).split() == sentence.split()
    assert " ".join(spoken for _, spoken in pairs) == said
    assert all(spoken for _, spoken in pairs)


def test_words_that_are_read_alone_are_alone() -> None:
    sentence = "Hij was 21 jaar oud"
    pairs = [*written_and_said(sentence, DUTCH(sentence), DUTCH)]
    assert pairs == [
        ("Hij", "hij"), ("was", "was"), ("21", "eenentwintig"), ("jaar", "jaar"), ("oud", "oud"),
    ]  # fmt: skip


def test_letters_that_a_vocabulary_lacks() -> None:
    assert Spelling(ASCII)("één ø æ") == ("een o ae", "")
    assert Spelling(tokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))("één") == ("EEN", "")
    assert Spelling(ASCII)("да x") == (" x", "да")


def test_a_text_of_another_alphabet_names_its_letters() -> None:
    with pytest.raises(ValueError, match=r"does not look like Dutch: 100% .*\bа\b.*--language"):
        read_long_text("кошка кака", DUTCH, ASCII, "chapter.txt")


def test_a_model_of_another_alphabet_names_the_letters() -> None:
    with pytest.raises(ValueError, match=r"no tokens for .*Fine-tune it to Dutch first"):
        read_long_text("de kat", DUTCH, tokenizer("абвгд"), "chapter.txt")


@pytest.mark.parametrize("text", ["", " \n", "– …", "[lachen]"])
def test_a_text_without_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"chapter.txt has no words"):
        read_long_text(text, DUTCH, ASCII, "chapter.txt")


def test_what_is_not_said_is_told_apart() -> None:
    found = read_long_text("De kat.\n[lachen]\nDe hond.", DUTCH, ASCII, "t")
    assert [entry.written for entry in found.entries] == ["De", "kat.", "De", "hond."]
    assert found.unspoken == ["[lachen]"]
    assert [entry.phrase for entry in found.entries] == [0, 0, 1, 1]


def test_characters_as_tokens_have_one_of_the_space() -> None:
    of_letters = tokenizer("abcdehknot ", "characters")
    found = read_long_text("de kat", DUTCH, of_letters, "t")
    names = of_letters.tokens
    assert [[names[t] for t in e.tokens] for e in found.entries] == [
        ["d", "e"],
        ["▁", "k", "a", "t"],
    ]
