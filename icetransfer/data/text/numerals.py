r"""Numbers, dates, times, money, units and symbols, written as they are read aloud.

What is particular to a language stands under `numbers` in its `languages/<code>.yaml`:

    locale: nl                     # Babel's, for names of months, units, currencies and plurals
    num2words: nl                  # num2words's name of the language, or
    cldr: {cardinal: numbering, f: cardinal-feminine}  # rules of the CLDR for kinds and forms
    decimal: ","                   # between whole and fraction
    thousands: ". "                # characters that may stand between groups of three digits
    point: komma                   # how the decimal sign is read
    fraction: number               # 3,14 is read "three point fourteen"; digits: "one four"
    fraction_agrees: true          # in 2,5 hours, 2 has the gender of hours
    minus: min
    years: [[1100, 1999]]          # four digits that are read as a year
    fixes: {" e ": " "}            # regular expressions over the words of a number
    forms: {f: {"un$": une}}       # regular expressions that turn words into another form
    feminine: [h, t]               # units and currencies that take the form f (neuter: n)
    kings: [Willem]                # names before a Roman numeral, <king> in patterns
    queens: [Elizabeth]            # <queen>
    patterns: {"<n>er": "{1 ordinal}"}       # tried in order, before everything else
    range: "{1} tot {2}"           # 3–5
    fractions: {1/2: een half}     # and ½
    mixed: {1/2: "{1} en een half", other: "{1} {2}"}  # 2 1/2; with noun: doubt, it is in doubt
                                   # before a noun, as where "two hours and a half" is said
    currencies: {"€": {one: euro, other: euros, of: d'euros}}  # the CLDR's plural categories
    units: {t: {other: ton}}       # where the CLDR has another word than speakers
    money: {joint: con, after: cents, of: de, form: m, magnitudes: {k: thousand}}
                                   # before and after the cents; after millions; form of the
                                   # cents; magnitudes that are such beside a currency alone
    magnitudes: {mln: miljoen}     # as written: as read, or {one: ..., other: ...}
    magnitude_form: f              # of the number before one: eine Million
    telephone: pairs               # 01 23 is read "zero one twenty-three"; else digit by digit
    symbols: {"%": procent}

Of these locale, decimal, thousands, point, fraction, minus and symbols must be there, and num2words
or cldr. Currencies have the CLDR's names where none is given. A pattern is a regular expression in
which `<n>` is a whole number, `<count>` one that is no year (it has no four digits together), and
`<day>`, `<month>`, `<year>`, `<hour>`, `<minute>`, `<roman>` and `<month_name>` what they say; each
is a group. Its reading is text with `{1}` for the first group in words, `{1 ordinal f}` for a kind
(ordinal, year, roman, month, text) and forms. A pattern matches only where no letter or digit
continues it.

What has several readings gets the likeliest, and a doubt, for which training leaves it out: a
Roman numeral after a name that is not listed, a telephone number, a slash between numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from babel import Locale
from babel.numbers import format_currency
from babel.units import format_unit

from icetransfer.data.text.characters import SPACELESS
from icetransfer.data.text.spelling import Speller

#: Symbol -> the CLDR's name of the unit.
UNITS = {
    "km": "length-kilometer", "m": "length-meter", "cm": "length-centimeter",
    "mm": "length-millimeter", "mi": "length-mile", "ft": "length-foot",
    "km²": "area-square-kilometer", "km2": "area-square-kilometer",
    "m²": "area-square-meter", "m2": "area-square-meter", "ha": "area-hectare",
    "m³": "volume-cubic-meter", "m3": "volume-cubic-meter",
    "l": "volume-liter", "L": "volume-liter", "ml": "volume-milliliter",
    "kg": "mass-kilogram", "g": "mass-gram", "mg": "mass-milligram", "t": "mass-tonne",
    "dm": "length-decimeter", "cl": "volume-centiliter", "dl": "volume-deciliter",
    "km/h": "speed-kilometer-per-hour", "km/u": "speed-kilometer-per-hour",
    "m/s": "speed-meter-per-second",
    "mph": "speed-mile-per-hour",
    "°C": "temperature-celsius", "ºC": "temperature-celsius", "°F": "temperature-fahrenheit",
    "°": "angle-degree",
    "kHz": "frequency-kilohertz", "MHz": "frequency-megahertz", "GHz": "frequency-gigahertz",
    "Hz": "frequency-hertz", "V": "electric-volt", "kcal": "energy-kilocalorie",
    "hPa": "pressure-hectopascal", "W": "power-watt", "kW": "power-kilowatt",
    "MW": "power-megawatt",
    "kWh": "energy-kilowatt-hour",
    "MB": "digital-megabyte", "GB": "digital-gigabyte", "TB": "digital-terabyte",
    "h": "duration-hour", "min": "duration-minute",
}  # fmt: skip
#: Sign or code -> the currency's ISO 4217 code, under which the CLDR names it.
CURRENCIES = {
    "€": "EUR", "EUR": "EUR", "$": "USD", "US$": "USD", "USD": "USD", "£": "GBP", "GBP": "GBP",
    "¥": "JPY", "JPY": "JPY", "CHF": "CHF", "₽": "RUB", "RUB": "RUB", "₹": "INR", "INR": "INR",
    "₩": "KRW", "₺": "TRY", "₴": "UAH", "₪": "ILS", "zł": "PLN", "PLN": "PLN", "Kč": "CZK",
    "R$": "BRL", "BRL": "BRL", "C$": "CAD", "CA$": "CAD", "A$": "AUD", "AU$": "AUD",
    "CN¥": "CNY", "RON": "RON", "SEK": "SEK", "NOK": "NOK", "DKK": "DKK", "฿": "THB",
}  # fmt: skip
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_VULGAR_AFTER = re.compile(rf"(?:(\d) ?)?([{''.join(_VULGAR)}])")
_DASHES = r"\-−–—‐‑‒﹣"  # in a class of a regular expression
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
# Longer ones are words too: LL, CD. One letter is none.
_ROMAN_ALONE = re.compile(r"(?<!\w)([IVX]{2,})(?!\w)")
_ROMAN_PART = re.compile(r"\b[IVXLC]+(?![A-ZÀ-Þ])")
_ROMAN_IN_PATTERN = re.compile(r"<roman>|[(\[|]I[IVX)|{]")
_DIGIT = re.compile(r"\d")
_TELEPHONE = re.compile(
    r"(?<![\w.,/:-])(?:"
    r"\+\d{1,3}[ ./-]?(?:\(0?\d*\)[ ./-]?)?\d+(?:[ ./-]?\d+)+"  # +49 30 123456
    r"|\(0\d+\)[ ]?\d+(?:[ /-]\d{2,})*|0\d+(?:[ /-]\d{2,})+|0\d{6,}|0\d(?:[ .]\d\d){4}"
    r"|(?:\(\d{3}\)[ ]?|\d{3}-)?\d{3}-\d{4}"  # (555) 123-4567
    r")(?!\w)(?![.,:/-]\d)"
)
_DATE = re.compile(r"\d\d?([./-])\d\d?\1\d{2,4}")
_SHORTEST_TELEPHONE = 7  # digits
_FIGURES = r"^[\W\d]+"
_SPACES = "\u00a0\u202f\u2009"
_LONGEST_CARDINAL = 12  # digits; what is longer is read digit by digit
_PAIR = 2  # digits of cents, and of the groups of a French telephone number
_REQUIRED = {"locale", "decimal", "thousands", "point", "fraction", "minus", "symbols"}
_KEYS = _REQUIRED | {
    *("num2words", "cldr", "years", "fixes", "forms", "feminine", "neuter", "patterns", "units"),
    *("money", "magnitudes", "magnitude_form", "currencies", "kings", "queens", "range"),
    *("fractions", "mixed", "telephone", "fraction_agrees"),
}


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
        if "num2words" not in rules and "cardinal" not in rules.get("cldr", {}):
            raise ValueError(f"{source}: numbers: expected num2words, or cldr with a cardinal")
        self._rules = rules
        self._locale = Locale.parse(rules["locale"])
        self._speller = Speller(rules)
        self._genders = {unit: "f" for unit in rules.get("feminine", [])}
        self._genders |= {unit: "n" for unit in rules.get("neuter", [])}
        self._months: list[str] = [
            self._locale.months["format"]["wide"][month].lower() for month in range(1, 13)
        ]
        own: Mapping[str, Mapping[str, str]] = rules.get("currencies", {})
        of = rules.get("money", {}).get("of", "")
        self._currencies: dict[str, Mapping[str, str]] = {
            **{sign: _currency(code, self._locale, of) for sign, code in CURRENCIES.items()},
            **own,
        }
        self._units = UNITS | dict.fromkeys(rules.get("units", {}), "")
        if "%" not in rules["symbols"]:
            self._units["%"] = "concentr-percent"
        self._compile()

    def _compile(self) -> None:
        rules = self._rules
        group = rf"[{re.escape(rules['thousands'])}{_SPACES}]"
        macros = _MACROS | {
            "month_name": f"((?i:{'|'.join(map(re.escape, self._months))}))",
            "king": _any_of(rules.get("kings", [])),
            "queen": _any_of(rules.get("queens", [])),
            "count": rf"(\d{{1,3}}(?:{group}\d{{3}})*)",
        }
        self._patterns = [
            (
                re.compile(re.sub(r"<(\w+)>", lambda m: macros[m[1]], p).join(_ALONE)),
                reading,
                _ROMAN_IN_PATTERN.search(p) is not None,
            )
            for p, reading in rules.get("patterns", {}).items()
        ]
        whole = rf"\d{{1,3}}(?:{group}\d{{3}})+(?!\d)|\d+"
        decimal = re.escape(rules["decimal"])
        number = rf"(?<!\d)({whole})(?:{decimal}(\d+))?"
        currency = _any_of(self._currencies)
        # A dash after a word or a number is no sign: 2019-2020, 6 -7.
        self._minus = re.compile(rf"(?<![^\W{SPACELESS}])(?<!\d )[{_DASHES}](?={currency}?\d)")
        self._magnitudes = rules.get("magnitudes", {})
        magnitude = rf"(?:\s?{_any_of(self._magnitudes)}(?!\w))"
        before = r"(?<!\w)"  # of a currency's code: no word ends in one
        self._small = rules.get("money", {}).get("magnitudes", {})  # only beside a currency
        tens = rf"(?:\s?{_any_of(self._magnitudes | self._small)}(?!\w))?"
        self._money_first = re.compile(rf"{before}{currency}\s?{number}{tens}")
        # 1 € 50 and 1€50, but in 2020 $50
        end = r"(?![\w%]|[.,:/]\d|\s\d)"
        cents = rf"(?![^\W_])(?:\s(\d\d){end})?"
        self._money_last = re.compile(rf"{number}{tens}\s?{currency}{cents}")
        self._money_between = re.compile(rf"{number}(){currency}(\d\d){end}")
        self._large = re.compile(number + magnitude)
        self._measure = re.compile(rf"{number}\s?{_any_of(self._units)}(?![\w²³])")
        self._number = re.compile(number)
        self._decimals = None if rules["point"] else re.compile(rf"\d{decimal}\d")
        amount = rf"\d+(?:{group}\d{{3}})*(?:{decimal}\d+)?"
        self._range = re.compile(
            rf"(?<![\w.,:/{_DASHES}])({amount})(\s?[{_DASHES}]\s?)({amount})"
            rf"(?![\d{_DASHES}]|[.,:/]\d|\s?[–—]\s?\d)"
        )
        self._fraction_of = re.compile(
            r"(?<![\w.,:/+-])(?:(\d+) )?(\d{1,4})/(\d{1,4})(?![\w/]|[.,:]\d)"
        )
        self._symbols = str.maketrans({s: f" {w} " for s, w in rules["symbols"].items()})
        self._arabic = str.maketrans({"٫": rules["decimal"], "٬": rules["thousands"][:1]})
        symbols = re.escape("%".join(["", *rules["symbols"]]) + "".join(_VULGAR))
        self._needed = re.compile(rf"[\d{symbols}]|\b(?:[IVXLC]{{2,}}|[IVX]\b|I(?=(?:er|re)\b))")

    def __call__(self, text: str) -> tuple[str, list[str]]:
        """Returns text with words for its numbers and symbols, and what is in doubt in it.

        Args:
            text: As written: upper and lower case tell units and Roman numerals.
        """
        if not self._needed.search(text):
            return text, []
        doubts: list[str] = []
        if self._decimals and (found := self._decimals.search(text)):
            doubts.append(f"a decimal number, of which the rules have no word: {found[0]}")
        if not text.isascii():
            text = "".join(map(_ascii_digit, text)).translate(self._arabic)
        text = _VULGAR_AFTER.sub(
            lambda m: f"{m[1]} {_VULGAR[m[2]]}" if m[1] else _VULGAR[m[2]], text
        )
        text = _replace(_TELEPHONE, partial(self._telephone, doubts), text)
        text = self._range.sub(self._from_to, text)
        text = self._minus.sub(f"{self._rules['minus']} ", text)
        present = {True: _ROMAN_PART.search(text), False: _DIGIT.search(text)}
        for pattern, reading, roman in self._patterns:
            if present[roman]:
                text = pattern.sub(partial(self._read, reading), text)
        text = _replace(self._fraction_of, partial(self._ratio, doubts), text)
        text = _replace(self._money_between, lambda m: self._money(*m.groups()), text)
        text = _replace(self._money_last, lambda m: self._money(*m.groups()), text)
        text = _replace(
            self._money_first, lambda m: self._money(m[2], m[3], m[4], m[1], None), text
        )
        text = _replace(self._large, lambda m: self._counted_large(*m.groups()), text)
        text = _replace(self._measure, lambda m: self._quantity(*m.groups()), text)
        text = _replace(self._number, partial(self._bare, doubts), text)
        text = _ROMAN_ALONE.sub(partial(self._roman, doubts), text)
        return text.translate(self._symbols), doubts

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
            forms = [flag for flag in flags if flag not in ("ordinal", "year", "roman")]
            return self._words(int(_digits(group)), kind, forms)

        return re.sub(r"{([^{}]*)}", field, reading)

    def _telephone(self, doubts: list[str], match: re.Match[str]) -> str:
        """Digits in words, one by one or in pairs; a date, or a number that is short, as it was."""
        written = match[0]
        digits = _digits(written)
        if len(digits) < _SHORTEST_TELEPHONE or _DATE.fullmatch(written):
            return written
        doubts.append(f"a telephone number, or a code: {written}")
        plus = f"{self._rules['symbols'].get('+', '')} " if written[0] == "+" else ""
        if self._rules.get("telephone") != "pairs" or len(digits) % _PAIR:
            return plus + self._one_by_one(digits)
        pairs = [digits[i : i + _PAIR] for i in range(0, len(digits), _PAIR)]
        return plus + " ".join(map(self._integer, pairs))

    def _from_to(self, match: re.Match[str]) -> str:
        """A range with its word; of a score or a code, 3-1 or 0-2, the numbers alone."""
        first, dash, second = match.groups()
        spaced, hyphen = dash != dash.strip(), dash.strip() in "-‐‑"
        if spaced and hyphen:
            return match[0]
        ascending = self._float(first) < self._float(second)
        if not ascending and spaced:
            return match[0]
        if not ascending or (hyphen and first.startswith("0")):
            return f"{first}  {second}"
        return str(
            self._rules.get("range", "{1}  {2}").replace("{1}", first).replace("{2}", second)
        )

    def _float(self, amount: str) -> float:
        whole, _, fraction = amount.partition(self._rules["decimal"])
        return _value(whole, fraction or None)

    def _ratio(self, doubts: list[str], match: re.Match[str]) -> str:
        """A fraction in words; what is none, such as 24/7, as two numbers."""
        whole, above, below = match.groups()
        fractions = self._rules.get("fractions", {})
        name = f"{above}/{below}"
        if name not in fractions:
            season = len(above) == 4 and int(below) == (int(above) + 1) % 100
            if not season:
                doubts.append(f"a slash between numbers: {name}")
            return " ".join(filter(None, (whole, above, below)))
        if whole is None:
            return str(fractions[name])
        mixed = self._rules.get("mixed", {})
        if "noun" in mixed and re.match(r" [^\W\d]", match.string[match.end() :]):
            doubts.append(f"a fraction before its noun: {match[0]}")
        reading = mixed.get(f"{whole} {name}") or mixed.get(name) or mixed.get("other", "{1} {2}")
        return self._read(reading.replace("{2}", fractions[name]), match)

    def _roman(self, doubts: list[str], match: re.Match[str]) -> str:
        value = roman_value(match[1])
        if value is None:
            return match[1]
        doubts.append(f"a Roman numeral: {match[1]}")
        return self._words(value)

    def _money(
        self, whole: str, fraction: str | None, magnitude: str | None, sign: str, cents: str | None
    ) -> str:
        """An amount: "five euros fifty", "two point five million euros"."""
        money = self._rules.get("money", {})
        forms = self._currencies[sign]
        if magnitude:
            unit = forms.get("of") or forms.get("many") or forms["other"]
            after = f" {cents}" if cents else ""
            return f"{self._counted_large(whole, fraction, magnitude)} {unit}{after}"
        after = ""
        if cents and fraction:
            after = f" {cents}"  # another number
        elif cents or (fraction and len(fraction) == _PAIR):
            value = int(cents or fraction or 0)
            fraction = None
            if value:
                words = self._words(value, forms=[money.get("form", "")])
                after = " ".join(filter(None, (money.get("joint"), words, money.get("after"))))
        number = self._plain(whole, fraction, self._genders.get(sign, "m"))
        return f"{number} {self._plural(forms, whole, fraction)} {after}"

    def _counted_large(self, whole: str, fraction: str | None, magnitude: str) -> str:
        """A number of thousands, millions or more: "two million", "dwa miliony"."""
        number = self._plain(whole, fraction, self._rules.get("magnitude_form", "m"))
        read = self._magnitudes.get(magnitude) or self._small[magnitude]
        word = read if isinstance(read, str) else self._plural(read, whole, fraction)
        return f"{number} {word}"

    def _plural(self, forms: Mapping[str, str], whole: str, fraction: str | None) -> str:
        category = self._locale.plural_form(_value(whole, fraction))
        return forms.get(category) or forms["other"]

    def _quantity(self, whole: str, fraction: str | None, unit: str) -> str:
        """A number with a unit, in the CLDR's words for it."""
        number = self._plain(whole, fraction, self._genders.get(unit, "m"))
        if own := self._rules.get("units", {}).get(unit):
            return f"{number} {self._plural(own, whole, fraction)}"
        name = self._units[unit]
        written = format_unit(_value(whole, fraction), name, locale=self._locale)
        word = re.sub(_FIGURES, "", written)
        # A unit of which the CLDR has no word in this language stays as it is.
        known = word and name not in word and word != re.sub(r"\W", "", unit)
        return f"{number} {word if known else unit}"

    def _bare(self, doubts: list[str], match: re.Match[str]) -> str:
        if len(_digits(match[1])) > _LONGEST_CARDINAL:
            doubts.append(f"a long number: {match[1]}")
        return self._plain(match[1], match[2])

    def _plain(self, whole: str, fraction: str | None, gender: str | None = None) -> str:
        """A number in words; one that counts, and so has a gender, is never a year."""
        digits = _digits(whole)
        forms = (
            [gender] if gender and (fraction is None or self._rules.get("fraction_agrees")) else []
        )
        if digits == whole and fraction is None and not gender and self._is_year(digits):
            words = self._words(int(digits), "year")
        else:
            words = self._integer(digits, forms)
        if fraction is not None:
            words += f" {self._rules['point']} {self._fraction(fraction)}"
        return words

    def _integer(self, digits: str, forms: Iterable[str] = ()) -> str:
        if (len(digits) > 1 and digits[0] == "0") or len(digits) > _LONGEST_CARDINAL:
            return self._one_by_one(digits)
        return self._words(int(digits), forms=forms)

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

    def _words(self, number: int, kind: str = "cardinal", forms: Iterable[str] = ()) -> str:
        if number >= 10**_LONGEST_CARDINAL:
            return self._one_by_one(str(number))
        return self._speller(number, kind, forms)


def _currency(code: str, locale: Locale, of: str) -> dict[str, str]:
    """The CLDR's names of a currency by plural category, and what follows millions."""
    numbers = {"one": 1, "few": 3, "many": 5, "other": 1000}
    names = {
        category: re.sub(
            _FIGURES, "", format_currency(number, code, locale=locale, format_type="name")
        )
        for category, number in numbers.items()
        if category in {*locale.plural_form.tags, "other"}
    }
    return names | ({"of": f"{of} {names['other']}"} if of else {})


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
