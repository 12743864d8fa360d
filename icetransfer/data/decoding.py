"""What an audio file decodes to, where its header says something else, and what its samples are.

libsndfile reads no further than the header says. So audio beyond that would be lost in silence, in
every stage: such a file is rejected with the reason. A header that promises more than there is
tells of a file that lost its end.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from icetransfer.data.utterances import UnusableError

BLOCK = 1 << 21  # samples decoded at a time: nearly always a whole utterance, as later stages do
#: What a decoder may lack of the length in the header of a file that is whole; lhotse pads as much.
SHORTFALL_SECONDS = 0.02
#: The largest sample of a float file: loud mixes and lossy codecs pass 1, integers as floats 8.
LARGEST_SAMPLE = 8.0
#: Of full scale. Less does no harm: each frame's mean is subtracted before its filter banks.
LARGEST_OFFSET = 0.1
_CONVERT = "convert it: ffmpeg -i FILE FILE.flac"
_UNKNOWN_LENGTH = 0x7FFF0000  # bytes; programs that write to a pipe promise this or more
_ENDLESS = 1 << 62  # samples; what libsndfile says of a FLAC that was written to a pipe
_TAG = 128  # bytes that many MP3s have after the audio: title and artist
_JOINED_SECONDS = 0.1  # of audio behind the end that a header promises


@dataclass
class Levels:
    """What is seen of a recording's samples, block after block."""

    samples: int = 0
    lowest: NDArray[np.float32] = field(default_factory=lambda: np.full(1, np.inf, np.float32))
    highest: NDArray[np.float32] = field(default_factory=lambda: np.full(1, -np.inf, np.float32))
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    _digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=12))

    def add(self, block: NDArray[np.float32]) -> None:
        """Adds samples (N, C) of C channels."""
        if not len(block):
            return
        self.samples += len(block)
        self._digest.update(block.tobytes())
        # minimum and maximum pass a NaN on
        self.lowest = np.minimum(self.lowest, block.min(axis=0))
        self.highest = np.maximum(self.highest, block.max(axis=0))
        self.total = self.total + block.sum(axis=0)

    @property
    def digest(self) -> str:
        """What tells the same audio under another name, or in another lossless format."""
        digest: str = self._digest.hexdigest()
        return digest

    def check(self) -> None:
        """Looks for what no recording of speech has.

        Raises:
            UnusableError: There is not one channel, or its samples are not finite, not in
                [-1, 1], far from centred or all the same.
        """
        if not self.samples:
            raise UnusableError("no samples", "record it again, or remove the line")
        silent = [
            n for n, (a, b) in enumerate(zip(self.lowest, self.highest, strict=True)) if a == b
        ]
        channels = len(self.lowest)
        if channels != 1:
            empty = f", of which {', '.join(map(str, silent))} (from 0) is empty" if silent else ""
            keep_one = channels == 2 and len(silent) == 1
            advice = "keep the other channel alone" if keep_one else "convert it to mono"
            raise UnusableError(f"{channels} channels{empty}", advice)
        lowest, highest = float(self.lowest[0]), float(self.highest[0])
        if not np.isfinite([lowest, highest]).all():
            raise UnusableError(
                "samples that are not finite (NaN or infinity)", "convert it again from its source"
            )
        if silent:
            raise UnusableError(
                "nothing but digital silence", "record it again, or remove the line"
            )
        largest = max(-lowest, highest)
        if largest > LARGEST_SAMPLE:
            raise UnusableError(
                f"samples up to {largest:.6g}: expected -1 to 1",
                "divide floats that are scaled as 16-bit integers by 32768 and save it again",
            )
        offset = float(self.total[0]) / self.samples
        if abs(offset) > LARGEST_OFFSET:
            raise UnusableError(
                f"a DC offset of {offset:.2f}, the limit is {LARGEST_OFFSET:g}",
                "subtract the mean of its samples, or record it again",
            )


def check_header(path: Path, file: soundfile.SoundFile) -> int:
    """Compares what a header says with what the file holds.

    Args:
        path: The file.
        file: The same, open.

    Returns:
        How many samples it decodes to, as far as that is known without decoding it.

    Raises:
        UnusableError: It holds more than is decoded, or less than it promises.
    """
    if file.format == "MP3":
        return _mp3_samples(path, path.stat().st_mtime_ns, file.frames, file.samplerate)
    promise = re.search(
        r"^ ?(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE
    )
    if promise and int(promise[1]) < _UNKNOWN_LENGTH:
        promised, there = int(promise[1]), int(promise[2])
        if there == 0 or file.frames * (promised / there - 1) > SHORTFALL_SECONDS * file.samplerate:
            raise UnusableError(
                f"truncated: {there} of {promised} bytes that its header promises", "copy it again"
            )
    if file.format == "OGG" and (streams := _ogg_streams(path, path.stat().st_mtime_ns)) > 1:
        raise UnusableError(
            f"{streams} Ogg streams end to end, of which only the first is decoded", _CONVERT
        )
    frames: int = file.frames
    if frames >= _ENDLESS:
        raise UnusableError("its header does not say how long it is", _CONVERT)
    return frames


@functools.lru_cache(maxsize=16)  # many utterances may be parts of one file
def _ogg_streams(path: Path, changed: int) -> int:
    """How many streams begin in an Ogg file: pages that say so."""
    return path.read_bytes().count(b"OggS\0\2")


@functools.lru_cache(maxsize=16)
def _mp3_samples(path: Path, changed: int, samples: int, rate: int) -> int:
    """Samples of an MP3: what its Xing header says, or, where it has none, what it decodes to.

    Args:
        path: The file.
        changed: When it was written.
        samples: How many libsndfile says it has.
        rate: Its sampling rate.

    Raises:
        UnusableError: There is audio that libsndfile would not reach.
    """
    data = path.read_bytes()
    end = _mp3_end(data)
    if end is None:
        decoded = _decode_to_the_end(path)
        if decoded - samples > _JOINED_SECONDS * rate:
            raise UnusableError(
                f"an MP3 without a length in its header: {decoded / rate:.3f} s, of which "
                f"{samples / rate:.3f} s would be read",
                _CONVERT,
            )
        return min(samples, decoded)
    more = 0.0
    if len(data) - end > _TAG:
        try:
            with soundfile.SoundFile(io.BytesIO(data[end:])) as rest:
                more = rest.frames / rest.samplerate
        except soundfile.SoundFileError:  # no audio: a longer tag
            pass
    if more > _JOINED_SECONDS:
        raise UnusableError(
            f"MP3s joined end to end: some {more:.1f} s after the {samples / rate:.3f} s that the "
            "first header promises",
            _CONVERT,
        )
    return samples


def _mp3_end(data: bytes) -> int | None:
    """Where the stream of an MP3's Xing header ends; None if there is no such header."""
    start = 0
    if data[:3] == b"ID3":  # its size has seven bits a byte
        start = 10 + sum(
            byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True)
        )
    match = re.compile(rb"(?:Xing|Info)(.{4})", re.DOTALL).search(data, start, start + 200)
    if not match:
        return None
    flags, after = int.from_bytes(match[1], "big"), match.end()
    if not flags & 1:
        return None
    if not flags & 2:
        return len(data)
    return start + int.from_bytes(data[after + 4 : after + 8], "big")


def _decode_to_the_end(path: Path) -> int:
    """Decodes a file through a pipe, of which libsndfile cannot guess the length."""
    reader, writer = os.pipe()

    def feed() -> None:
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(path.read_bytes())
        except BrokenPipeError:  # the decoder gave up
            pass

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        with soundfile.SoundFile(reader, closefd=False) as file:
            decoded = 0
            while len(block := file.read(BLOCK, dtype="float32")):
                decoded += len(block)
        return decoded
    finally:
        os.close(reader)
        thread.join()
