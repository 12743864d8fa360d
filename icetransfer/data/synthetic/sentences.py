"""Sentences for the synthetic corpus, from a small grammar per language.

A grammar is a file `grammars/<language>.yaml`:

    espeak: nl                        # espeak-ng's voice
    locale: nl                        # Babel's, for the CLDR's names
    num2words: nl
    faker: nl_NL
    letters: {slots: [20, 60], open: [30, 110]}   # shortest and longest sentence
    forms: {f: {"un$": "une"}}        # regular expressions that turn a cardinal into another form
    not_words: [...]                  # entries of the libraries' lists to leave out
    shared: {rule: [template, ...]}   # rules of both domains
    slots: {S: [...], rule: [...]}
    open: {S: [...], rule: [...]}

A language of the base models alone has only the open domain.

A template is text with `(a|b|)` for a choice and `{...}` for one of

* a rule of the domain or of `shared`;
* a number in words: `{2..99}`; steps `{100..900 by 100}`; only numbers of a plural category of
  the CLDR (`{2..99 few}`); in a form that `forms` knows (`{1..99 f}`); `ordinal`, `year`; and
  `plain`, which leaves out the numbers that end in 1 or 2, whose form depends on the noun;
* an entry of a list from Babel, Faker or emoji (`LISTS`): `{territory}`, `{month}`, `{word}`...

Everything is drawn from one seeded generator. A sentence belongs to train, dev or test by a hash
of its normalised text, so the splits are disjoint whatever the seed and the amounts.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from babel import Locale
from num2words import num2words

from icetransfer.data.synthetic.word_lists import LISTS
from icetransfer.data.text.normalizer import Normalizer

GRAMMAR_FOLDER = Path(__file__).parent / "grammars"
DOMAINS = ("slots", "open")

_CHOICE = re.compile(r"\(([^()]*)\)")
_FIELD = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"(\d+)\.\.(\d+)(.*)")
_KINDS = ("ordinal", "year")
_PLURALS = ("zero", "one", "two", "few", "many", "other")
# How many drawn sentences in a row may be repeats or of the wrong length before we give up.
_PATIENCE = 20_000


@dataclass(frozen=True)
class Sentence:
    """A sentence as it is given to the synthesiser, and as it is written in the transcript."""

    spoken: str
    text: str


def synthetic_languages() -> list[str]:
    """Returns the codes of the languages that have a grammar, sorted."""
    return sorted(path.stem for path in GRAMMAR_FOLDER.glob("*.yaml"))


@cache
def read_grammar(language: str) -> Mapping[str, Any]:
    """Reads a language's grammar.

    Raises:
        ValueError: There is none.
    """
    path = GRAMMAR_FOLDER / f"{language}.yaml"
    if language not in synthetic_languages():
        raise ValueError(
            f"no synthetic sentences for language {language!r}; known: "
            f"{', '.join(synthetic_languages())}. To add it, write {path}"
        )
    grammar: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in ("shared", *DOMAINS):
        for rule, templates in grammar.get(part, {}).items():
            for template in templates:
                if not isinstance(template, str):
                    raise ValueError(f"{path}: {part}.{rule}: {template!r} must be in quotes")
    return grammar


class SentenceSource:
    """Draws sentences of a language and domain."""

    def __init__(
        self, language: str, domain: str, is_foreign: Callable[[str], bool] = lambda text: False
    ) -> None:
        """Reads the grammar.

        Args:
            language: Code of a language with a grammar.
            domain: "slots" or "open".
            is_foreign: Tells whether the synthesiser reads some of a sentence as another
                language's; such sentences are left out.

        Raises:
            ValueError: No such language or domain, or this language's grammar lacks the domain.
        """
        if domain not in DOMAINS:
            raise ValueError(
                f"no synthetic domain {domain!r}; expected one of {', '.join(DOMAINS)}"
            )
        self._grammar = read_grammar(language)
        if domain not in self._grammar:
            there = [name for name in DOMAINS if name in self._grammar]
            raise ValueError(
                f"no {domain} sentences for language {language!r}; its grammar has "
                f"{' and '.join(there)}"
            )
        self._normalizer = Normalizer(language)
        self._is_foreign = is_foreign
        self._language, self._domain = language, domain
        self._rules: Mapping[str, list[str]] = (
            self._grammar.get("shared", {}) | self._grammar[domain]
        )
        self._lists: dict[str, list[str]] = {}
        self._numbers: dict[str, _Numbers] = {}

    def sentences(self, split: str, seed: int) -> Iterator[Sentence]:
        """Yields the split's sentences, without repeats, without end.

        Raises:
            ValueError: The grammar has no more sentences.
        """
        generator = random.Random(f"{self._language} {self._domain} {split} {seed}")
        shortest, longest = self._grammar["letters"][self._domain]
        seen: set[str] = set()
        misses = 0
        while misses < _PATIENCE:
            spoken = " ".join(self._expand(self._rules["S"], generator).split())
            text = self._normalizer(spoken)
            wanted = (
                shortest <= len(text) <= longest and text not in seen and split_of(text) == split
            )
            if not wanted or self._is_foreign(spoken):
                misses += 1
                continue
            misses = 0
            seen.add(text)
            yield Sentence(spoken, text)
        raise ValueError(
            f"the {self._domain} grammar of {self._language} gave no new {split} sentence in "
            f"{_PATIENCE} draws after {len(seen)}: ask for fewer minutes or add templates"
        )

    def _expand(self, templates: list[str], generator: random.Random) -> str:
        template = generator.choice(templates)
        while match := _CHOICE.search(template):
            choice = generator.choice(match[1].split("|"))
            template = template[: match.start()] + choice + template[match.end() :]
        return _FIELD.sub(lambda match: self._field(match[1], generator), template)

    def _field(self, field: str, generator: random.Random) -> str:
        if field in self._rules:
            return self._expand(self._rules[field], generator)
        if _NUMBER.fullmatch(field):
            if field not in self._numbers:
                self._numbers[field] = self._read_numbers(field)
            return self._numbers[field].in_words(generator)
        if field not in self._lists:
            self._lists[field] = self._read_list(field)
        return generator.choice(self._lists[field])

    def _read_list(self, name: str) -> list[str]:
        """Returns the usable entries of a library's list, sorted."""
        if name not in LISTS:
            raise ValueError(
                f"grammar of {self._language}: {{{name}}} is neither a rule nor a list "
                f"({', '.join(sorted(LISTS))})"
            )
        entries = set(LISTS[name](self._grammar["locale"], self._grammar["faker"]))
        entries -= set(self._grammar.get("not_words", []))
        usable = [e for e in sorted(entries) if self._is_usable(e)]
        if not usable:
            raise ValueError(f"grammar of {self._language}: the list {{{name}}} is empty")
        return usable

    def _is_usable(self, entry: str) -> bool:
        """Keeps entries of one to three plain words."""
        words = entry.split()
        return (
            1 <= len(words) <= 3
            and not re.search(r"[\d()\[\]/.,:;&+]|\b[A-Z]{2,}\b|\b[IVX]+\b", entry)
            and max(map(len, words)) <= 22
            and not self._normalizer.foreign(entry)
        )

    def _read_numbers(self, field: str) -> _Numbers:
        """Returns the numbers that a field such as "2..99 few" stands for."""
        match = _NUMBER.fullmatch(field)
        assert match is not None
        step = re.search(r"by (\d+)", match[3])
        flags = set(re.sub(r"by \d+", "", match[3]).split())
        forms = self._grammar.get("forms", {})
        unknown = flags - {*_PLURALS, *_KINDS, "plain", *forms}
        numbers: Sequence[int] = range(
            int(match[1]), int(match[2]) + 1, int(step[1]) if step else 1
        )
        if plural := flags.intersection(_PLURALS):
            category = Locale.parse(self._grammar["locale"]).plural_form
            numbers = [number for number in numbers if category(number) in plural]
        if "plain" in flags:
            numbers = [number for number in numbers if number % 10 not in (1, 2)]
        if unknown or not numbers:
            raise ValueError(f"grammar of {self._language}: no numbers {{{field}}}")
        return _Numbers(
            numbers,
            self._grammar["num2words"],
            next(iter(flags.intersection(_KINDS)), "cardinal"),
            [change for form in sorted(flags & set(forms)) for change in forms[form].items()],
        )


@dataclass
class _Numbers:
    """Numbers to draw from, read out in one way."""

    numbers: Sequence[int]
    language: str  # num2words' name
    kind: str
    changes: Sequence[tuple[str, str]]  # regular expression, replacement

    def __post_init__(self) -> None:
        self._words: dict[int, str] = {}

    def in_words(self, generator: random.Random) -> str:
        number = generator.choice(self.numbers)
        if number not in self._words:
            words = str(num2words(number, lang=self.language, to=self.kind)).replace(",", "")
            for pattern, form in self.changes:
                words = re.sub(pattern, form, words)
            self._words[number] = words
        return self._words[number]


def split_of(text: str) -> str:
    """Returns the split that a normalised sentence belongs to: 80 % train, 10 % dev, 10 % test."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")
