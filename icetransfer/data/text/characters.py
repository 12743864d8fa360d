"""Characters: other shapes of the same one, marks of a script, and scripts without spaces."""

from __future__ import annotations

import re
import unicodedata

#: Kinds of compatibility decompositions (Unicode Standard Annex 15, table 6) that are other shapes
#: of a character. Superscripts and vulgar fractions are read aloud differently, and stay.
_SHAPES = (
    "<wide>", "<narrow>", "<small>", "<sub>", "<square>", "<font>", "<compat>", "<circle>",
    "<initial>", "<medial>", "<final>", "<isolated>", "<vertical>",
)  # fmt: skip
#: The scripts that put no space between words, in a class of a regular expression: Han, kana,
#: Thai, Lao, Khmer, Myanmar and Tibetan.
SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_BESIDE_SPACELESS = re.compile(f"(?<=[{SPACELESS}]) | (?=[{SPACELESS}])")
# Vowel signs and accents that Arabic and Hebrew spelling leaves out, the Koran's among them.
_VOWEL_SIGNS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc"
    "\u06df-\u06e8\u06ea-\u06ed\u08d3-\u08ff]"
)
# A geresh makes another consonant of these; after any other letter it ends an abbreviation.
_GERESH = re.compile("(?<=[גזצץתדטחע])['’‘׳](?=[א-ת])|(?<=[גזצץ])['’‘׳](?!\\w)")
_GERSHAYIM = re.compile('(?<=[א-ת])["״”“](?=[א-ת])')
_TATWEEL = "\u0640"


class _Shapes(dict[int, str]):
    """The plain form of each character that is another's shape, found when it is asked for."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        plain = char
        # The decompositions of Thai, Lao and Tibetan vowels are other spellings, and those that
        # begin with a space are accents that stand alone.
        if unicodedata.decomposition(char).startswith(_SHAPES) and not "\u0e00" <= char <= "\u0fff":
            folded = unicodedata.normalize("NFKC", char)
            plain = char if folded.startswith(" ") or char == "№" else folded
        self[code] = plain
        return plain


_SHAPES_OF = _Shapes()


def compose(text: str) -> str:
    """Returns text in NFC, with the plain character for a ligature, a full-width form, or ₂.

    º, ª, ², ½ and № stay: they are read in their own way.

    Args:
        text: Any text.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text.translate(_SHAPES_OF))


def without_vowel_signs(text: str) -> str:
    """Returns Arabic or Hebrew text without its vowel signs and accents."""
    return _VOWEL_SIGNS.sub("", text)


def join_hebrew(text: str) -> str:
    """Returns text with ' for a geresh that is spelling, and no gershayim inside acronyms."""
    return _GERSHAYIM.sub("", _GERESH.sub("'", text))


def without_tatweel(text: str) -> str:
    """Returns text without the stroke that stretches Arabic words."""
    return text.replace(_TATWEEL, "")


def close_up(text: str) -> str:
    """Returns text without the spaces that stand beside a character of a script without them."""
    return _BESIDE_SPACELESS.sub("", text)


def graphemes(text: str) -> list[str]:
    """Splits text into what readers count as characters: one with the marks on it is one.

    Args:
        text: In NFC.
    """
    if text.isascii():
        return list(text)
    found: list[str] = []
    for char in text:
        if found and unicodedata.category(char)[0] == "M":
            found[-1] += char
        else:
            found.append(char)
    return found
