"""One text normaliser per language, the same for references and hypotheses.

A language is a file `languages/<code>.yaml` beside this module, or `egs/<code>/local/text.yaml` of
a recipe that brings its own:

    name: Dutch
    lower: {I: ı, İ: i}           # capitals whose small letters are not Unicode's
    alphabet: "abc..."            # lower-case letters; the space is always allowed
    ranges: [一-鿿]               # more of the alphabet, from one letter to another
    apostrophe: keep              # inside words (don't, l'acqua); default: remove
    apostrophe_clitics: [s, t]    # words that keep a leading apostrophe ('s ochtends)
    hyphen: keep                  # inside words (s-a); default: a space
    replace: {ş: ș}               # letters to rewrite, after lower-casing
    inside: "·"                   # characters that are spelling between letters (Catalan l·l)
    vowel_signs: remove           # those of Arabic and Hebrew; default: keep
    spaces: remove                # of a script that has none between words; scored by CER first
    abbreviations: {z.B.: zum Beispiel}  # as written: as read
    events: [lachen]              # what brackets may hold that is not said, beside `markup.EVENTS`
    missing: [unverständlich]     # and what stands for speech that nobody wrote down
    numbers: {...}                # see `numerals.py`; absent: digits and symbols stay

What is not said (`markup.py`) goes first, then abbreviations, numbers and symbols are read out,
because capitals tell units and Roman numerals. A foreign letter is folded to the language's own (ø
to o); what cannot be stays, and `Normalizer.check` reports it. What could be read in another way
too is named by `Normalizer.read`: training text may not hold it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from icetransfer.data.text import characters
from icetransfer.data.text.markup import MarkupRemover
from icetransfer.data.text.numerals import NumberReader

#: Raised whenever any language's normalised text changes; stands in every result.
VERSION = "4"
#: Raised when the text of words in the language's own letters changes, which have no digit or
#: symbol: that of the synthetic corpora.
WORDS_VERSION = "1"

LANGUAGE_FOLDER = Path(__file__).parent / "languages"
RECIPES_FOLDER = Path(__file__).parents[3] / "egs"

_APOSTROPHES = "'’‘ʼ`´′՚"
_HYPHENS = "-‐‑‒"
# Symbols that are read aloud: they are not punctuation, and must not vanish from a transcript.
_SPOKEN_SYMBOLS = frozenset("%‰&@#§")
_KEYS = {
    *("name", "alphabet", "lower", "apostrophe", "apostrophe_clitics", "hyphen", "replace"),
    *("ranges", "inside", "vowel_signs", "spaces", "abbreviations", "events", "missing", "numbers"),
}
_CHOICES = {
    "apostrophe": ("keep", "remove"),
    "hyphen": ("keep", "space"),
    "vowel_signs": ("remove", "keep"),
    "spaces": ("remove", "keep"),
}
# Foreign letters that are not a letter of the Latin alphabet with a mark.
FOLDED = {
    "ø": "o", "ł": "l", "đ": "d", "ð": "d", "ı": "i", "ħ": "h", "æ": "ae", "œ": "oe", "ß": "ss",
    "þ": "th", "ŋ": "n",
}  # fmt: skip


class Reading(NamedTuple):
    """A text as it is spoken.

    Attributes:
        text: The normalised text.
        removed: Tags and events that were taken out, as they were written.
        doubts: What can be read in another way too, or was said and not written down.
    """

    text: str
    removed: list[str]
    doubts: list[str]


def languages() -> list[str]:
    """Returns the codes of the languages that have rules, sorted."""
    shared = {path.stem for path in LANGUAGE_FOLDER.glob("*.yaml")}
    return sorted(shared | {path.parts[-3] for path in RECIPES_FOLDER.glob("*/local/text.yaml")})


def rules_file(language: str) -> Path:
    """Returns where the rules of a language stand, or would stand."""
    shared = LANGUAGE_FOLDER / f"{language}.yaml"
    return shared if shared.is_file() else RECIPES_FOLDER / language / "local/text.yaml"


class Normalizer:
    """Make text comparable: NFC, lower case, no punctuation, one space between words.

    Attributes:
        language: Code of the language, such as "nl".
        name: English name of the language.
        alphabet: The characters that training text may hold, the space among them.
        abbreviations: Those that it reads out, in small letters.
        version: What identifies these rules in a result, such as "nl-2"; of rules that a recipe
            brings, and its user edits, the beginning of their checksum too.
        words_version: The same for text of words in the language's own letters alone.
        checksum: The beginning of that of the file, of which a stage sees that it was edited.
        spaceless: Whether its script has no spaces between words: CER says more than WER.
    """

    def __init__(self, language: str) -> None:
        """Reads the rules of a language.

        Args:
            language: Code of a language that has rules.

        Raises:
            ValueError: The language has no rules, or its file is wrong.
        """
        source = rules_file(language)
        rules = _read_rules(language, source)
        self.language = language
        self.name = str(rules["name"])
        self.checksum = _checksum(source)
        own = "" if source.parent == LANGUAGE_FOLDER else f"-{self.checksum}"
        self.version = f"{language}-{VERSION}{own}"
        self.words_version = f"{language}-{WORDS_VERSION}{own}"
        self.spaceless = rules.get("spaces") == "remove"
        self._keep_apostrophe = rules.get("apostrophe", "remove") == "keep"
        self._keep_hyphen = rules.get("hyphen", "space") == "keep"
        self._drop_vowel_signs = rules.get("vowel_signs") == "remove"
        self._inside = str(rules.get("inside", ""))
        self._lower = str.maketrans(dict(rules.get("lower", {})))
        self._replace = str.maketrans(dict(rules.get("replace", {})))
        clitics = "|".join(map(re.escape, rules.get("apostrophe_clitics", [])))
        self._clitic = re.compile(rf"(?<!\w)'(?=(?:{clitics})(?!\w))") if clitics else None
        extra = "'" * self._keep_apostrophe + "-" * self._keep_hyphen + self._inside
        many = (chr(c) for r in rules.get("ranges", []) for c in range(ord(r[0]), ord(r[-1]) + 1))
        self.alphabet = frozenset([*str(rules["alphabet"]), *many, *extra, " "])
        self._folded = _Folded(self.alphabet)
        self._remove_markup = MarkupRemover(rules.get("events", []), rules.get("missing", []))
        self._expand = _abbreviations(rules.get("abbreviations", {}))
        self.abbreviations = frozenset(map(str.lower, rules.get("abbreviations", {})))
        self._read_numbers: Callable[[str], tuple[str, list[str]]] = _as_it_is
        if "numbers" in rules:
            self._read_numbers = NumberReader(rules["numbers"], source)

    def __call__(self, text: str) -> str:
        """Returns the normalised text. Never fails: what has no rule is left as it is.

        Args:
            text: A transcript or a hypothesis.
        """
        return self.read(text).text

    def read(self, text: str) -> Reading:
        """Returns the normalised text, what was taken out of it, and what is in doubt.

        Args:
            text: A transcript or a hypothesis.
        """
        said, removed, unsure = self._remove_markup(characters.compose(text))
        spoken, doubts = self._read_numbers(self._expand(said))
        words = self.words(spoken)
        return Reading(words.translate(self._folded), removed, unsure + doubts)

    def check(self, text: str) -> list[str]:
        """Returns the characters that training text may not hold, sorted; empty when it may.

        Args:
            text: A transcript, normalised or not.
        """
        return self.outside(self(text))

    def outside(self, text: str) -> list[str]:
        """Returns the characters of normalised text that are not in the alphabet, sorted.

        Args:
            text: Normalised.
        """
        return sorted(set(text) - self.alphabet)

    def foreign(self, text: str) -> list[str]:
        """Returns the characters that are no letter of the language, sorted.

        Those which normalisation would fold or read out are among them.

        Args:
            text: A transcript, a word or a name.
        """
        return self.outside(self.words(text))

    def scored(self, text: str) -> str:
        """Returns text as it is scored: of a script without spaces, each character alone.

        Args:
            text: Normalised.
        """
        return " ".join(characters.graphemes(text.replace(" ", ""))) if self.spaceless else text

    def words(self, text: str) -> str:
        """Returns text in lower case, without punctuation: what is done to words alone.

        Args:
            text: Numbers and symbols in it stay.
        """
        text = unicodedata.normalize("NFC", text).translate(self._lower).lower()
        # Lower-casing can decompose (İ), so compose again before looking at single characters.
        text = unicodedata.normalize("NFC", text).translate(self._replace)
        if not text.isascii():
            text = characters.join_hebrew(characters.without_tatweel(text))
            if self._drop_vowel_signs:
                text = characters.without_vowel_signs(text)
        text = _APOSTROPHE.sub("'", text)
        text = _HYPHEN.sub("-", text)
        marked = self._mark_kept(text)
        kept = marked.translate(_PLAIN)
        words = " ".join(kept.translate(_UNMARK).split())
        return characters.close_up(words) if self.spaceless else words

    def _mark_kept(self, text: str) -> str:
        """Puts private characters for the apostrophes and hyphens that are spelling."""
        if self._clitic:
            text = self._clitic.sub(_APOSTROPHE_MARK, text)
        inside = r"(?<=[^\W\d_]){}(?=[^\W\d_])"
        mark = _APOSTROPHE_MARK if self._keep_apostrophe else ""
        text = re.sub(inside.format("'"), mark, text)
        if self._keep_hyphen:
            text = re.sub(inside.format("-"), _HYPHEN_MARK, text)
        for char in self._inside:
            text = re.sub(inside.format(re.escape(char)), _INSIDE_MARKS[char], text)
        return text


_APOSTROPHE_MARK = "\ue000"
_HYPHEN_MARK = "\ue001"
_INSIDE_MARKS = {"·": "\ue002"}
_UNMARK = {ord(_APOSTROPHE_MARK): "'", ord(_HYPHEN_MARK): "-"} | {
    ord(mark): char for char, mark in _INSIDE_MARKS.items()
}
_APOSTROPHE = re.compile(f"[{_APOSTROPHES}]")
_HYPHEN = re.compile(f"[{_HYPHENS}]")


def raw(text: str) -> str:
    """Returns text as it is scored unnormalised: only composed (NFC), one space between words."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class _Folded(dict[int, str]):
    """The language's own letters for each foreign one; what has none stays."""

    def __init__(self, alphabet: frozenset[str]) -> None:
        super().__init__()
        self._alphabet = alphabet

    def __missing__(self, code: int) -> str:
        char = own = chr(code)
        if char not in self._alphabet:
            base = unicodedata.normalize("NFD", char)[0]
            folded = FOLDED.get(base, base)
            own = folded if set(folded) <= self._alphabet else char
        self[code] = own
        return own


class _PlainCharacters(dict[int, str]):
    """Each character, a space for punctuation, nothing for an invisible mark."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        plain = char
        if category == "Cf":
            plain = ""
        elif category in ("Cc", "Sk") or (category[0] in "PZ" and char not in _SPOKEN_SYMBOLS):
            plain = " "
        self[code] = plain
        return plain


_PLAIN = _PlainCharacters()


def _as_it_is(text: str) -> tuple[str, list[str]]:
    return text, []


def _abbreviations(readings: Mapping[str, str]) -> Callable[[str], str]:
    """Reads abbreviations: z.B., z. B. and Z.B. alike."""
    if not readings:
        return str
    readings = {k[0].upper() + k[1:]: reading for k, reading in readings.items()} | dict(readings)
    alternatives = []
    for key in sorted(readings, key=len, reverse=True):
        spaced = re.escape(key.removesuffix(".")).replace(r"\.", r"\.\s?").replace(r"\ ", r"\s?")
        # One without a point looks like a word once it is normalised, and is read as one is then.
        alone = rf"(?i:{spaced})(?![^\W\d_])"
        alternatives.append(rf"(?<![\w.]){spaced}\." if key.endswith(".") else alone)
    first = {case for key in readings for case in (key[0].upper(), key[0].lower())}
    begin = rf"(?<![^\W\d_])(?=[{re.escape(''.join(sorted(first)))}])"
    found = re.compile(f"{begin}(?:{'|'.join(alternatives)})")
    by_letters = {"".join(key.split()): reading for key, reading in readings.items()}
    by_letters |= {key.lower(): reading for key, reading in by_letters.items() if key[-1] != "."}

    def read(match: re.Match[str]) -> str:
        letters = "".join(match[0].split())
        after = match.string[match.start() - 1 : match.start()].isalnum()
        return f"{' ' * after}{by_letters.get(letters) or by_letters[letters.lower()]} "

    return lambda text: found.sub(read, text)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _read_rules(language: str, path: Path) -> Mapping[str, Any]:
    """Reads and checks the rules of a language."""
    if not path.is_file():
        raise ValueError(
            f"no text rules for language {language!r}; known: {', '.join(languages())}. "
            f"tools/new_recipe.sh {language} makes them, and the recipe; or write {path} with its "
            f"name and alphabet (see icetransfer/data/text/normalizer.py)"
        )
    rules = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(rules, dict) or not {"name", "alphabet"} <= set(rules) <= _KEYS:
        raise ValueError(f"{path}: expected the keys name and alphabet, and of {sorted(_KEYS)}")
    for key, choices in _CHOICES.items():
        if key in rules and rules[key] not in choices:
            raise ValueError(f"{path}: {key} is {rules[key]!r}, expected {' or '.join(choices)}")
    if not set(rules.get("inside", "")) <= set(_INSIDE_MARKS):
        raise ValueError(
            f"{path}: inside is {rules['inside']!r}, expected of {''.join(_INSIDE_MARKS)}"
        )
    return rules
