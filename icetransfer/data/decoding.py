"""What an audio file decodes to, where its header says something else, and what its samples are.

libsndfile reads no further than the header says. So audio beyond that would be lost in silence, in
every stage: such a file is rejected with the reason. A header that promises more than there is
tells of a file that lost its end.
"""

from __future__ import annotations

import functools
import hashlib
import io
import mmap
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
_COPY = "copy it again"
#: What libsndfile notes of WAV, AIFF, AU, RF64 and W64: the bytes of the header, and of the file.
_PROMISE = re.compile(
    r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE
)
#: Bytes that files of a format begin with, which are in no audio; of WAV and AIFF libsndfile looks.
_HEADS = {"FLAC": 8, "AU": 8, "CAF": 12, "RF64": 12}
_LAST_PAGE = 4  # the bit of an Ogg page that ends its stream
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
    changed = path.stat().st_mtime_ns
    _check_promise(path, file)
    if file.format == "WAV":
        _check_behind_wav(path, changed, file.samplerate)
    if file.format == "OGG":
        _check_ogg(path, changed)
    length = _HEADS.get(file.format)
    if length and (joined := _joined_files(path, changed, length)) > 1:
        raise UnusableError(
            f"{joined} files end to end, of which only the first is decoded", _CONVERT
        )
    frames: int = file.frames
    if frames >= _ENDLESS:
        raise UnusableError("its header does not say how long it is", _CONVERT)
    return frames


def _check_promise(path: Path, file: soundfile.SoundFile) -> None:
    """Compares how long a header says the audio is with how long the file is."""
    promise = _PROMISE.search(file.extra_info)
    if promise and int(promise[1]) < _UNKNOWN_LENGTH:
        promised, there = int(promise[1]), int(promise[2])
        if there == 0 or file.frames * (promised / there - 1) > SHORTFALL_SECONDS * file.samplerate:
            raise UnusableError(
                f"truncated: {there} of {promised} bytes that its header promises", _COPY
            )
    if file.format == "NIST":
        with path.open("rb") as lines:
            count = re.search(rb"^sample_count -i (\d+)$", lines.read(1024), re.MULTILINE)
        if count and int(count[1]) - file.frames > SHORTFALL_SECONDS * file.samplerate:
            raise UnusableError(
                f"truncated: {file.frames} of {int(count[1])} samples that its header promises",
                _COPY,
            )


@functools.lru_cache(maxsize=16)  # many utterances may be parts of one file
def _check_behind_wav(path: Path, changed: int, rate: int) -> None:
    """Looks for audio behind that of a WAV: programs that were killed leave a length of before."""
    with _mapped(path) as data:
        place, end, bytes_a_second = 12, 0, 2 * rate  # end: of the audio and of chunks behind it
        while place + 8 <= len(data):
            name = data[place : place + 4]
            size = int.from_bytes(data[place + 4 : place + 8], "little")
            if end and not (name.isascii() and name.decode().isprintable()):
                break
            if name == b"fmt ":
                bytes_a_second = int.from_bytes(data[place + 16 : place + 20], "little")
            place += 8 + size + size % 2
            if name == b"data" or end:
                end = place
        lost = len(data) - end if end else 0
        if data[:4] == b"RIFF" and lost > _JOINED_SECONDS * bytes_a_second and any(data[end:]):
            raise UnusableError(
                f"{lost} bytes behind the audio that its header promises, which are not read",
                _CONVERT,
            )


@functools.lru_cache(maxsize=16)
def _check_ogg(path: Path, changed: int) -> None:
    """Counts the streams that begin in an Ogg file, and looks whether its last page is the last."""
    with _mapped(path) as data:
        streams = _count(data, b"OggS\0\2")
        if streams > 1:
            raise UnusableError(
                f"{streams} Ogg streams end to end, of which only the first is decoded", _CONVERT
            )
        last = data.rfind(b"OggS\0")
        header = data[last : last + 27]
        sizes = data[last + 27 : last + 27 + header[-1]]
        is_whole = (
            len(header) == 27
            and len(sizes) == header[-1]
            and last + 27 + len(sizes) + sum(sizes) <= len(data)
        )
        if not (is_whole and header[5] & _LAST_PAGE):
            raise UnusableError("truncated: its last page of Ogg is missing", _COPY)


@functools.lru_cache(maxsize=16)
def _joined_files(path: Path, changed: int, length: int) -> int:
    """How often a file begins in a file: with the same bytes as at its start."""
    with _mapped(path) as data:
        return _count(data, data[:length])


def _count(data: mmap.mmap, wanted: bytes) -> int:
    count, place = 0, data.find(wanted)
    while place >= 0:
        count, place = count + 1, data.find(wanted, place + len(wanted))
    return count


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file of any size."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


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
