"""The normaliser: a table of sentences per language, and what it reports."""

import subprocess
import sys
import unicodedata

import pytest

from icetransfer.data.text import Normalizer, languages

TABLE = {
    "en": [
        ("Look, the seam is now broken; it couldn't stand the jerk.",
         "look the seam is now broken it couldn't stand the jerk"),
        ("‘Hello,’ she said—“it’s five o’clock!”", "hello she said it's five o'clock"),
        ("A well-known state-of-the-art idea", "a well known state of the art idea"),
        ("The dogs' bowls", "the dogs bowls"),
        ("  tabs\tand\n lines ", "tabs and lines"),
        ("co\u00adoperate\u200b now", "cooperate now"),
        ("...", ""),
        ("It costs 5% more", "it costs 5% more"),
    ],
    "de": [
        ("Der hinter diesem Portal liegende Raum.", "der hinter diesem portal liegende raum"),
        ("Straße, STRASSE und STRAẞE", "straße strasse und straße"),
        ("U\u0308bung macht den Meister", "übung macht den meister"),
        ("Wie geht's?", "wie gehts"),
        ("„Ja“, sagte er – »nein«", "ja sagte er nein"),
        ("E-Mail-Adresse", "e mail adresse"),
        ("Hans’ Auto", "hans auto"),
        ("Ärger, Öl, Übel", "ärger öl übel"),
    ],
    "es": [
        ("¿Cierto? ¡Sí!", "cierto sí"),
        ("«puede empoderar»", "puede empoderar"),
        ("El pingüino, el niño y la acción", "el pingüino el niño y la acción"),
        ("franco-español", "franco español"),
        ("MAÑANA", "mañana"),
        ("nin\u0303o", "niño"),
        ("etc., etc.…", "etc etc"),
        ("Oravec 2002", "oravec 2002"),
    ],
    "fr": [
        ("L’accident a eu lieu aujourd'hui.", "l'accident a eu lieu aujourd'hui"),
        ("qu’« on » ne devrait", "qu on ne devrait"),
        ("des États-Unis", "des états unis"),
        ("L'œuf, le cœur et Lætitia", "l'œuf le cœur et lætitia"),
        ("Où ? Là !", "où là"),
        ("quatre-vingt-dix-neuf", "quatre vingt dix neuf"),
        ("Ça coûte cher… déjà", "ça coûte cher déjà"),
        ("'entre guillemets'", "entre guillemets"),
    ],
    "it": [
        ("Quell'operatore è già loggato.", "quell'operatore è già loggato"),
        ("Perché no? Così!", "perché no così"),
        ("L’Avana", "l'avana"),
        ("un po' di pane", "un po di pane"),
        ("È vero", "è vero"),
        ("italo-francese", "italo francese"),
        ("«Ciao»", "ciao"),
        ("Premere «1».", "premere 1"),
    ],
    "nl": [
        ("'s Ochtends eet ik foto's op.", "'s ochtends eet ik foto's op"),
        ("’t Is ’n mooie dag", "'t is 'n mooie dag"),
        ("'ja' zei hij", "ja zei hij"),
        ("Zuid-Holland", "zuid holland"),
        ("Één coëfficiënt, twee reünies", "één coëfficiënt twee reünies"),
        ("zo'n auto", "zo'n auto"),
        ("IJsselmeer", "ijsselmeer"),
        ("Eén — twee", "eén twee"),
    ],
    "pl": [
        ("Zażółć gęślą jaźń!", "zażółć gęślą jaźń"),
        ("ŁÓDŹ", "łódź"),
        ("„Tak”, powiedział – nie.", "tak powiedział nie"),
        ("czarno-biały", "czarno biały"),
        ("Czy to jest to?", "czy to jest to"),
        ("Harry'ego", "harryego"),
        ("s\u0301wiat", "świat"),
        ("Rok 1999", "rok 1999"),
    ],
    "pt": [
        ("Você está aí?", "você está aí"),
        ("guarda-chuva, disse-me", "guarda chuva disse me"),
        ("AÇÃO, CORAÇÕES", "ação corações"),
        ("d'água", "dágua"),
        ("à noite", "à noite"),
        ("a.c.", "a c"),
        ("ônibus; avô, avó", "ônibus avô avó"),
        ("o século 3", "o século 3"),
    ],
    "ro": [
        ("S-a dus într-o zi.", "s-a dus într-o zi"),
        ("Aşa ţi se pare", "așa ți se pare"),
        ("ȘTIINȚĂ", "știință"),
        ("București – Cluj", "bucurești cluj"),
        ("„Da”, spuse el", "da spuse el"),
        ("dă-mi-l!", "dă-mi-l"),
        ("î, â și ă", "î â și ă"),
        ("-nu", "nu"),
    ],
}  # fmt: skip
CASES = [(language, *case) for language, cases in TABLE.items() for case in cases]


def test_every_language_has_a_table() -> None:
    assert sorted(TABLE) == languages() == ["de", "en", "es", "fr", "it", "nl", "pl", "pt", "ro"]


@pytest.mark.parametrize(("language", "text", "expected"), CASES)
def test_table(language: str, text: str, expected: str) -> None:
    normalizer = Normalizer(language)
    assert normalizer(text) == expected
    assert normalizer(expected) == expected, "not idempotent"
    assert unicodedata.is_normalized("NFC", normalizer(text))


def test_check_names_what_is_outside_the_alphabet() -> None:
    assert Normalizer("en").check("It costs 5% more") == ["%", "5"]
    assert Normalizer("en").check("Look, it's here!") == []
    assert Normalizer("nl").check("de naïeve Ørsted") == ["ø"]
    assert Normalizer("ro").check("într-o zi") == []
    assert Normalizer("pl").check("naïve €") == ["ï", "€"]


def test_scoring_text_never_fails() -> None:
    text = "Ωmega 漢字 12,5 € \ud83d\ude00 \x00"
    assert "12 5" in Normalizer("de")(text)


def test_version_names_language_and_rules() -> None:
    assert Normalizer("nl").version.startswith("nl-")


def test_unknown_language_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'cy'; known: de, en.*To add it, write .*cy\.yaml"):
        Normalizer("cy")


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, icetransfer.data.text, icetransfer.data.sentences;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lhotse')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
