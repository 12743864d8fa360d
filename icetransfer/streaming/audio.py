"""Audio as it comes: from files of all kinds, standard input or a microphone, piece by piece.

Pieces are mono at 16 kHz in [-1, 1], a second of a file or a tenth of a second of what is live, so
that memory does not grow with the recording.  Channels are mixed; other sampling rates are
converted as the audio comes, with soxr.
"""

from __future__ import annotations

import io
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import log

Samples = NDArray[np.float32]

STANDARD_INPUT = "-"
LIVE_SECONDS = 0.1  # of a piece of what is live


class Converter:
    """Makes mono at 16 kHz of a recording's pieces.

    Args:
        rate: of what comes, in Hz.
        name: of the recording, for errors.
    """

    def __init__(self, rate: int, name: str) -> None:
        self._name, self._rate = name, rate
        self._stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1, "float32")
        self._heard = 0

    @property
    def seconds(self) -> float:
        """What has come so far."""
        return self._heard / self._rate

    def __call__(self, samples: Samples, last: bool = False) -> Samples:
        """Converts samples (T, channels).

        Raises:
            ValueError: some are not numbers.
        """
        if not np.isfinite(samples).all():
            raise ValueError(
                f"{self._name} holds samples that are not numbers after "
                f"{self.seconds:.1f} s: write it again, as 16-bit PCM for example"
            )
        self._heard += len(samples)
        mono: Samples = samples.mean(axis=1, dtype=np.float32)
        if self._rate == SAMPLING_RATE:
            return mono
        converted: Samples = self._stream.resample_chunk(mono, last)
        return converted


def duration(file: str) -> float:
    """Seconds of a sound file, by its header.

    Raises:
        ValueError: the file is missing or not audio.
    """
    with _open(file) as sound:
        return float(sound.frames / sound.samplerate)


def read_file(file: str) -> Iterator[Samples]:
    """The pieces of a sound file: WAV, FLAC, MP3, Ogg and what else libsndfile reads.

    Raises:
        ValueError: the file is missing, empty, or not audio.
    """
    with _open(file) as sound:
        yield from _pieces(sound, file)


def _open(file: str) -> soundfile.SoundFile:
    if not Path(file).is_file():
        raise ValueError(f"{file} does not exist, or is not a file")
    return _as_sound(file, file)


def _as_sound(source: str | BinaryIO, name: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(source)
    except soundfile.SoundFileError as error:
        raise ValueError(
            f"{name} cannot be read as audio: {error}; "
            f"ffmpeg -i FILE -ar 16000 -ac 1 out.wav makes a file that can"
        ) from None


def _pieces(sound: soundfile.SoundFile, name: str) -> Iterator[Samples]:
    convert = Converter(sound.samplerate, name)
    is_empty = True
    try:
        for block in sound.blocks(sound.samplerate, dtype="float32", always_2d=True):
            is_empty = False
            yield convert(block)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{name} cannot be read to its end: {error}") from None
    if is_empty:
        raise ValueError(f"{name}: the audio is empty")
    yield convert(np.zeros((0, sound.channels), dtype=np.float32), last=True)


def read_standard_input() -> Iterator[Samples]:
    """The pieces of what comes in: PCM WAV as it comes, anything else when all of it is there.

    WAV files may follow one another, at any rates.

    Raises:
        ValueError: it is empty or not audio.
    """
    given: Any = sys.stdin.buffer
    if given.seekable():
        yield from _pieces(_as_sound(given, "standard input"), "standard input")
        return
    if given.peek(4)[:4] not in (b"RIFF", b"RF64"):
        content = io.BytesIO(given.read())
        yield from _pieces(_as_sound(content, "standard input"), "standard input")
        return
    while given.peek(4)[:4] == b"RIFF":
        yield from _wave_pieces(given)


def _wave_pieces(given: BinaryIO) -> Iterator[Samples]:
    """One WAV file from a pipe; its header may say that it is longer than it will be."""
    try:
        with wave.open(given) as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            convert = Converter(rate, "standard input")
            while block := sound.readframes(int(LIVE_SECONDS * rate)):
                whole = len(block) - len(block) % (channels * width)
                yield convert(_numbers(block[:whole], width).reshape(-1, channels))
            yield convert(np.zeros((0, channels), dtype=np.float32), last=True)
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"standard input is WAV that cannot be read as it comes ({error}): send 16-bit PCM, as "
            f"ffmpeg -i FILE -f wav -c:a pcm_s16le -ac 1 - does"
        ) from None


def _numbers(block: bytes, width: int) -> Samples:
    """PCM samples in [-1, 1]; those of 8 bits are unsigned."""
    if width == 1:
        numbers = np.frombuffer(block, np.uint8).astype(np.int32) - 128
    elif width == 3:  # as the upper bytes of 32 bits
        padded = np.zeros((len(block) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(block, np.uint8).reshape(-1, 3)
        numbers, width = padded.view("<i4")[:, 0], 4
    else:
        numbers = np.frombuffer(block, f"<i{width}")
    scaled: Samples = (numbers / 2 ** (8 * width - 1)).astype(np.float32)
    return scaled


def microphone(device: str | None = None) -> Iterator[Samples]:
    """What a microphone hears, at the rate that it has, without end.

    Args:
        device: its number or a part of its name; None for the system's default.

    Raises:
        ValueError: sounddevice is not installed, or there is no such microphone.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio is missing
        raise ValueError(
            f"--microphone needs the Python package sounddevice and PortAudio ({error}): "
            f"pip install sounddevice, on Linux also the system's libportaudio2"
        ) from None
    chosen = int(device) if device and device.isdecimal() else device
    try:
        found = sounddevice.query_devices(chosen, "input")
        rate = int(found["default_samplerate"])
        log.info("listening to %s at %d Hz; end with Ctrl-C", found["name"], rate)
        convert = Converter(rate, "the microphone")
        size = int(LIVE_SECONDS * rate)
        with sounddevice.InputStream(
            device=chosen, samplerate=rate, channels=1, dtype="float32", blocksize=size
        ) as stream:
            while True:
                samples, has_lost = stream.read(size)
                if has_lost:
                    log.warning(
                        "samples were lost before %.1f s: the computer is too slow; choose int8 or "
                        "a tier of longer chunks", convert.seconds,
                    )  # fmt: skip
                yield convert(samples)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise ValueError(
            f"no microphone to listen to ({error}); python -m sounddevice lists the devices, "
            f"--device chooses one"
        ) from None
