"""Many streams at once, as a server has them: audio comes in pieces, chunks are computed together.

A pool keeps the encoder's state of all its streams packed, so that a step in which all are ready
copies nothing; otherwise the rows that are ready are picked and put back.  Streams begin and end
when they like.  A stream of hours costs each second what the first one did: feature frames that
have been read and tokens that can change no more are kept out of what a step touches.  (Of a beam
search that are those in which all hypotheses agree; two that differ in an early word may go on side
by side for long, and their histories grow by 4 bytes a frame.)

Shapes: N streams, T feature frames (10 ms), c chunk_size (20 ms), F encoder frames of the history.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import kaldi_native_fbank
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icetransfer.config import FRAME_MS
from icetransfer.data.features import fbank_options
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.model.subsampling import WINDOW_EXTRA
from icetransfer.model.transducer import StreamingState
from icetransfer.streaming.hotwords import HotwordGraph
from icetransfer.streaming.search import NOTHING, Hypothesis, Search, SearchState

Samples = NDArray[np.float32]

EMISSION_DELAY = 31  # feature frames after the last sample in which a last word may still come out
_SHIFT = SAMPLING_RATE // 100  # samples from a feature frame to the next
_FRAME_END = 280  # samples from a frame's first (at its index times the shift) to its window's end


def tail_seconds(chunk_size: int) -> float:
    """Silence put after every recording, so that its last word is never lost.

    A chunk is computed when the features of all of it and of the look-ahead are there and at least
    one more (sherpa-onnx's rule): to come out surely, the last sample and what the model may say
    within `EMISSION_DELAY` after it need a whole chunk and look-ahead behind them.
    """
    chunk = 0 if chunk_size == -1 else 2 * chunk_size
    return (chunk + WINDOW_EXTRA + EMISSION_DELAY) / 100


def samples_for(chunk_size: int, chunks: int) -> int:
    """Samples of a recording with which sherpa-onnx decodes so many chunks of it."""
    return (2 * chunk_size * chunks + WINDOW_EXTRA) * _SHIFT + _FRAME_END


class Encodes(Protocol):
    """What streaming needs of a model besides what a search needs."""

    def initial_state(
        self, batch_size: int, chunk_size: int, left_context_frames: int
    ) -> StreamingState:
        """Streams that have heard nothing."""

    def encode_chunk(
        self, features: Tensor, state: StreamingState
    ) -> tuple[Tensor, StreamingState]:
        """One chunk (N, 2c + 13, 80)."""


def select_streams(state: StreamingState, rows: list[int]) -> StreamingState:
    """The encoder's state of some of the streams, in that order."""
    index = torch.tensor(rows, dtype=torch.long)
    pairs = zip(state.tensors(), state.batch_dims(), strict=True)
    return state.with_tensors([tensor.index_select(dim, index) for tensor, dim in pairs])


def join_streams(first: StreamingState, second: StreamingState) -> StreamingState:
    """The streams of one state, then those of another."""
    pairs = zip(first.tensors(), second.tensors(), first.batch_dims(), strict=True)
    return first.with_tensors([torch.cat([a, b], dim) for a, b, dim in pairs])


def put_streams(state: StreamingState, rows: list[int], part: StreamingState) -> None:
    """Writes the streams of `part` over those rows of `state`."""
    index = torch.tensor(rows, dtype=torch.long)
    for whole, new, dim in zip(state.tensors(), part.tensors(), state.batch_dims(), strict=True):
        whole.index_copy_(dim, index, new)


def _put_search(state: SearchState, rows: list[int], part: SearchState) -> SearchState:
    """As `put_streams`; histories end now, whatever their lengths, and are filled up before."""
    frames = max(state.history.size(-1), part.history.size(-1))

    def widen(narrow: SearchState) -> SearchState:
        missing = frames - narrow.history.size(-1)
        history = torch.nn.functional.pad(narrow.history, (missing, 0), value=NOTHING)
        return dataclasses.replace(narrow, history=history, start=narrow.start + missing)

    index = torch.tensor(rows, dtype=torch.long)
    state, part = widen(state), widen(part)
    put = {
        name: getattr(state, name).index_copy(0, index, getattr(part, name))
        for name in (f.name for f in dataclasses.fields(state))
    }
    return type(state)(**put)


class Stream:
    """A recording that arrives piece by piece; made by `StreamPool.open`."""

    def __init__(self, chunk_size: int, hotwords: HotwordGraph | None = None) -> None:
        self._fbank = kaldi_native_fbank.OnlineFbank(fbank_options())
        self._step, self._window = 2 * chunk_size, 2 * chunk_size + WINDOW_EXTRA
        self._position = 0  # first frame of the next window
        self._tail = tail_seconds(chunk_size)
        self._finished = False
        self._hotwords = hotwords  # held here, for the search to find it as long as we live
        self.settled = Hypothesis([], [])  # what can change no more
        self.settled_frames = 0  # encoder frames that it comes from

    def accept(self, samples: Samples) -> None:
        """Hears the next samples, mono, 16 kHz, in [-1, 1]."""
        self._fbank.accept_waveform(SAMPLING_RATE, samples.tolist())  # as in `fbank`

    def finish(self) -> None:
        """There will be no more; silence follows, so that the last word comes out."""
        self.accept(np.zeros(round(self._tail * SAMPLING_RATE), dtype=np.float32))
        self._fbank.input_finished()
        self._finished = True

    @property
    def ready(self) -> bool:
        """Whether a chunk can be computed: its window is there, and one frame more."""
        return bool(self._position + self._window < self._fbank.num_frames_ready)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to compute."""
        return self._finished and not self.ready

    @property
    def samples_wanted(self) -> int:
        """How many samples must have come in all for the next chunk."""
        return (self._position + self._window) * _SHIFT + _FRAME_END

    def next_window(self) -> NDArray[np.float32]:
        """Features (2c + 13, 80) of the next chunk; the frames that only it needs are forgotten."""
        first = self._position
        window = np.stack([self._fbank.get_frame(first + i) for i in range(self._window)])
        self._fbank.pop(self._step)
        self._position += self._step
        return window


class StreamPool:
    """Streams of one model that are computed together.

    Args:
        model: torch's or onnxruntime's.
        search: of the same model.
        chunk_size: in 50 Hz frames.
        left_context_frames: in 50 Hz frames.

    Attributes:
        live: the streams that are open.
    """

    def __init__(
        self, model: Encodes, search: Search[Any], chunk_size: int, left_context_frames: int
    ) -> None:
        self._model, self._search = model, search
        self._tier = (chunk_size, left_context_frames)
        self._encoder_state = model.initial_state(0, *self._tier)
        self._search_state = search.initial_state(0)
        self.live: list[Stream] = []

    @property
    def chunk_seconds(self) -> float:
        """Seconds of a chunk."""
        return self._tier[0] * FRAME_MS / 1000

    @torch.inference_mode()
    def open(self, count: int = 1, hotwords: HotwordGraph | None = None) -> list[Stream]:
        """Streams that begin now.

        Args:
            count: how many.
            hotwords: of these streams; None for the search's own.

        Raises:
            ValueError: the search takes no hotwords.
        """
        search = self._search if hotwords is None else self._search.with_hotwords(hotwords)
        fresh = self._model.initial_state(count, *self._tier)
        self._encoder_state = join_streams(self._encoder_state, fresh)
        self._search_state = self._search_state.extend(search.initial_state(count))
        streams = [Stream(self._tier[0], hotwords) for _ in range(count)]
        self.live += streams
        return streams

    @torch.inference_mode()
    def step(self) -> list[Stream]:
        """Computes the next chunk of every stream that is ready, in one call; those streams."""
        rows = [row for row, stream in enumerate(self.live) if stream.ready]
        if not rows:
            return []
        streams = [self.live[row] for row in rows]
        windows = torch.from_numpy(np.stack([stream.next_window() for stream in streams]))
        everyone = len(rows) == len(self.live)
        encoder_state, search_state = self._encoder_state, self._search_state
        if not everyone:
            encoder_state = select_streams(encoder_state, rows)
            search_state = search_state.select(rows)
        out, encoder_state = self._model.encode_chunk(windows, encoder_state)
        search_state = self._settle(self._search.advance(search_state, out), streams)
        if everyone:
            self._encoder_state, self._search_state = encoder_state, search_state
        else:
            put_streams(self._encoder_state, rows, encoder_state)
            self._search_state = _put_search(self._search_state, rows, search_state)
        return streams

    def _settle(self, state: SearchState, streams: list[Stream]) -> SearchState:
        """Takes out of the history, for good, the frames in which all hypotheses agree."""
        agreed, best = self._search.agreed(state), self._search.best(state)
        rows = zip(streams, best.tolist(), state.start.tolist(), agreed.tolist(), strict=True)
        for stream, history, first, end in rows:
            for frame, token in enumerate(history[first:end], stream.settled_frames):
                if token != NOTHING:
                    stream.settled.tokens.append(token)
                    stream.settled.timestamps.append(frame)
            stream.settled_frames += end - first
        oldest = int(agreed.min())
        return dataclasses.replace(
            state, history=state.history[..., oldest:], start=agreed - oldest
        )

    def results(self, streams: Sequence[Stream]) -> list[Hypothesis]:
        """The best hypothesis of each so far."""
        rows = {stream: row for row, stream in enumerate(self.live)}
        chosen = self._search_state.select([rows[stream] for stream in streams])
        found = []
        for stream, rest in zip(streams, self._search.results(chosen), strict=True):
            settled, frames = stream.settled, [stream.settled_frames + t for t in rest.timestamps]
            found.append(Hypothesis(settled.tokens + rest.tokens, settled.timestamps + frames))
        return found

    def close(self, streams: Sequence[Stream]) -> list[Hypothesis]:
        """Takes streams out of the pool; the last hypothesis of each."""
        found = self.results(streams)
        rows = [row for row, stream in enumerate(self.live) if stream not in streams]
        self._encoder_state = select_streams(self._encoder_state, rows)
        self._search_state = self._search_state.select(rows)
        self.live = [self.live[row] for row in rows]
        return found


@dataclass
class Service:
    """How a machine that does nothing else would have served some streams in real time.

    Attributes:
        hypotheses: of the recordings, by their place.
        audio_seconds: heard in all.
        busy_seconds: spent computing.
        seconds: from the beginning to the end.
        delays: for each chunk of each stream, seconds from when its audio was there until it was
            computed.
        calls: steps of the pool.
    """

    hypotheses: dict[int, Hypothesis] = field(default_factory=dict)
    audio_seconds: float = 0.0
    busy_seconds: float = 0.0
    seconds: float = 0.0
    delays: list[float] = field(default_factory=list)
    calls: int = 0


@dataclass
class _Speaker:
    """A recording that is being spoken."""

    place: int
    samples: Samples
    begin: float  # seconds
    stream: Stream
    heard: int = 0  # samples

    @property
    def due(self) -> float:
        """When the audio of the next chunk is there; silence is, when the recording has ended."""
        return self.begin + min(self.stream.samples_wanted, len(self.samples)) / SAMPLING_RATE

    def speak(self, now: float) -> None:
        """Gives the stream what has been said by now."""
        until = int((now - self.begin) * SAMPLING_RATE + 0.5)
        if self.heard < len(self.samples):
            self.stream.accept(self.samples[self.heard : until])
            if until >= len(self.samples):
                self.stream.finish()
        self.heard = until


def serve(
    pool: StreamPool,
    recordings: Sequence[Samples],
    concurrent: int,
    clock: Callable[[], float] = time.process_time,
) -> Service:
    """Serves speakers who talk in real time, a constant number at once, on a simulated time line.

    Time passes as the audio does, and each step takes what the clock says that it took: no waiting,
    and with a clock of CPU seconds no disturbance by what else the machine does.  The speakers
    begin at different times within a chunk; when one has ended, the next recording begins.

    Args:
        pool: without streams.
        recordings: mono, 16 kHz.
        concurrent: speakers at once.
        clock: seconds.
    """
    service = Service()
    waiting: Iterator[tuple[int, Samples]] = iter(enumerate(recordings))
    now = 0.0
    speakers: list[_Speaker] = []
    for number in range(concurrent):
        speakers += _begin(pool, waiting, pool.chunk_seconds * number / concurrent)
    while speakers:
        now = max(now, min(speaker.due for speaker in speakers))
        due = {speaker.stream: speaker.due for speaker in speakers}
        started = clock()
        for speaker in speakers:
            if speaker.due <= now + 1e-9:
                speaker.speak(now + 1e-9)
        computed = pool.step()
        ended = [speaker for speaker in speakers if speaker.stream.ended]
        found = pool.close([speaker.stream for speaker in ended]) if ended else []
        spent = clock() - started
        now += spent
        service.busy_seconds += spent
        service.calls += 1
        service.delays += [now - due[stream] for stream in computed]
        for speaker, hypothesis in zip(ended, found, strict=True):
            service.hypotheses[speaker.place] = hypothesis
            service.audio_seconds += len(speaker.samples) / SAMPLING_RATE
            speakers.remove(speaker)
            speakers += _begin(pool, waiting, now)
    service.seconds = now
    return service


def _begin(
    pool: StreamPool, waiting: Iterator[tuple[int, Samples]], begin: float
) -> list[_Speaker]:
    """The next speaker, if there is one more."""
    following = next(waiting, None)
    if following is None:
        return []
    (stream,) = pool.open()
    return [_Speaker(*following, begin, stream)]
