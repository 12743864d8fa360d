"""Whole numbers in words, of a kind and in a form: "dwie", "drittens", "nineteen oh five".

The words are num2words's, or the Unicode CLDR's spell-out rules (unicode-rbnf), whichever is right
for a language: `languages/<code>.yaml` says for which kind or form it takes a rule of the CLDR.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from num2words import num2words
from unicode_rbnf import RbnfEngine
from unicode_rbnf.engine import NoRuleForNumberError


class Speller:
    """Writes whole numbers in the words of a language."""

    def __init__(self, rules: Mapping[str, Any]) -> None:
        """Compiles what the language says about the words of numbers.

        Args:
            rules: The part `numbers` of its file: num2words, locale, cldr, fixes and forms of it.
        """
        self._num2words: str = rules.get("num2words", "")
        self._cldr: Mapping[str, str] = rules.get("cldr", {})
        self._locale: str = rules["locale"]
        self._fixes = _compiled(rules.get("fixes", {}))
        self._forms = {form: _compiled(fixes) for form, fixes in rules.get("forms", {}).items()}

    def __call__(self, number: int, kind: str = "cardinal", forms: Iterable[str] = ()) -> str:
        """Returns a number in words.

        Args:
            number: Zero or more.
            kind: cardinal, ordinal or year.
            forms: Genders, cases and the like; those of which the language says nothing change
                nothing.
        """
        forms = list(forms)
        kind = kind if number else "cardinal"
        ruled = [f for f in forms if (f if kind == "cardinal" else f"{kind} {f}") in self._cldr]
        if ruled:
            key = ruled[0] if kind == "cardinal" else f"{kind} {ruled[0]}"
            words = spelled(number, self._locale, self._cldr[key])
            forms.remove(ruled[0])
        elif kind in self._cldr:
            words = spelled(number, self._locale, self._cldr[kind])
        else:
            words = _by_num2words(number, self._num2words, kind)
        for pattern, replacement in self._fixes:
            words = pattern.sub(replacement, words)
        return self.inflect(words, forms)

    def inflect(self, words: str, forms: Iterable[str]) -> str:
        """Returns words of a number in forms that the language gives as regular expressions."""
        for form in forms:
            for pattern, replacement in self._forms.get(form, ()):
                words = pattern.sub(replacement, words)
        return words


def _compiled(fixes: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in fixes.items()]


@lru_cache(maxsize=100_000)
def _by_num2words(number: int, language: str, kind: str) -> str:
    return str(num2words(number, lang=language, to=kind)).replace(",", "")


@lru_cache(maxsize=100_000)
def spelled(number: float, locale: str, rule: str) -> str:
    """Returns a number in the CLDR's words; "" for one that it has none for.

    Args:
        number: Any.
        locale: As the CLDR names it.
        rule: Of `cldr_rules`.
    """
    try:
        words = _engine(locale).format_number(number, ruleset_names=[f"spellout-{rule}"]).text
    except NoRuleForNumberError:
        return ""
    return re.sub("[\u00ad\u200b]", "", words)


@lru_cache
def _engine(locale: str) -> RbnfEngine:
    return RbnfEngine.for_language(locale)


def cldr_rules(locale: str) -> list[str]:
    """Returns the names of the CLDR's public spell-out rules of a language; none for no language.

    Args:
        locale: As the CLDR names it, such as "sr_Latn".
    """
    try:
        names = _engine(locale).rulesets
    except (ValueError, FileNotFoundError):
        return []
    prefix = "spellout-"
    return sorted(n.removeprefix(prefix) for n in names if n.startswith(prefix) and "%" not in n)
