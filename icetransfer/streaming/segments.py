"""A recording of any length as segments: what was said between two pauses, with times.

A streaming tier ends a segment where sherpa-onnx's rules find an endpoint.  A tier with full
context cannot hear an hour at once, because attention grows with the square of the length, and it
has learned from single utterances: it is given what lies between two pauses, at most `LONGEST`
seconds.  Either way memory does not grow with the recording.

Segments that the model itself hardly believes in are left out: on noise and music it says words,
but with much lower probabilities than on speech.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.streaming.alignment import OUTPUT_SECONDS, PAUSE_FRAMES, QUIET, spoken_words
from icetransfer.streaming.search import Hypothesis
from icetransfer.streaming.sherpa import LiveStream, SherpaRecognizer, Utterance

LONGEST = 30.0  # seconds that a tier with full context hears at once
MARGIN = 0.25  # seconds of quiet that it hears around what is said
_FRAME = SAMPLING_RATE // 100  # samples of which one energy is taken

Samples = NDArray[np.float32]
NOTHING = Utterance(Hypothesis([], []), [], 0)


class Word(NamedTuple):
    """A word, when its tokens were put out in seconds, and the mean probability of these."""

    text: str
    start: float
    end: float
    confidence: float


class Segment(NamedTuple):
    """The words between two pauses, one at least, and the mean probability of their tokens."""

    words: list[Word]
    confidence: float

    @property
    def start(self) -> float:
        """Seconds since the beginning of the recording."""
        return self.words[0].start

    @property
    def end(self) -> float:
        """Seconds since the beginning of the recording."""
        return self.words[-1].end

    @property
    def text(self) -> str:
        """The words, one space between them."""
        return " ".join(word.text for word in self.words)


class Listener(Protocol):
    """Hears one recording piece by piece, mono at 16 kHz in [-1, 1]."""

    def accept(self, samples: Samples) -> list[Segment]:
        """Hears the next samples; the segments that ended with them."""

    def finish(self) -> list[Segment]:
        """There will be no more samples; the last segments."""

    def partial(self) -> Segment | None:
        """The segment that has not ended yet."""


def probability(scores: Sequence[float]) -> float:
    """The geometric mean of probabilities, given their logarithms."""
    return math.exp(sum(scores) / len(scores))


def make_words(utterance: Utterance, names: Sequence[str], since: float = 0.0) -> list[Word]:
    """The words of an utterance that begins at so many seconds."""
    tokens, frames = utterance.hypothesis
    words = []
    for text, first, last in spoken_words(Hypothesis(tokens, [*range(len(tokens))]), names):
        start, end = (since + OUTPUT_SECONDS * frame for frame in (frames[first], frames[last] + 1))
        words.append(Word(text, start, end, probability(utterance.scores[first : last + 1])))
    return words


def make_segment(words: list[Word], scores: Sequence[float], least: float) -> list[Segment]:
    """The segment of these words and tokens, or none if its confidence is below the least."""
    if not words or (confidence := probability(scores)) < least:
        return []
    return [Segment(words, confidence)]


class StreamingListener:
    """Segments of a streaming tier, by sherpa-onnx's rules.

    Where a segment has reached the length that rule 3 allows, it may end within a word: its last
    word is held back and begins the next one.

    Args:
        recognizer: with endpoint detection.
        names: of all tokens.
        pause: silence in seconds after which rule 2 ends a segment.
        least: confidence below which a segment is left out.
    """

    def __init__(
        self, recognizer: SherpaRecognizer, names: Sequence[str], pause: float, least: float
    ) -> None:
        self._stream = recognizer.listen()
        self._names, self._pause, self._least = names, pause, least
        self._held = NOTHING

    @property
    def stream(self) -> LiveStream:
        """What may be decoded together with other streams; `take_ended` follows."""
        return self._stream

    def accept(self, samples: Samples) -> list[Segment]:
        """Hears the next samples; the segments that ended with them."""
        self._stream.accept(samples)
        return self.take_ended()

    def finish(self) -> list[Segment]:
        """There will be no more samples; the last segments."""
        self._stream.finish()
        return self.take_ended() + self._current()

    def partial(self) -> Segment | None:
        """The segment that has not ended yet."""
        return next(iter(self._current()), None)

    def take_ended(self) -> list[Segment]:
        """The segments that ended since the last call."""
        return [segment for ended in self._stream.take_ended() for segment in self._end(ended)]

    def _current(self) -> list[Segment]:
        return self._make(_join(self._held, self._stream.current()))

    def _end(self, utterance: Utterance) -> list[Segment]:
        whole, self._held = _join(self._held, utterance), NOTHING
        tokens, frames = whole.hypothesis
        if tokens and (whole.end - frames[-1] - 1) * OUTPUT_SECONDS < self._pause - 1e-6:
            words = spoken_words(Hypothesis(tokens, [*range(len(tokens))]), self._names)
            if len(words) > 1:
                whole, self._held = _split(whole, words[-1].first)
        return self._make(whole)

    def _make(self, utterance: Utterance) -> list[Segment]:
        return make_segment(make_words(utterance, self._names), utterance.scores, self._least)


def _join(first: Utterance, second: Utterance) -> Utterance:
    tokens, frames = (a + b for a, b in zip(first.hypothesis, second.hypothesis, strict=True))
    return Utterance(Hypothesis(tokens, frames), first.scores + second.scores, second.end)


def _split(whole: Utterance, at: int) -> tuple[Utterance, Utterance]:
    """The tokens before a place, and those from there on."""
    tokens, frames = whole.hypothesis
    first = Utterance(Hypothesis(tokens[:at], frames[:at]), whole.scores[:at], whole.end)
    return first, Utterance(Hypothesis(tokens[at:], frames[at:]), whole.scores[at:], whole.end)


class OfflineListener:
    """Segments of a tier with full context, which hears what lies between two pauses.

    Args:
        recognizer: of an offline export.
        names: of all tokens.
        pause: silence in seconds that parts segments.
        least: confidence below which a segment is left out.
    """

    def __init__(
        self, recognizer: SherpaRecognizer, names: Sequence[str], pause: float, least: float
    ) -> None:
        self._recognizer, self._names = recognizer, names
        self._pause, self._least = pause, least
        self._pieces: list[Samples] = []
        self._waiting = 0  # samples in the pieces
        self._begin = 0  # sample at which they begin

    def accept(self, samples: Samples) -> list[Segment]:
        """Hears the next samples; the segments that ended with them."""
        self._pieces.append(samples)
        self._waiting += len(samples)
        longest = int(LONGEST * SAMPLING_RATE)
        found: list[Segment] = []
        while self._waiting > longest:
            waiting = np.concatenate(self._pieces)
            parts, end = speech_parts(waiting[:longest], self._pause)
            found += self._recognise(waiting, parts)
            self._begin += end
            self._pieces, self._waiting = [waiting[end:]], len(waiting) - end
        return found

    def finish(self) -> list[Segment]:
        """There will be no more samples; the last segments."""
        if not self._waiting:
            return []
        waiting = np.concatenate(self._pieces)
        parts, end = speech_parts(waiting, self._pause)
        return self._recognise(waiting, [*parts, (end, len(waiting))])

    def partial(self) -> Segment | None:
        """Nothing is known before the end of a part."""
        return None

    def _recognise(self, waiting: Samples, parts: Sequence[tuple[int, int]]) -> list[Segment]:
        found = []
        for begin, end in parts:
            (utterance,) = self._recognizer.utterances([waiting[begin:end]])
            last = int((end - begin) / SAMPLING_RATE / OUTPUT_SECONDS) - 1  # then comes silence
            times = [min(frame, last) for frame in utterance.hypothesis.timestamps]
            said = utterance._replace(hypothesis=utterance.hypothesis._replace(timestamps=times))
            words = make_words(said, self._names, (self._begin + begin) / SAMPLING_RATE)
            found += make_segment(words, said.scores, self._least)
        return found


def speech_parts(samples: Samples, pause: float) -> tuple[list[tuple[int, int]], int]:
    """What lies between the pauses of a recording of which more follows.

    Frames are quiet whose energy is near that of the recording's faintest ones.  A recording
    without a pause is cut at the faintest tenth of a second of its last two thirds.

    Args:
        samples: of at most `LONGEST` seconds.
        pause: seconds of quiet that part utterances.

    Returns:
        The first sample and the end of each part, with at most `MARGIN` seconds of quiet around
        it; and the first sample that belongs to what follows.
    """
    frames = len(samples) // _FRAME
    energy = np.square(samples[: frames * _FRAME], dtype=np.float64).reshape(frames, _FRAME).mean(1)
    energy = np.log(energy + 1e-10)
    faint, loud = np.percentile(energy, [5, 95]) if frames else (0.0, 0.0)
    is_quiet = energy <= faint + QUIET * (loud - faint)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_quiet, [0]]))).reshape(-1, 2)
    margin, least = round(100 * MARGIN), round(100 * pause)
    parts, since = [], 0
    for begin, end in edges[edges[:, 1] - edges[:, 0] >= least].tolist():
        if begin > since:
            parts.append((max(0, since - margin) * _FRAME, (begin + margin) * _FRAME))
        since = end
    if since == 0 and frames >= LONGEST * 100:
        first = frames // 3
        faintest = np.convolve(energy[first:], np.ones(PAUSE_FRAMES), "same").argmin()
        since = first + int(faintest)
        return [(0, since * _FRAME)], since * _FRAME
    return parts, max(0, since - margin) * _FRAME
