"""An export run by sherpa-onnx itself: waveforms in, tokens and time stamps out."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.streaming.exported import Exported, read_tokens, write_tokens
from icetransfer.streaming.hotwords import Hotword
from icetransfer.streaming.search import Hypothesis

FRAME_SECONDS = 0.04  # of an encoder output


class Utterance(NamedTuple):
    """What was recognised between two endpoints.

    Attributes:
        hypothesis: its frames count from the beginning of the recording.
        scores: of each token, the logarithm of its probability as sherpa-onnx estimates it.
        end: encoder frame up to which the audio had been heard.
    """

    hypothesis: Hypothesis
    scores: list[float]
    end: int


class LiveStream:
    """A recording that arrives piece by piece; made by `SherpaRecognizer.listen`.

    Where the recogniser detects endpoints, each is looked for after every chunk, so that what is
    found does not depend on the pieces in which the audio comes.
    """

    def __init__(
        self,
        recognizer: Any,
        tail: NDArray[np.float32],
        utterance: Callable[[Any], Utterance],
    ) -> None:
        self._recognizer = recognizer
        self._tail = tail
        self._utterance = utterance
        self._stream = recognizer.create_stream()
        self._ended: list[Utterance] = []

    def accept(self, samples: NDArray[np.float32]) -> Hypothesis:
        """Hears the next samples, at 16 kHz; the best hypothesis since the last endpoint."""
        self.hear(samples)
        return self._advance()

    def finish(self) -> Hypothesis:
        """The hypothesis when all has been heard."""
        self.end()
        return self._advance()

    def hear(self, samples: NDArray[np.float32]) -> None:
        """Takes samples that `decode_chunks` is to decode."""
        self._stream.accept_waveform(SAMPLING_RATE, samples)

    def end(self) -> None:
        """There will be no more samples; `decode_chunks` is to decode the rest."""
        self.hear(self._tail)
        self._stream.input_finished()

    def current(self) -> Utterance:
        """What has been recognised since the last endpoint."""
        return self._utterance(self._recognizer.get_result_all(self._stream))

    def take_ended(self) -> list[Utterance]:
        """The utterances that endpoints have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _advance(self) -> Hypothesis:
        while decode_chunks([self]):
            pass
        return self.current().hypothesis

    def _end_at_endpoint(self) -> None:
        if self._recognizer.is_endpoint(self._stream):
            utterance = self.current()
            self._recognizer.reset(self._stream)
            self._ended.append(utterance._replace(end=self.current().end))


def decode_chunks(streams: Sequence[LiveStream]) -> list[LiveStream]:
    """Decodes together the next chunk of those that have heard all of it.

    Args:
        streams: of one recogniser.

    Returns:
        Those that had.
    """
    ready = [stream for stream in streams if stream._recognizer.is_ready(stream._stream)]
    if ready:
        ready[0]._recognizer.decode_streams([stream._stream for stream in ready])
    for stream in ready:
        stream._end_at_endpoint()
    return ready


class SherpaRecognizer:
    """sherpa-onnx's online recogniser of a streaming export, offline recogniser of another.

    Args:
        folder: the export.
        chunk_size: -1 if it is a non-streaming one.
        precision: "fp32", "int8", ...
        search: "greedy_search" or "modified_beam_search".
        beam: hypotheses kept by the latter.
        tail_seconds: silence put after every recording.
        threads: of the runtime.
        options: what else sherpa-onnx's `from_transducer` takes, such as the rules of endpoints.
        hotwords: phrases to expect, of every recording; they need modified_beam_search.

    Raises:
        ValueError: files are missing, broken or do not fit together (sherpa-onnx itself would end
            the process).
    """

    def __init__(
        self,
        folder: Path,
        chunk_size: int,
        precision: str = "fp32",
        search: str = "greedy_search",
        beam: int = 4,
        tail_seconds: float = 0.0,
        threads: int = 1,
        options: Mapping[str, Any] | None = None,
        hotwords: Sequence[Hotword] = (),
    ) -> None:
        import sherpa_onnx

        exported = Exported(folder)
        found = exported.inspect(precision).chunk_size
        if found != chunk_size:
            raise ValueError(
                f"{exported.model('encoder', precision)} is for chunk_size={found}, not "
                f"{chunk_size} (-1 is offline); export that tier"
            )
        self._online = chunk_size != -1
        self._tail = np.zeros(round(tail_seconds * SAMPLING_RATE), dtype=np.float32)
        kind = sherpa_onnx.OnlineRecognizer if self._online else sherpa_onnx.OfflineRecognizer
        names = _numbered(read_tokens(exported.tokens))
        self._ids = {name: number for number, name in enumerate(names)}
        with tempfile.TemporaryDirectory() as temporary:
            tokens = Path(temporary) / "tokens.txt"
            write_tokens(names, tokens)
            given = dict(options or {})
            if hotwords:
                given["hotwords_file"] = str(_write_hotwords(hotwords, names, Path(temporary)))
            self._recognizer: Any = kind.from_transducer(
                tokens=str(tokens),
                **{part: str(path) for part, path in exported.models(precision).items()},
                num_threads=threads,
                decoding_method=search,
                max_active_paths=beam,
                **given,
            )

    def __call__(self, batch: list[NDArray[np.float32]]) -> list[Hypothesis]:
        """Recognises recordings together, a hypothesis for each.

        Args:
            batch: mono, 16 kHz, in [-1, 1].
        """
        return [utterance.hypothesis for utterance in self.utterances(batch)]

    def utterances(self, batch: list[NDArray[np.float32]]) -> list[Utterance]:
        """As a call, with the tokens' scores."""
        decode = self._decode_online if self._online else self._decode_offline
        return decode(batch)

    def listen(self) -> LiveStream:
        """Begins a recording that arrives piece by piece.

        Raises:
            ValueError: the export is not a streaming one.
        """
        if not self._online:
            raise ValueError("an offline export hears whole recordings only: call it with them")
        return LiveStream(self._recognizer, self._tail, self._utterance)

    def _decode_online(self, batch: list[NDArray[np.float32]]) -> list[Utterance]:
        streams = []
        for samples in batch:
            stream = self._recognizer.create_stream()
            stream.accept_waveform(SAMPLING_RATE, np.concatenate([samples, self._tail]))
            stream.input_finished()
            streams.append(stream)
        live = streams
        while live := [stream for stream in live if self._recognizer.is_ready(stream)]:
            self._recognizer.decode_streams(live)
        return [self._utterance(self._recognizer.get_result_all(stream)) for stream in streams]

    def _decode_offline(self, batch: list[NDArray[np.float32]]) -> list[Utterance]:
        streams = []
        for samples in batch:
            stream = self._recognizer.create_stream()
            stream.accept_waveform(SAMPLING_RATE, np.concatenate([samples, self._tail]))
            streams.append(stream)
        self._recognizer.decode_streams(streams)
        return [self._utterance(stream.result) for stream in streams]

    def _utterance(self, result: Any) -> Utterance:
        tokens = [self._ids[token] for token in result.tokens]
        begin = result.start_time if self._online else 0.0
        frames = [round((begin + time) / FRAME_SECONDS) for time in result.timestamps]
        scores = result.ys_probs if self._online else result.ys_log_probs
        return Utterance(Hypothesis(tokens, frames), list(scores), round(begin / FRAME_SECONDS))


def _numbered(names: list[str]) -> list[str]:
    """Names by which sherpa-onnx, which tells of tokens by their names alone, tells them apart.

    By their own it does not: it prints `▁`, U+0020 and `<0x20>` alike, and `<0x41>` as A.  The one
    that it knows is `<unk>`, which it never says.  Each of the others gets an ideograph, which its
    modelling unit "cjkchar" (the default) takes for a token: so hotwords are given to it in tokens.
    """
    return [name if name == "<unk>" else _ideograph(number) for number, name in enumerate(names)]


def _ideograph(number: int) -> str:
    """One of the 20,992 of Unicode's first block, then of Extension B and what follows it."""
    return chr(0x4E00 + number) if number < 0x5200 else chr(0x20000 + number - 0x5200)


def _write_hotwords(hotwords: Sequence[Hotword], names: list[str], folder: Path) -> Path:
    """Writes sherpa-onnx's file of hotwords, each as the names of its tokens and its score."""
    path = folder / "hotwords.txt"
    lines = [f"{''.join(names[t] for t in h.tokens)} :{h.score:g}\n" for h in hotwords]
    path.write_text("".join(lines), encoding="utf-8")
    return path
