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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchaudio.functional import forced_align, merge_tokens

from icetransfer.data.long.anchors import Section
from icetransfer.data.long.heard import Heard
from icetransfer.data.long.words import Entry
from icetransfer.data.tokenizer import BLANK_ID

#: What it costs, in log probability a frame, that the likeliest token there is not in the text.
GARBAGE_COST = 2.0
#: A phrase of which the tokens have less posterior on average was not said.
UNSAID = 0.15
#: Frames times states of a path at most: bytes of memory.
LARGEST = 400_000_000
_ROUNDS = 4


class Timed(NamedTuple):
    """When an entry was said.

    Attributes:
        first: the frame (40 ms) of its first token.
        last: that of its last one.
        scores: the posterior of each of its tokens.
    """

    first: int
    last: int
    scores: tuple[float, ...]


def align_section(heard: Heard, entries: Sequence[Entry], section: Section) -> dict[int, Timed]:
    """Aligns the entries of a section.

    Args:
        heard: the recording.
        entries: of the whole text.
        section: which of them, and which frames.

    Returns:
        When each was said, by its number; those that were not are absent.
    """
    first, end = section.first_frame, section.end_frame
    log_probs = torch.from_numpy(np.asarray(heard.log_probs[first:end], dtype=np.float32))
    chosen = [*range(section.first_entry, section.end_entry)]
    chosen = _that_fit(chosen, entries, end - first)
    for _ in range(_ROUNDS):
        if not chosen:
            return {}
        found = _align(log_probs, [entries[i].tokens for i in chosen])
        unsaid = _unsaid(chosen, entries, found)
        timed = {
            i: Timed(first + one.first, first + one.last, one.scores)
            for i, one in zip(chosen, found, strict=True)
        }
        if not unsaid:
            break
        chosen = [i for i in chosen if entries[i].phrase not in unsaid]
        timed = {i: timed[i] for i in chosen}
    return timed


def _that_fit(chosen: list[int], entries: Sequence[Entry], frames: int) -> list[int]:
    """Those entries that the frames can hold: all, or the phrases next to both ends.

    More text than that was not read out between two anchors, or was in another recording.
    """
    room = min(frames, LARGEST // max(frames, 1) // 2)
    if _room(chosen, entries) <= room:
        return chosen
    phrases = [[*group] for _, group in itertools.groupby(chosen, lambda i: entries[i].phrase)]
    kept: tuple[list[int], list[int]] = [], []
    while phrases:
        side = len(kept[0]) > len(kept[1])
        nearest = phrases.pop(-1 if side else 0)
        room -= _room(nearest, entries) + 1
        if room < 0:
            break
        kept[side][:] = [*nearest, *kept[1]] if side else [*kept[0], *nearest]
    return [*kept[0], *kept[1]]


def _room(chosen: Sequence[int], entries: Sequence[Entry]) -> int:
    """The frames that entries need at least: a blank parts a token from the same one."""
    tokens = [token for i in chosen for token in entries[i].tokens]
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))


def _unsaid(chosen: Sequence[int], entries: Sequence[Entry], found: Sequence[Timed]) -> set[int]:
    """The phrases that were not said."""
    scores: dict[int, list[float]] = {}
    for i, timed in zip(chosen, found, strict=True):
        scores.setdefault(entries[i].phrase, []).extend(timed.scores)
    return {phrase for phrase, of in scores.items() if sum(of) < UNSAID * len(of)}


@torch.inference_mode()
def _align(log_probs: torch.Tensor, words: Sequence[Sequence[int]]) -> list[Timed]:
    """The likeliest path of the tokens of some words through (F, V) log probabilities."""
    tokens = [token for word in words for token in word]
    open_blank = log_probs.clone()
    anything = log_probs.amax(dim=1) - GARBAGE_COST
    open_blank[:, BLANK_ID] = torch.maximum(log_probs[:, BLANK_ID], anything)
    path, scores = forced_align(open_blank[None], torch.tensor([tokens]), blank=BLANK_ID)
    spans = merge_tokens(path[0], scores[0], blank=BLANK_ID)
    found, place = [], 0
    for word in words:
        of_word = spans[place : place + len(word)]
        place += len(word)
        posteriors = tuple(
            float(log_probs[span.start : span.end, span.token].max().exp()) for span in of_word
        )
        found.append(Timed(of_word[0].start, of_word[-1].end - 1, posteriors))
    return found
