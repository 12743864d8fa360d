"""Utterances to train on, cut at pauses, and what did not match.

A recording is a row of entries with gaps between them.  A gap may be a place to cut, if it has a
pause; it must be one, if there is speech that the text does not have, if an entry is missing, or if
the pause is long.  Entries that are not sure are left out.  What is between two cuts is an
utterance, and among all ways to cut, the one is taken whose utterances are nearest to the length
wished for and whose pauses are longest.

How sure an entry is: the sum of the posteriors of the tokens in a stretch of speech around it, over
the number of these tokens and of those that the model hears there besides.  So a word that was not
said and one that was not written count alike.  An utterance is as sure as its least sure entry.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from icetransfer.data.features import FRAME_SHIFT
from icetransfer.data.long.heard import OUTPUT_FRAMES, OUTPUT_SECONDS, Heard, Peak
from icetransfer.data.long.path import STRAY_PEAKS, Timed
from icetransfer.data.long.pauses import quiet_frames, quiet_runs
from icetransfer.data.long.words import LongText

PAUSE_SECONDS = 0.15  # of quiet that is a place to cut; the closure of a plosive is shorter
LONG_PAUSE_SECONDS = 1.5  # of quiet that always is one: silence teaches nothing
MARGIN_SECONDS = 0.2  # of quiet that an utterance keeps at its ends
WINDOW_TOKENS = 20  # of a stretch of speech
FEW_TOKENS = 10  # fewer that stand alone match by chance: those that lack count as unheard
_NEAR_FRAMES = 2  # of 40 ms, by which a token may be heard before or after its entry
_SKIPPED = 2.0  # the cost of an entry that no utterance holds
_IN_A_SENTENCE = 0.3  # the cost of a cut in a sentence


@dataclass(frozen=True)
class Limits:
    """What is kept.

    Attributes:
        shortest: seconds of an utterance.
        longest: seconds of an utterance.
        confidence: the least.
    """

    shortest: float
    longest: float
    confidence: float


class Piece(NamedTuple):
    """An utterance that is kept, or something that is not.

    Attributes:
        start: seconds from the beginning of the recording.
        end: likewise.
        text: as written; "" of speech without text.
        confidence: of 1; None of what was not aligned.
        reason: why it is not kept; "" of an utterance.
        heard: the greedy transcript of that time, of what is not kept.
    """

    start: float
    end: float
    text: str
    confidence: float | None
    reason: str = ""
    heard: str = ""


class Gap(NamedTuple):
    """What is between two entries, or at an end of the recording.

    Attributes:
        before: where an utterance before it would end, in seconds; None if it cannot.
        after: where one behind it would begin; None if it cannot.
        pause: seconds of the quiet there.
        is_cut: whether an utterance may not hold it.
        stray: the tokens that are heard there and not written.
    """

    before: float | None
    after: float | None
    pause: float
    is_cut: bool
    stray: list[Peak]


class Cutter:
    """Cuts one recording.

    Args:
        heard: the recording.
        text: its text.
        timed: when entries were said, by their numbers.
        limits: of what is kept.
        names: of the tokens.
        join: what stands between two entries, a space where the script has them.
    """

    def __init__(
        self,
        heard: Heard,
        text: LongText,
        timed: Mapping[int, Timed],
        limits: Limits,
        names: Sequence[str],
        join: str,
    ) -> None:
        self._heard, self._text, self._limits = heard, text, limits
        self._names, self._join = names, join
        self._timed = timed
        self._order = sorted(timed)
        self._gaps = _gaps(heard, [timed[i] for i in self._order], self._order)
        self._sure = self._confidences()

    def __call__(self) -> list[Piece]:
        """Utterances and what is not kept, in the order of the text."""
        reasons: dict[int, str] = {}
        kept: list[tuple[int, int]] = []
        for first, end in self._rows(self._limits.confidence):
            chosen = self._best_cuts(first, end)
            kept += chosen
            for a, b in _between(first, end, chosen):
                seconds = self._seconds(a, b)
                reason = f"shorter than {self._limits.shortest:g} s"
                if seconds >= self._limits.shortest:
                    reason = f"no pauses to cut it at within {self._limits.longest:g} s"
                reasons |= {self._order[k]: reason for k in range(a, b)}
        pieces: list[tuple[float, Piece]] = [  # with the number of the first entry, as their place
            (self._order[a], self._utterance(a, b)) for a, b in kept
        ]
        held = {self._order[k] for a, b in kept for k in range(a, b)}
        pieces += self._left_out(held, reasons)
        pieces += self._without_text()
        return [piece for _, piece in sorted(pieces, key=lambda item: item[0])]

    def _rows(self, confidence: float) -> Iterator[tuple[int, int]]:
        """Ranges of aligned entries that an utterance may hold together."""
        first = 0
        for k in range(len(self._order) + 1):
            is_last = k == len(self._order)
            is_bad = not is_last and not self._is_usable(k, confidence)
            if is_last or is_bad or self._gaps[k].is_cut:
                if k > first:
                    yield first, k
                first = k + is_bad

    def _is_usable(self, k: int, confidence: float) -> bool:
        if self._text.entries[self._order[k]].phrase in self._text.problems:
            return False
        return confidence == 0 or self._sure[k] >= confidence

    def _confidences(self) -> list[float]:
        """How sure each aligned entry is."""
        sure: list[float] = []
        self._sure = []
        for first, end in self._rows(0):
            scores = [self._timed[i].scores for i in self._order[first:end]]
            tokens = [0, *itertools.accumulate(map(len, scores))]
            sums = [0.0, *itertools.accumulate(map(sum, scores))]
            inner = (len(self._gaps[k].stray) for k in range(first + 1, end))
            stray = [0, *itertools.accumulate(inner)]
            found = []
            for k in range(end - first):
                middle = (tokens[k] + tokens[k + 1]) / 2
                a = max(0, bisect_right(tokens, middle - WINDOW_TOKENS / 2) - 1)
                b = min(end - first, bisect_left(tokens, middle + WINDOW_TOKENS / 2))
                heard = tokens[b] - tokens[a] + stray[b - 1] - stray[a]
                found.append((sums[b] - sums[a]) / max(heard, FEW_TOKENS))
            sure += [math.nan] * (first - len(sure)) + found
        return sure + [math.nan] * (len(self._order) - len(sure))

    def _best_cuts(self, first: int, end: int) -> list[tuple[int, int]]:
        """The utterances of a row, as ranges: the cheapest of all ways to cut."""
        shortest, longest = self._limits.shortest, self._limits.longest
        wished = (shortest + longest) / 2
        costs, ways = [0.0], [first]  # up to each gap, and the gap at which its last part begins
        for k in range(first + 1, end + 1):
            best, way = costs[-1] + _SKIPPED, -1
            stop = self._gaps[k].before
            for a in range(k - 1, first - 1, -1) if stop is not None else ():
                begin = self._gaps[a].after
                if begin is None or stop is None or stop - begin < shortest:
                    continue
                if stop - begin > longest:
                    break
                length = (stop - begin) / wished - 1
                cost = costs[a - first] + length**2 / 2 + self._cut_cost(k)
                if cost < best:
                    best, way = cost, a
            costs.append(best)
            ways.append(way)
        chosen = []
        k = end
        while k > first:
            if (a := ways[k - first]) >= 0:
                chosen.append((a, k))
                k = a
            else:
                k -= 1
        return chosen[::-1]

    def _cut_cost(self, k: int) -> float:
        """A short pause, or one in a sentence, is a worse place to cut."""
        cost = 0.5 * math.exp(-self._gaps[k].pause / 0.3)
        if 0 < k < len(self._order):
            one, other = (self._text.entries[self._order[n]].phrase for n in (k - 1, k))
            cost += _IN_A_SENTENCE * (one == other)
        return cost

    def _utterance(self, first: int, end: int) -> Piece:
        start, stop = self._gaps[first].after, self._gaps[end].before
        assert start is not None and stop is not None
        return Piece(start, stop, self._written(self._order[first:end]), min(self._sure[first:end]))

    def _left_out(self, held: set[int], reasons: Mapping[int, str]) -> Iterator[tuple[int, Piece]]:
        """The entries that no utterance holds, joined where they stand together for one reason."""
        places = {i: k for k, i in enumerate(self._order)}

        def reason(i: int) -> str:
            if i not in places:
                return "not heard"
            problem = self._text.problems.get(self._text.entries[i].phrase, "")
            return problem or reasons.get(i, "not sure enough")

        rest = (i for i in range(len(self._text.entries)) if i not in held)
        for why, together in itertools.groupby(_runs(rest, reason), key=lambda item: item[1]):
            entries = [i for i, _ in together]
            yield entries[0], self._rejected(entries, why[0], places)

    def _rejected(self, entries: list[int], reason: str, places: Mapping[int, int]) -> Piece:
        timed = self._timed
        if entries[0] in places:
            first, last = timed[entries[0]].first, timed[entries[-1]].last + 1
            ks = [places[i] for i in entries]
            sure = min(self._sure[ks[0] : ks[-1] + 1])
            confidence = None if math.isnan(sure) else sure
        else:
            k = bisect_left(self._order, entries[0])
            first = timed[self._order[k - 1]].last + 1 if k else 0
            last = timed[self._order[k]].first if k < len(self._order) else self._heard.frames
            confidence = None
        return Piece(
            first * OUTPUT_SECONDS, last * OUTPUT_SECONDS, self._written(entries), confidence,
            reason, self._heard.transcript(self._names, first, last),
        )  # fmt: skip

    def _without_text(self) -> Iterator[tuple[float, Piece]]:
        """Speech between two entries that follow each other in the text, and at the ends."""
        bounds = [-1, *self._order, len(self._text.entries)]
        for k, gap in enumerate(self._gaps):
            if len(gap.stray) >= STRAY_PEAKS and bounds[k] + 1 == bounds[k + 1]:
                first, end = gap.stray[0].first, gap.stray[-1].end
                heard = self._heard.transcript(self._names, first, end)
                yield bounds[k + 1] - 0.5, Piece(
                    first * OUTPUT_SECONDS, end * OUTPUT_SECONDS, "", None,
                    "speech without text", heard,
                )  # fmt: skip

    def _written(self, entries: Sequence[int]) -> str:
        return self._join.join(self._text.entries[i].written for i in entries)

    def _seconds(self, first: int, end: int) -> float:
        timed = [self._timed[self._order[k]] for k in (first, end - 1)]
        return (timed[1].last + 1 - timed[0].first) * OUTPUT_SECONDS


def _between(first: int, end: int, chosen: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of a range that none of the chosen ones holds."""
    for a, b in [*chosen, (end, end)]:
        if a > first:
            yield first, a
        first = b


def _runs(
    numbers: Iterator[int], reason: Callable[[int], str]
) -> Iterator[tuple[int, tuple[str, int]]]:
    """Each number with a key that changes with its reason, and where numbers are missing."""
    for place, i in enumerate(numbers):
        yield i, (reason(i), i - place)


def _gaps(heard: Heard, timed: Sequence[Timed], order: Sequence[int]) -> list[Gap]:
    """The gaps before, between and behind the aligned entries."""
    quiet = quiet_frames(heard.energy)
    stray = _stray_peaks(heard, timed)
    begins = [peak.first for peak in stray]
    lasts = [-1, *(one.last for one in timed)]
    firsts = [*(one.first for one in timed), heard.frames]
    found = []
    for k, (last, first) in enumerate(zip(lasts, firsts, strict=True)):
        inside = stray[bisect_left(begins, last) : bisect_left(begins, first)]
        pauses = quiet_runs(quiet, OUTPUT_FRAMES * (last + 1), OUTPUT_FRAMES * first, PAUSE_SECONDS)
        follows = 0 < k < len(timed) and order[k] == order[k - 1] + 1
        is_cut = not follows or len(inside) >= STRAY_PEAKS
        found.append(_gap(pauses, inside, is_cut))
    for k, edge in ((0, 0.0), (len(timed), heard.frames * OUTPUT_SECONDS)):
        if not found[k].stray and not found[k].pause:  # a recording that begins with a word
            found[k] = found[k]._replace(before=edge, after=edge)
    return found


def _gap(pauses: list[tuple[int, int]], stray: list[Peak], is_cut: bool) -> Gap:
    if not pauses:
        return Gap(None, None, 0.0, is_cut, stray)
    longest = max(pauses, key=lambda run: run[1] - run[0])
    seconds = (longest[1] - longest[0]) * FRAME_SHIFT
    is_cut = is_cut or seconds >= LONG_PAUSE_SECONDS
    ends = (pauses[0], pauses[-1]) if len(stray) >= STRAY_PEAKS else (longest, longest)
    before: float | None
    after: float | None
    before, after = (_edge(ends[0], at_end=False), _edge(ends[1], at_end=True))
    if len(stray) >= STRAY_PEAKS:  # none of the speech without text may be inside
        before = None if OUTPUT_FRAMES * stray[0].first < ends[0][0] else before
        after = None if OUTPUT_FRAMES * stray[-1].first > ends[1][1] else after
    return Gap(before, after, seconds, is_cut, stray)


def _edge(run: tuple[int, int], at_end: bool) -> float:
    """Where an utterance ends in a pause, or begins in it, in seconds."""
    length = run[1] - run[0]
    margin = min(round(MARGIN_SECONDS / FRAME_SHIFT), length // 2)
    return float((run[1] - margin if at_end else run[0] + margin) * FRAME_SHIFT)


def _stray_peaks(heard: Heard, timed: Sequence[Timed]) -> list[Peak]:
    """The tokens that are heard where no entry is."""
    firsts = [one.first for one in timed]
    stray = []
    for peak in heard.peaks:
        k = bisect_right(firsts, peak.end - 1 + _NEAR_FRAMES) - 1
        if k < 0 or timed[k].last + _NEAR_FRAMES < peak.first:
            stray.append(peak)
    return stray
