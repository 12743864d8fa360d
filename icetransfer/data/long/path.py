"""When each entry of a text was said, and how surely: forced alignment from anchor to anchor.

Viterbi finds the likeliest path of the tokens through the CTC posteriors (torchaudio).  Two things
are not as in an utterance whose text is known to be right.

Speech without text: the blank may stand for whatever the model hears, at a cost for each frame, so
that a jingle or a sentence that nobody wrote down lies between two tokens wherever it comes.  This
is the star of torchaudio's tutorial, without the need to say where.

Text without speech: a footnote must be put somewhere by the path, and pushes its neighbours aside.
So phrases that were not heard are taken out, and the section is aligned once more without them.

Sources: Graves et al., Connectionist temporal classification (2006); Kuerzinger et al.,
CTC-segmentation of large corpora (2020), for the score of the worst stretch; Pratap et al., Scaling
speech technology to 1,000+ languages (2023), for the star.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.functional import forced_align, merge_tokens

from icetransfer.data.long.anchors import Section
from icetransfer.data.long.heard import Heard
from icetransfer.data.long.words import Entry
from icetransfer.data.tokenizer import BLANK_ID

#: What it costs, in log probability a frame, that the likeliest token there is not in the text.
GARBAGE_COST = 2.0
#: A phrase of which the tokens score less on average was not said.
UNSAID = 0.15
#: Frames times states of a path at most: bytes of memory.
LARGEST = 400_000_000
#: Tokens that are heard and not written, in one place, that are speech without text.
STRAY_PEAKS = 3
#: A second between two tokens of a phrase, with such speech in it, is not of this phrase, if so few
#: tokens are beyond it.
TORN_FRAMES = 25
TORN_TOKENS = 8
#: A phrase that was taken out comes back if its tokens score that alone.
REVIVED = 0.4
#: Tokens of a text that was read, by frame, at most; with more, a path has no room to choose.
FULLEST = 0.6
_ROUNDS = 12


class _Span(NamedTuple):
    """The first and the last frame of a token, and its score."""

    first: int
    last: int
    score: float


#: The spans of the tokens of each entry, by its number, in order.
_Spans = dict[int, list[_Span]]


class Timed(NamedTuple):
    """When an entry was said.

    Attributes:
        first: the frame (40 ms) of its first token.
        last: that of its last one.
        scores: of each of its tokens, its posterior over that of the likeliest token of the frame.
    """

    first: int
    last: int
    scores: tuple[float, ...]


def align_section(
    heard: Heard, entries: Sequence[Entry], section: Section, anchored: Container[int]
) -> dict[int, Timed]:
    """Aligns the entries of a section.

    Args:
        heard: the recording.
        entries: of the whole text.
        section: which of them, and which frames.
        anchored: the phrases that an anchor has a part of.

    Returns:
        When each was said, by its number; those that were not are absent.
    """
    frames = np.arange(section.first_frame, section.end_frame)
    spans = _settled(heard, entries, frames, _that_fit(heard, entries, section, anchored))
    _revive(heard, entries, section, spans)
    return {
        i: Timed(of[0].first, of[-1].last, tuple(span.score for span in of))
        for i, of in sorted(spans.items())
    }


def _settled(
    heard: Heard, entries: Sequence[Entry], frames: NDArray[np.int64], chosen: list[int]
) -> _Spans:
    """Aligns entries again and again, until no phrase is unsaid and none is torn apart."""
    spans: _Spans = {}
    for _ in range(_ROUNDS):
        if not chosen:
            return {}
        spans = _align(heard, entries, frames, chosen)
        phrases = _by_phrase(entries, spans)
        if unsaid := _unsaid({n: _mean_score(of) for n, of in phrases.items()}):
            chosen = [i for i in chosen if entries[i].phrase not in unsaid]
            spans = {i: spans[i] for i in chosen}
            continue
        rest = np.setdiff1d(frames, _between_parts(heard, [*phrases.values()]))
        if len(rest) == len(frames) or len(rest) < _room(chosen, entries):
            break
        frames = rest
    return spans


def _revive(heard: Heard, entries: Sequence[Entry], section: Section, spans: _Spans) -> None:
    """Adds phrases that were pushed aside by others, which were not said, and went with them.

    Each is tried alone, where speech without text is between what was said before and after it.
    """
    begins = [peak.first for peak in heard.peaks]
    gone = [i for i in range(section.first_entry, section.end_entry) if i not in spans]
    for _, together in itertools.groupby(gone, lambda i: entries[i].phrase):
        phrase = [*together]
        first = max((of[-1].last + 1 for i, of in spans.items() if i < phrase[0]), default=-1)
        end = min((of[0].first for i, of in spans.items() if i > phrase[-1]), default=-1)
        first = section.first_frame if first < 0 else first
        end = section.end_frame if end < 0 else end
        peaks = bisect_left(begins, end) - bisect_left(begins, first)
        needed = _room(phrase, entries)
        if peaks < STRAY_PEAKS or needed > end - first or needed * (end - first) > LARGEST // 2:
            continue
        alone = _align(heard, entries, np.arange(first, end), phrase)
        if _mean_score(itertools.chain(*alone.values())) >= REVIVED:
            spans |= alone


def _unsaid(scores: dict[int, float]) -> set[int]:
    """The phrases that were not said: of several in a row the worse half, as they push others."""
    unsaid: set[int] = set()
    for is_low, row in itertools.groupby(scores, lambda phrase: scores[phrase] < UNSAID):
        if is_low:
            worst = sorted(row, key=lambda phrase: scores[phrase])
            unsaid |= {*worst[: (len(worst) + 1) // 2]}
    return unsaid


def _by_phrase(entries: Sequence[Entry], spans: _Spans) -> dict[int, list[_Span]]:
    """The spans of each phrase's tokens."""
    found: dict[int, list[_Span]] = {}
    for i, of in spans.items():
        found.setdefault(entries[i].phrase, []).extend(of)
    return found


def _mean_score(spans: Iterable[_Span]) -> float:
    scores = [span.score for span in spans]
    return sum(scores) / len(scores)


def _between_parts(heard: Heard, phrases: Sequence[Sequence[_Span]]) -> NDArray[np.int64]:
    """The frames of speech without text that tears a phrase apart.

    Its last letters, or its first words, are then found by chance on the other side: "De" of "De
    stoel" in a sentence before it that has no text and begins in the same way.  Without these
    frames, and those up to the next phrase on the side of the smaller part, it is together.
    """
    begins = [peak.first for peak in heard.peaks]
    found = [np.zeros(0, dtype=np.int64)]
    for number, of in enumerate(phrases):
        for place, (one, other) in enumerate(itertools.pairwise(of), 1):
            peaks = bisect_left(begins, other.first - 1) - bisect_right(begins, one.last + 1)
            smaller = min(place, len(of) - place)
            is_far = other.first - one.last >= TORN_FRAMES
            if not is_far or peaks < STRAY_PEAKS or smaller > TORN_TOKENS:
                continue
            first, end = one.last, other.first
            if 2 * place >= len(of):  # most of it is before the gap
                end = phrases[number + 1][0].first if number + 1 < len(phrases) else of[-1].last + 1
                first += 2 * smaller + 1
            else:
                first = phrases[number - 1][-1].last + 1 if number else of[0].first
                end -= 2 * smaller + 1
            found.append(np.arange(first, max(first, end)))
    return np.concatenate(found)


def _that_fit(
    heard: Heard, entries: Sequence[Entry], section: Section, anchored: Container[int]
) -> list[int]:
    """Those entries that the frames can hold: all, or the phrases that are most like what is heard.

    More text than that was not read out between two anchors, or was in another recording.
    """
    chosen = [*range(section.first_entry, section.end_entry)]
    frames = section.end_frame - section.first_frame
    room = min(int(FULLEST * frames), LARGEST // max(frames, 1) // 2)
    if _room(chosen, entries) <= room:
        return chosen
    peaks = [p.token for p in heard.peaks if section.first_frame <= p.first < section.end_frame]
    shared = {*zip(peaks, peaks[1:], peaks[2:], strict=False)}

    def likeness(phrase: list[int]) -> tuple[bool, float]:
        tokens = [token for i in phrase for token in entries[i].tokens]
        threes = zip(tokens, tokens[1:], tokens[2:], strict=False)
        share = sum(three in shared for three in threes) / len(tokens)
        return entries[phrase[0]].phrase in anchored, share

    phrases = [[*group] for _, group in itertools.groupby(chosen, lambda i: entries[i].phrase)]
    kept: list[int] = []
    for phrase in sorted(phrases, key=likeness, reverse=True):
        room -= _room(phrase, entries) + 1
        if room < 0:
            break
        kept += phrase
    return sorted(kept)


def _room(chosen: Sequence[int], entries: Sequence[Entry]) -> int:
    """The frames that entries need at least: a blank parts a token from the same one."""
    tokens = [token for i in chosen for token in entries[i].tokens]
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))


@torch.inference_mode()
def _align(
    heard: Heard, entries: Sequence[Entry], frames: NDArray[np.int64], chosen: Sequence[int]
) -> _Spans:
    """The likeliest path of some entries through the given frames."""
    tokens = [token for i in chosen for token in entries[i].tokens]
    log_probs = torch.from_numpy(np.asarray(heard.log_probs[frames], dtype=np.float32))
    open_blank = log_probs.clone()
    best = log_probs.amax(dim=1)
    open_blank[:, BLANK_ID] = torch.maximum(log_probs[:, BLANK_ID], best - GARBAGE_COST)
    path, scores = forced_align(open_blank[None], torch.tensor([tokens]), blank=BLANK_ID)
    relative = log_probs - best[:, None]
    spans = iter(
        _Span(
            int(frames[one.start]), int(frames[one.end - 1]),
            float(relative[one.start : one.end, one.token].max().exp()),
        )
        for one in merge_tokens(path[0], scores[0], blank=BLANK_ID)
    )  # fmt: skip
    return {i: [*itertools.islice(spans, len(entries[i].tokens))] for i in chosen}
