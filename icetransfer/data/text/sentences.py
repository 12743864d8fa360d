"""Text of any kind as sentences: one a line, or prose, whose lines may break anywhere.

A file is taken for prose that was broken at a width where lines end without a full stop and the
next ones begin in lower case, while full stops stand inside lines.  An empty line ends a sentence,
and so does a mark of its end before a space and a capital, a digit or an opening quotation mark,
unless the mark belongs to an abbreviation or an initial.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import NamedTuple

_SAMPLE = 200  # lines from which the kind of a file is told
_BROKEN = 0.2  # of them, in lower case after a line that does not end, make it prose
_ENDS = ".!?…。！？"
_CLOSING = "\"'”’»)]"
_END = re.compile(rf"(?<=[{_ENDS}])([{re.escape(_CLOSING)}]*)\s+(?=[\"'“„‘«(\[¿¡]*[^\W_a-z])")
_LAST_WORD = re.compile(r"(\S+)\s*$")


class Line(NamedTuple):
    """A sentence, and the line of its file that it begins in."""

    number: int
    text: str


def sentences(lines: Iterable[str], abbreviations: Collection[str] = ()) -> Iterator[Line]:
    """The sentences of a text.

    Args:
        lines: of the text, without ends of lines.
        abbreviations: in small letters, such as "z.b.", whose point ends no sentence.
    """
    rest = iter(lines)
    first = list(islice(rest, _SAMPLE))
    numbered = enumerate(chain(first, rest), 1)
    blocks = _paragraphs(numbered) if _is_broken(first) else numbered
    for number, text in blocks:
        for sentence in split(text, abbreviations):
            yield Line(number, sentence)


def split(text: str, abbreviations: Collection[str] = ()) -> list[str]:
    """The sentences of a paragraph."""
    found, begin = [], 0
    for end in _END.finditer(text):
        following = text[end.end() :].lstrip("\"'“„‘«([¿¡")[:1]
        if following.islower() or _is_abbreviation(text[begin : end.start()], abbreviations):
            continue
        found.append(text[begin : end.end(1)])
        begin = end.end()
    found.append(text[begin:])
    return [sentence for part in found if (sentence := part.strip())]


def _is_abbreviation(text: str, abbreviations: Collection[str]) -> bool:
    """Whether the point that a text ends in is of an abbreviation, or of an initial."""
    found = _LAST_WORD.search(text)
    if not found or not text.endswith("."):
        return False
    word = found[1].lstrip("\"'“„‘«(").lower()
    return word in abbreviations or bool(re.fullmatch(r"[^\W\d_]\.", word))


def _is_broken(lines: Sequence[str]) -> bool:
    pairs = [(a.strip(), b.strip()) for a, b in pairwise(lines) if a.strip() and b.strip()]
    broken = sum(b[0].islower() and a[-1] not in _ENDS + _CLOSING for a, b in pairs)
    inside = any(_END.search(line) for line in lines)
    return inside and broken > _BROKEN * max(1, len(pairs))


def _paragraphs(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Joins the lines between empty ones."""
    begin, parts = 0, list[str]()
    for number, line in lines:
        if line.strip():
            begin = begin if parts else number
            parts.append(line.strip())
        elif parts:
            yield begin, " ".join(parts)
            parts = []
    if parts:
        yield begin, " ".join(parts)
