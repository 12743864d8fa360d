"""Where a long text and a long recording surely meet, so that what is between can be aligned alone.

The model's own greedy transcript, full of errors, is compared with the text letter by letter.
A run of letters that is found once in each, and is longer than chance gives between strings of
their lengths, is an anchor.  Between two anchors the strings are shorter, so that shorter runs are
beyond chance there: the search goes on inside until it finds nothing.

Memory and time of a forced alignment grow with frames times tokens; cut at anchors into sections
of some seconds, those of a recording grow with its length alone.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

#: Two letters of speech in one language are the same by chance about once in so many, in runs.
_LETTERS = 8
#: Letters beyond what chance gives once in a pair of strings.
_SURPLUS = 2
_SHORTEST = 6
#: A text of which more runs than that come again, as a protocol's, needs longer ones.
_REPEATED = 0.05
#: How much faster or slower than the whole the speech between two anchors may be.
_STRETCH = 4.0


class Run(NamedTuple):
    """Letters that two strings share: where it begins in each, and how many."""

    heard: int
    text: int
    size: int


def runs(heard: str, text: str) -> list[Run]:
    """The anchors of a transcript in a text, in order.

    Args:
        heard: what the model hears, without spaces.
        text: what should be heard, likewise.
    """
    found: list[Run] = []
    todo = [(0, len(heard), 0, len(text))]
    while todo:
        a1, a2, b1, b2 = todo.pop()
        inside = _unique_runs(heard[a1:a2], text[b1:b2])
        shifted = [Run(a1 + run.heard, b1 + run.text, run.size) for run in inside]
        found += shifted
        if shifted:
            ends = [Run(a1, b1, 0), *shifted, Run(a2, b2, 0)]
            todo += [
                (left.heard + left.size, right.heard, left.text + left.size, right.text)
                for left, right in itertools.pairwise(ends)
            ]
    return _plausible(sorted(found))


def _unique_runs(heard: str, text: str) -> list[Run]:
    """The runs of a length beyond chance, of which no part comes twice in either string."""
    if min(len(heard), len(text)) < _SHORTEST:
        return []
    chance = math.log(len(heard) * len(text)) / math.log(_LETTERS)
    size = max(_SHORTEST, math.ceil(chance) + _SURPLUS)
    while _repeated(text, size) > _REPEATED and size < len(text):
        size += 2
    pairs = [_grams(heard, size), _grams(text, size)]
    counts = [Counter(grams) for grams in pairs]
    shared = {gram for gram, n in counts[0].items() if n == 1 and counts[1][gram] == 1}
    # A gram that is not shared is another in each string, and costs difflib nothing.
    one, other = (
        [gram if gram in shared else f"{side}{place}" for place, gram in enumerate(grams)]
        for side, grams in zip("<>", pairs, strict=True)
    )
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return [Run(a, b, n + size - 1) for a, b, n in blocks if n]


def _repeated(text: str, size: int) -> float:
    """The share of a text's grams that come more than once in it."""
    grams = _grams(text, size)
    return 1 - len(set(grams)) / max(len(grams), 1)


def _grams(letters: str, size: int) -> list[str]:
    return [letters[i : i + size] for i in range(len(letters) - size + 1)]


def _plausible(found: Sequence[Run]) -> list[Run]:
    """Without runs that stand alone: neither neighbour is as far off in one string as the other."""
    kept = []
    for number, run in enumerate(found):
        near = [*found[max(0, number - 1) : number], *found[number + 1 : number + 2]]
        if run.size >= 2 * _SHORTEST + _SURPLUS or any(_agree(run, other) for other in near):
            kept.append(run)
    return kept


def _agree(one: Run, other: Run) -> bool:
    a, b = abs(one.heard - other.heard), abs(one.text - other.text)
    return max(a, b) <= _STRETCH * min(a, b)


def held_entries(found: Sequence[Run], entry_letters: Sequence[int]) -> set[int]:
    """The entries that an anchor has letters of."""
    bounds = [0, *itertools.accumulate(entry_letters)]
    held: set[int] = set()
    for run in found:
        first = bisect_right(bounds, run.text) - 1
        held.update(range(first, bisect_left(bounds, run.text + run.size)))
    return held


class Section(NamedTuple):
    """Entries, and the frames that they were said in: ranges, without their ends."""

    first_entry: int
    end_entry: int
    first_frame: int
    end_frame: int


def sections(
    found: Sequence[Run],
    letter_frames: Sequence[int],
    entry_letters: Sequence[int],
    phrases: Sequence[int],
    frames: int,
    shortest: int,
) -> Iterator[Section]:
    """Parts between anchors, cut where an anchor holds the end of a phrase and the next one.

    Args:
        found: the anchors.
        letter_frames: the frame of each letter that is heard.
        entry_letters: how many letters each entry has in the text.
        phrases: the phrase of each entry.
        frames: of the whole recording.
        shortest: frames of a section at least, but for the last.
    """
    first_entry = first_frame = 0
    bounds = [0, *itertools.accumulate(entry_letters)]
    entry = 0
    for run in found:
        best: tuple[int, int, int] | None = None
        while entry < len(bounds) and bounds[entry] < run.text + run.size:
            inside = min(bounds[entry] - run.text, run.text + run.size - bounds[entry])
            begins = 0 < entry < len(phrases) and phrases[entry] != phrases[entry - 1]
            if begins and inside >= 2 and entry > first_entry:  # letters on each side
                place = run.heard + bounds[entry] - run.text
                left, right = letter_frames[place - 1], letter_frames[place]
                if best is None or inside > best[0]:
                    best = (inside, entry, (left + right + 1) // 2)
            entry += 1
        if best and best[2] - first_frame >= shortest:
            yield Section(first_entry, best[1], first_frame, best[2])
            first_entry, first_frame = best[1], best[2]
    yield Section(first_entry, len(entry_letters), first_frame, frames)
