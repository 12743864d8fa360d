"""An export run by sherpa-onnx itself: waveforms in, tokens and time stamps out."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.streaming.exported import Exported, read_tokens, write_tokens
from icetransfer.streaming.search import Hypothesis

FRAME_SECONDS = 0.04  # of an encoder output


class LiveStream:
    """A recording that arrives piece by piece; made by `SherpaRecognizer.listen`."""

    def __init__(
        self,
        recognizer: Any,
        tail: NDArray[np.float32],
        hypothesis: Callable[[Any], Hypothesis],
    ) -> None:
        self._recognizer = recognizer
        self._tail = tail
        self._hypothesis = hypothesis
        self._stream = recognizer.create_stream()

    def accept(self, samples: NDArray[np.float32]) -> Hypothesis:
        """Hears the next samples, at 16 kHz; the best hypothesis so far."""
        self._stream.accept_waveform(SAMPLING_RATE, samples)
        return self._advance()

    def finish(self) -> Hypothesis:
        """The hypothesis when all has been heard."""
        self._stream.accept_waveform(SAMPLING_RATE, self._tail)
        self._stream.input_finished()
        return self._advance()

    def _advance(self) -> Hypothesis:
        while self._recognizer.is_ready(self._stream):
            self._recognizer.decode_stream(self._stream)
        return self._hypothesis(self._recognizer.get_result_all(self._stream))


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
            self._recognizer: Any = kind.from_transducer(
                tokens=str(tokens),
                **{part: str(path) for part, path in exported.models(precision).items()},
                num_threads=threads,
                decoding_method=search,
                max_active_paths=beam,
            )

    def __call__(self, batch: list[NDArray[np.float32]]) -> list[Hypothesis]:
        """Recognises recordings together, a hypothesis for each.

        Args:
            batch: mono, 16 kHz, in [-1, 1].
        """
        decode = self._decode_online if self._online else self._decode_offline
        return decode(batch)

    def listen(self) -> LiveStream:
        """Begins a recording that arrives piece by piece.

        Raises:
            ValueError: the export is not a streaming one.
        """
        if not self._online:
            raise ValueError("an offline export hears whole recordings only: call it with them")
        return LiveStream(self._recognizer, self._tail, self._hypothesis)

    def _decode_online(self, batch: list[NDArray[np.float32]]) -> list[Hypothesis]:
        streams = []
        for samples in batch:
            stream = self._recognizer.create_stream()
            stream.accept_waveform(SAMPLING_RATE, np.concatenate([samples, self._tail]))
            stream.input_finished()
            streams.append(stream)
        live = streams
        while live := [stream for stream in live if self._recognizer.is_ready(stream)]:
            self._recognizer.decode_streams(live)
        return [self._hypothesis(self._recognizer.get_result_all(stream)) for stream in streams]

    def _decode_offline(self, batch: list[NDArray[np.float32]]) -> list[Hypothesis]:
        streams = []
        for samples in batch:
            stream = self._recognizer.create_stream()
            stream.accept_waveform(SAMPLING_RATE, np.concatenate([samples, self._tail]))
            streams.append(stream)
        self._recognizer.decode_streams(streams)
        return [self._hypothesis(stream.result) for stream in streams]

    def _hypothesis(self, result: Any) -> Hypothesis:
        tokens = [self._ids[token] for token in result.tokens]
        return Hypothesis(tokens, [round(t / FRAME_SECONDS) for t in result.timestamps])


def _numbered(names: list[str]) -> list[str]:
    """Names by which sherpa-onnx, which tells of tokens by their names alone, tells them apart.

    By their own it does not: it prints `▁`, U+0020 and `<0x20>` alike, and `<0x41>` as A.  The one
    that it knows is `<unk>`, which it never says.
    """
    return [name if name == "<unk>" else f"{number}" for number, name in enumerate(names)]
