r"""Numbers, dates, times, money, units and symbols, written as they are read aloud.

What is particular to a language stands under `numbers` in its `languages/<code>.yaml`:

    num2words: nl                  # num2words's name of the language
    locale: nl                     # Babel's, for names of months and units and for plurals
    decimal: ","                   # between whole and fraction
    thousands: ". "                # characters that may stand between groups of three digits
    point: komma                   # how the decimal sign is read
    fraction: number               # 3,14 is read "three point fourteen"; digits: "one four"
    minus: min
    years: [[1100, 1999]]          # four digits that are read as a year
    fixes: {" e ": " "}            # regular expressions over what num2words writes
    forms: {f: {"un$": une}}       # regular expressions that turn words into another form
    feminine: [h, t]               # units and currencies that take the form f (neuter: n)
    patterns: {"<n>er": "{1 ordinal}"}       # tried in order, before everything else
    currencies: {"€": {one: euro, other: euros, of: d'euros}}  # the CLDR's plural categories
    units: {t: {other: ton}}       # where the CLDR has another word than speakers
    money: {joint: con, after: cents}        # before and after the cents
    magnitudes: {mln: miljoen, miljoen: miljoen}  # as written: as read; may go before a currency
    symbols: {"%": procent}

A pattern is a regular expression in which `<n>` is a whole number, `<count>` one that is no year
(it has no four digits together), and `<day>`, `<month>`, `<year>`,
`<hour>`, `<minute>`, `<roman>` and `<month_name>` what they say; each is a group. Its reading is
text with `{1}` for the first group in words, `{1 ordinal f}` for a kind (ordinal, year, roman,
month, text) and forms. A pattern matches only where no letter or digit continues it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from babel import Locale
from babel.units import format_unit
from num2words import num2words

#: Symbol -> the CLDR's name of the unit.
UNITS = {
    "km": "length-kilometer", "m": "length-meter", "cm": "length-centimeter",
    "mm": "length-millimeter", "mi": "length-mile", "ft": "length-foot",
    "km²": "area-square-kilometer", "km2": "area-square-kilometer",
    "m²": "area-square-meter", "m2": "area-square-meter", "ha": "area-hectare",
    "m³": "volume-cubic-meter", "m3": "volume-cubic-meter",
    "l": "volume-liter", "L": "volume-liter", "ml": "volume-milliliter",
    "kg": "mass-kilogram", "g": "mass-gram", "mg": "mass-milligram", "t": "mass-tonne",
    "km/h": "speed-kilometer-per-hour", "m/s": "speed-meter-per-second",
    "mph": "speed-mile-per-hour",
    "°C": "temperature-celsius", "ºC": "temperature-celsius", "°F": "temperature-fahrenheit",
    "°": "angle-degree",
    "kHz": "frequency-kilohertz", "MHz": "frequency-megahertz", "GHz": "frequency-gigahertz",
    "W": "power-watt", "kW": "power-kilowatt", "MW": "power-megawatt",
    "kWh": "energy-kilowatt-hour",
    "MB": "digital-megabyte", "GB": "digital-gigabyte", "TB": "digital-terabyte",
    "h": "duration-hour", "min": "duration-minute",
}  # fmt: skip
_MACROS = {
    "n": r"(\d+)",
    "day": r"(0?[1-9]|[12]\d|3[01])",
    "month": r"(0?[1-9]|1[0-2])",
    "year": r"(1\d{3}|20\d\d)",
    "hour": r"([01]?\d|2[0-4])",
    "minute": r"([0-5]\d)",
    "roman": r"([IVXLC]+)",
}
_ALONE = (r"(?<!\w)(?<!\d[.,:/])", r"(?!\w)(?![.,:/]\d)")
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
_FIGURES = r"^[\W\d]+"
_SPACES = "\u00a0\u202f\u2009"
_LONGEST_CARDINAL = 12  # digits; what is longer is read digit by digit
_REQUIRED = {
    "num2words", "locale", "decimal", "thousands", "point", "fraction", "minus", "currencies",
    "symbols",
}  # fmt: skip
_KEYS = _REQUIRED | {
    "years", "fixes", "forms", "feminine", "neuter", "patterns", "units", "money", "magnitudes",
}  # fmt: skip


class NumberReader:
    """Writes the numbers and symbols of a text in words."""

    def __init__(self, rules: Mapping[str, Any], source: Path) -> None:
        """Compiles a language's rules.

        Args:
            rules: The part `numbers` of its file.
            source: That file.

        Raises:
            ValueError: A key is unknown or missing.
        """
        if wrong := sorted((set(rules) - _KEYS) | (_REQUIRED - set(rules))):
            raise ValueError(
                f"{source}: numbers: unknown or missing {', '.join(wrong)}; expected "
                f"{', '.join(sorted(_REQUIRED))} and perhaps {', '.join(sorted(_KEYS - _REQUIRED))}"
            )
        self._rules = rules
        self._locale = Locale.parse(rules["locale"])
        self._forms: Mapping[str, Mapping[str, str]] = rules.get("forms", {})
        self._genders = {unit: "f" for unit in rules.get("feminine", [])}
        self._genders |= {unit: "n" for unit in rules.get("neuter", [])}
        self._months: list[str] = [
            self._locale.months["format"]["wide"][month].lower() for month in range(1, 13)
        ]
        macros = _MACROS | {"month_name": f"((?i:{'|'.join(self._months)}))"}
        group = rf"[{re.escape(rules['thousands'])}{_SPACES}]"
        macros["count"] = rf"(\d{{1,3}}(?:{group}\d{{3}})*)"
        self._patterns = [
            (re.compile(re.sub(r"<(\w+)>", lambda m: macros[m[1]], p).join(_ALONE)), reading)
            for p, reading in rules.get("patterns", {}).items()
        ]
        whole = rf"\d{{1,3}}(?:{group}\d{{3}})+(?!\d)|\d+"
        # A hyphen after a word or a number is no sign: 2019-2020, 6 -7.
        sign = r"(?:(?<!\w)(?<!\d )([-−]))?"
        number = rf"{sign}(?<!\d)({whole})(?:{re.escape(rules['decimal'])}(\d+))?"
        currency = _any_of(rules["currencies"])
        words = rules.get("magnitudes", {})
        magnitude = rf"(?:\s?{_any_of(set(words.values()))}(?!\w))?"
        self._magnitude = re.compile(rf"(?<=\d)\s?{_any_of(words)}(?!\w)")
        self._money_first = re.compile(rf"{currency}\s?{number}{magnitude}")
        self._money_last = re.compile(rf"{number}{magnitude}\s?{currency}(?!\w)")
        self._measure = re.compile(rf"{number}\s?{_any_of(UNITS)}(?![\w²³])")
        self._number = re.compile(number)
        self._symbols = str.maketrans({s: f" {w} " for s, w in rules["symbols"].items()})
        symbols = re.escape("".join(rules["symbols"]))
        self._needed = re.compile(rf"[\d{symbols}]|\b[IVXLC]+")

    def __call__(self, text: str) -> str:
        """Returns the text with words for its numbers and symbols; the rest is left as it is.

        Args:
            text: As written: upper and lower case tell units and Roman numerals.
        """
        if not self._needed.search(text):
            return text
        text = "".join(_ascii_digit(char) for char in text)
        for pattern, reading in self._patterns:
            text = pattern.sub(partial(self._read, reading), text)
        magnitudes = self._rules.get("magnitudes", {})
        text = self._magnitude.sub(lambda m: f" {magnitudes[m[1]]}", text)
        text = _replace(
            self._money_first, lambda m: self._money(m[2], m[3], m[4], m[5], m[1]), text
        )
        text = _replace(self._money_last, lambda m: self._money(*m.groups()), text)
        text = _replace(self._measure, lambda m: self._quantity(*m.groups()), text)
        text = _replace(self._number, lambda m: self._plain(m[1], m[2], m[3]), text)
        return text.translate(self._symbols)

    def _read(self, reading: str, match: re.Match[str]) -> str:
        """A pattern's reading, with the match's groups in words."""

        def field(place: re.Match[str]) -> str:
            number, *flags = place[1].split()
            group = match[int(number)] or ""
            if "text" in flags or not group:
                return group
            if "month" in flags:
                return self._months[int(group) - 1]
            if "roman" in flags:
                value = roman_value(group)
                if value is None:
                    return group
                group = str(value)
            kind = "ordinal" if "ordinal" in flags else "year" if "year" in flags else "cardinal"
            if kind == "year" and not self._is_year(group):
                kind = "cardinal"
            words = self._words(int(_digits(group)), kind)
            for form in flags:
                words = self._in_form(words, form)
            return words

        return re.sub(r"{([^{}]*)}", field, reading)

    def _money(
        self, minus: str | None, whole: str, fraction: str | None, magnitude: str | None, sign: str
    ) -> str:
        """An amount: "five euros fifty", "two point five million euros"."""
        money = self._rules.get("money", {})
        forms = self._rules["currencies"][sign]
        gender = self._genders.get(sign, "m")
        if magnitude:
            number = self._plain(minus, whole, fraction)
            unit = forms.get("of") or forms.get("many") or forms["other"]
            return f"{number} {magnitude} {unit}"
        cents = ""
        if fraction and len(fraction) == 2:
            if int(fraction):
                parts = (money.get("joint"), self._words(int(fraction)), money.get("after"))
                cents = " ".join(part for part in parts if part)
            fraction = None
        number = self._in_form(self._plain(minus, whole, fraction, counted=True), gender)
        category = self._locale.plural_form(_value(whole, fraction))
        return f"{number} {forms.get(category, forms['other'])} {cents}"

    def _quantity(self, minus: str | None, whole: str, fraction: str | None, unit: str) -> str:
        """A number with a unit, in the CLDR's words for it."""
        number = self._plain(minus, whole, fraction, counted=True)
        number = self._in_form(number, self._genders.get(unit, "m"))
        value = _value(whole, fraction)
        if own := self._rules.get("units", {}).get(unit):
            return f"{number} {own.get(self._locale.plural_form(value), own['other'])}"
        written = format_unit(value, UNITS[unit], locale=self._locale)
        return f"{number} {re.sub(_FIGURES, '', written)}"

    def _plain(
        self, minus: str | None, whole: str, fraction: str | None, counted: bool = False
    ) -> str:
        """A number in words; a counted one is never a year."""
        digits = _digits(whole)
        if (len(digits) > 1 and digits[0] == "0") or len(digits) > _LONGEST_CARDINAL:
            words = self._one_by_one(digits)
        elif digits == whole and fraction is None and not counted and self._is_year(digits):
            words = self._words(int(digits), "year")
        else:
            words = self._words(int(digits))
        if fraction is not None:
            words += f" {self._rules['point']} {self._fraction(fraction)}"
        return f"{self._rules['minus']} {words}" if minus else words

    def _fraction(self, digits: str) -> str:
        if self._rules["fraction"] == "digits" or len(digits) > 3:
            return self._one_by_one(digits)
        zeros = len(digits) - len(digits.lstrip("0"))
        words = [self._words(0)] * zeros
        if digits[zeros:]:
            words.append(self._words(int(digits[zeros:])))
        return " ".join(words)

    def _is_year(self, digits: str) -> bool:
        return len(digits) == 4 and any(
            first <= int(digits) <= last for first, last in self._rules.get("years", [])
        )

    def _one_by_one(self, digits: str) -> str:
        return " ".join(self._words(int(digit)) for digit in digits)

    def _words(self, number: int, kind: str = "cardinal") -> str:
        if number >= 10**_LONGEST_CARDINAL:
            return self._one_by_one(str(number))
        words = _in_words(number, self._rules["num2words"], kind if number else "cardinal")
        for pattern, replacement in self._rules.get("fixes", {}).items():
            words = re.sub(pattern, replacement, words)
        return words

    def _in_form(self, words: str, form: str) -> str:
        for pattern, replacement in self._forms.get(form, {}).items():
            words = re.sub(pattern, replacement, words)
        return words


@lru_cache(maxsize=100_000)
def _in_words(number: int, language: str, kind: str) -> str:
    return str(num2words(number, lang=language, to=kind)).replace(",", "")


def _any_of(words: Iterable[str]) -> str:
    """A group of a regular expression that matches one of the words, the longest that fits."""
    return f"({'|'.join(map(re.escape, sorted(words, key=len, reverse=True))) or '(?!)'})"


def roman_value(numeral: str) -> int | None:
    """The value of a Roman numeral up to 399; None when it is not well formed."""
    tens = "(?:X[LC]|L?X{0,3})"
    if not re.fullmatch(rf"(?=.)C{{0,3}}{tens}(?:I[XV]|V?I{{0,3}})", numeral):
        return None
    values = [_ROMAN[letter] for letter in numeral]
    following = [*values[1:], 0]
    return sum(-v if v < n else v for v, n in zip(values, following, strict=True))


def _replace(pattern: re.Pattern[str], read: Callable[[re.Match[str]], str], text: str) -> str:
    """Replaces what a pattern finds by its reading, apart from a letter before or after it."""

    def spaced(match: re.Match[str]) -> str:
        before = text[match.start() - 1 : match.start()].isalnum()
        after = text[match.end() : match.end() + 1].isalnum()
        return " " * before + read(match) + " " * after

    return pattern.sub(spaced, text)


def _digits(number: str) -> str:
    return re.sub(r"\D", "", number)


def _value(whole: str, fraction: str | None) -> float:
    return int(_digits(whole)) if fraction is None else float(f"{_digits(whole)}.{fraction}")


def _ascii_digit(char: str) -> str:
    return str(unicodedata.digit(char)) if char.isdecimal() and not char.isascii() else char
