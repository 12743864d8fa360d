"""The normaliser: a table of sentences per language, and what it reports."""

import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icetransfer.data.synthetic.sentences import synthetic_languages
from icetransfer.data.text.normalizer import Normalizer, languages, raw
from icetransfer.data.text.numerals import UNITS, NumberReader, roman_value

TABLES = Path(__file__).parent / "text"
#: Those with rules of numbers and symbols by a grammar, and a table of hard sentences.
LANGUAGES = ["ca", "de", "en", "es", "fr", "it", "nl", "pl", "pt", "ro"]


def table(language: str) -> list[tuple[str, str, bool]]:
    """The sentences of a language as written, with \\u escapes, as they are read, and in doubt."""
    lines = (TABLES / f"{language}.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("# ")]
    return [
        (re.sub(r"\\(u....|[tn])", _unescape, text), expected, doubt == ["?"])
        for text, expected, *doubt in rows
    ]


def _unescape(match: re.Match[str]) -> str:
    return match[0].encode("ascii").decode("unicode_escape")


_NORMALIZERS = {language: Normalizer(language) for language in LANGUAGES}
CASES = [(language, *case) for language in LANGUAGES for case in table(language)]


def test_every_language_has_a_table_of_hard_sentences() -> None:
    assert sorted(path.stem for path in TABLES.glob("*.tsv")) == LANGUAGES
    # The rest have synthetic speech for the base model, words alone, and the CLDR's numbers.
    assert sorted({*LANGUAGES, *synthetic_languages()}) == languages()
    for language in LANGUAGES:
        sentences = table(language)
        assert len(sentences) >= 60
        assert len({text for text, *_ in sentences}) == len(sentences), "a sentence stands twice"
        head = (TABLES / f"{language}.tsv").read_text(encoding="utf-8").partition("\n")[0]
        assert "Sources: " in head and "CLDR" in head


@pytest.mark.parametrize(("language", "text", "expected", "in_doubt"), CASES)
def test_table(language: str, text: str, expected: str, in_doubt: bool) -> None:
    normalizer = Normalizer(language)
    reading = normalizer.read(text)
    assert reading.text == expected
    assert bool(reading.doubts) == in_doubt, reading.doubts
    assert normalizer.read(expected) == (expected, [], []), "not idempotent"
    assert unicodedata.is_normalized("NFC", normalizer(text))
    assert normalizer.check(text) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_whatever_is_written_gives_words_once_and_for_all(language: str) -> None:
    generator = random.Random(1)
    normalizer = Normalizer(language)
    characters = "0123456789 .,:-/%€$£'’hkm°ªerths IVXLzłaUr１２\u00a0"
    for _ in range(1500):
        text = "".join(generator.choices(characters, k=generator.randrange(1, 25)))
        words = normalizer(text)
        assert normalizer(words) == words, text
        assert not re.search(r"\d", words), text


@pytest.mark.parametrize("language", LANGUAGES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_words_are_read_as_they_are(language: str, data: st.DataObject) -> None:
    normalizer = _NORMALIZERS[language]
    letters = sorted(normalizer.alphabet - set("'-"))
    text = data.draw(
        st.text(st.sampled_from([*letters, *"0123456789.,:/-–€$%()[]<>&;°½ªºXIV\u200b"]))
    )
    words = normalizer(text)
    assert normalizer.read(words) == (words, [], [])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_unit_is_read_in_the_languages_own_letters(language: str) -> None:
    normalizer = Normalizer(language)
    for unit in UNITS:
        for number in ("1", "2", "5", "20"):
            words = normalizer(f"x {number} {unit} x").split()
            assert len(words) >= 3 and unit not in words[1:-1], (unit, words)
            assert not normalizer.foreign(" ".join(words)), (unit, words)


def test_check_names_what_is_outside_the_alphabet() -> None:
    assert Normalizer("en").check("It costs 5% more") == []
    assert Normalizer("en").check("No #1 of 漢字") == ["#", "字", "漢"]
    assert Normalizer("ro").check("într-o zi") == []
    assert Normalizer("pl").check("naïve ₴") == ["₴"]


def test_foreign_letters_are_folded_and_told() -> None:
    normalizer = Normalizer("nl")
    assert normalizer("de naïeve Ørsted, Łukasz") == "de naïeve orsted lukasz"
    assert normalizer.foreign("de naïeve Ørsted 5%") == ["%", "5", "ø"]
    assert Normalizer("de")("Straße, Café") == "straße cafe"
    assert Normalizer("en")("Straße, Æther") == "strasse aether"


def test_words_alone_are_not_touched_by_the_reading_of_numbers() -> None:
    for language in LANGUAGES:
        normalizer = Normalizer(language)
        text = " ".join(expected for _, expected, _ in table(language) if expected)
        assert normalizer(text.capitalize()) == text


@pytest.mark.parametrize(
    ("numeral", "value"),
    [("I", 1), ("IV", 4), ("IX", 9), ("XIX", 19), ("XL", 40), ("XCIX", 99), ("CCCXCIX", 399),
     ("", None), ("IIII", None), ("VX", None), ("IC", None), ("LL", None), ("CD", None)],
)  # fmt: skip
def test_roman_value(numeral: str, value: int | None) -> None:
    assert roman_value(numeral) == value


def test_wrong_rules_say_where_and_what() -> None:
    with pytest.raises(ValueError, match=r"cy\.yaml: numbers: .* colour, decimal"):
        NumberReader({"colour": "red"}, Path("cy.yaml"))


def test_scoring_text_never_fails() -> None:
    text = "Ωmega 漢字 12,5 € \ud83d\ude00 \x00"
    assert "zwölf komma fünf euro" in Normalizer("de")(text)
    assert Normalizer("de")("9" * 40).split() == ["neun"] * 40


def test_version_names_language_and_rules() -> None:
    assert Normalizer("nl").version == "nl-4"
    assert Normalizer("nl").words_version == "nl-1"


def test_raw_text_keeps_case_digits_and_punctuation() -> None:
    assert raw("  Kamer\t12: ne\u0301e! ") == "Kamer 12: née!"


def test_unknown_language_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"'cy'; known: ca, cs.*tools/new_recipe.sh cy makes them.*text\.yaml"
    ):
        Normalizer("cy")


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, icetransfer.data.text.normalizer, icetransfer.data.synthetic.sentences;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lhotse')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
