"""The latency that a user sees: from a word's end in the audio until the recogniser puts it out.

A word is out with its last token, and a token is out when the audio of its chunk, of the look-ahead
and of one feature frame more has arrived.  That follows from the token's time stamp alone, so it is
the same on every machine; computing the chunk comes on top (its real-time factor times the chunk,
at most).  Only words that were recognised count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import kaldialign
import numpy as np

from icetransfer.config import FRAME_MS, LOOK_AHEAD_MS
from icetransfer.streaming.alignment import OUTPUT_SECONDS, AlignedWord, SpokenWord

#: A chunk is computed once the frame behind its window is there (sherpa-onnx's rule, and ours), and
#: the last sample of a 25 ms frame, centred in its 10 ms, comes 7.5 ms after them.
RUNTIME_MS = 10 + 7.5
_NO_WORD = "*"


class Delay(NamedTuple):
    """What the latency of one word is made of, in ms."""

    model: float  # from the word's end to its last token; below 0 where the model knew it early
    chunk: float  # from the token to the end of its chunk

    @property
    def total(self) -> float:
        """The latency."""
        return self.model + self.chunk + LOOK_AHEAD_MS + RUNTIME_MS


def _delay(frame: int, since: float, chunk_size: int) -> Delay:
    """Of a token at an encoder frame, after an event at so many seconds."""
    chunk = chunk_size * FRAME_MS
    token = 1000 * OUTPUT_SECONDS * frame
    chunk_end = (token // chunk + 1) * chunk
    return Delay(token - 1000 * since, chunk_end - token)


def word_delays(
    reference: Sequence[AlignedWord], hypothesis: Sequence[SpokenWord], chunk_size: int
) -> list[Delay]:
    """The delays of the words that stand in both.

    Args:
        reference: what was said, and when.
        hypothesis: what was recognised.
        chunk_size: in 50 Hz frames.
    """
    return [delay for _, delay in _matches(reference, hypothesis, chunk_size)]


def _matches(
    reference: Sequence[AlignedWord], hypothesis: Sequence[SpokenWord], chunk_size: int
) -> Iterator[tuple[int, Delay]]:
    """The delays of the words that stand in both, with their places in the reference."""
    said, heard = enumerate(reference), iter(hypothesis)
    texts = [[word.text for word in words] for words in (reference, hypothesis)]
    for ref, hyp in kaldialign.align(*texts, _NO_WORD):
        place, aligned = next(said) if ref != _NO_WORD else (0, None)
        spoken = next(heard) if hyp != _NO_WORD else None
        if ref == hyp and aligned and spoken:
            yield place, _delay(spoken.last, aligned.end, chunk_size)


def measure(
    references: Mapping[str, Sequence[AlignedWord]],
    hypotheses: Iterable[tuple[str, Sequence[SpokenWord]]],
    chunk_size: int,
) -> dict[str, object]:
    """What wer.json holds about the latency of a test set.

    Args:
        references: what was said in each recording, and when.
        hypotheses: what was recognised, by recording; those without a reference are left out.
        chunk_size: in 50 Hz frames.

    Returns:
        `latency_ms_median` and `latency_ms_p95` over words; `latency_ms_parts`, the mean of each
        part, whose sum is the mean; `latency_words`, how many words were measured; `first_word_ms`
        and `last_word_ms`, the medians of the first and the last word of the recordings;
        `first_token_ms`, the median over recordings of the time from the beginning of the first
        word to the first token.  None where nothing was recognised.
    """
    delays: list[Delay] = []
    first_words, last_words, first_tokens = [], [], []
    for key, words in hypotheses:
        reference = references.get(key)
        if reference and words:
            matches = dict(_matches(reference, words, chunk_size))
            delays += matches.values()
            first_words += [matches[0].total] if 0 in matches else []
            last = len(reference) - 1
            last_words += [matches[last].total] if last in matches else []
            first_tokens.append(_delay(words[0].first, reference[0].start, chunk_size).total)
    totals = [delay.total for delay in delays]
    parts = None
    if delays:
        model, chunk = (round(float(part), 1) for part in np.mean(delays, axis=0))
        parts = {"model": model, "chunk": chunk, "look_ahead": LOOK_AHEAD_MS, "runtime": RUNTIME_MS}
    return {
        "latency_ms_median": _median(totals),
        "latency_ms_p95": round(float(np.percentile(totals, 95)), 1) if totals else None,
        "latency_ms_parts": parts,
        "latency_words": len(totals),
        "first_word_ms": _median(first_words),
        "last_word_ms": _median(last_words),
        "first_token_ms": _median(first_tokens),
    }


def _median(numbers: Sequence[float]) -> float | None:
    return round(float(np.median(numbers)), 1) if numbers else None
