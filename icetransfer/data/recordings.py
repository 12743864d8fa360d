"""Whether a recording and its transcript can be used, and the lhotse cut that says so."""

from __future__ import annotations

import math
import os
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from icetransfer.data.decoding import BLOCK, SHORTFALL_SECONDS, Levels, check_header
from icetransfer.data.text.normalizer import Normalizer, Reading
from icetransfer.data.utterances import SAMPLING_RATE, Rejection, UnusableError, Utterance

AUDIO_DIGEST = "audio_digest"  # in the custom fields of a cut
OUTSIDE = " alphabet: "  # in the reason of a text that has other characters, before them
DOUBT = " of which it is not sure what was said: "  # in a reason, before what is in doubt
#: One chunk of 160 ms and its look-ahead of 130 ms: the least that can be decoded.
SHORTEST_TEST_SECONDS = 0.29
#: By how much a file may be shorter than its corpus says: durations of mp3 are approximate.
_PROMISE_KEPT_SECONDS = 0.25
#: Numbers in the filters that resample; 11025 Hz and its multiples need 0.3 million.
_LARGEST_FILTERS = 20_000_000


@dataclass(frozen=True)
class Limits:
    """The shortest and the longest recording of train and dev, in seconds."""

    min_seconds: float
    max_seconds: float


def check(
    utterance: Utterance, reading: Reading, normalizer: Normalizer, limits: Limits
) -> dict[str, Any] | Rejection:
    """Checks an utterance's text and decodes its audio to the end.

    Args:
        utterance: What a reader gave.
        reading: What the normaliser makes of its text.
        normalizer: Of its language.
        limits: Of the recordings of train and dev; a test recording must be decodable, no more.

    Returns:
        The lhotse cut as it stands in a manifest, or why there is none.
    """
    try:
        _check_text(utterance, reading, normalizer)
        utterance = replace(utterance, path=find_file(utterance.path))
        audio = checked_audio(utterance, limits)
    except UnusableError as error:
        return Rejection(utterance.id, str(utterance.path), error.reason, error.advice)
    return _cut(utterance, reading.text, normalizer.language, audio)


def _check_text(utterance: Utterance, reading: Reading, normalizer: Normalizer) -> None:
    if not reading.text:
        raise UnusableError("empty transcript", "write what is said, or remove the line")
    offending = normalizer.outside(reading.text)
    if offending and utterance.split != "test":
        raise UnusableError(
            f"{utterance.split} text outside the {normalizer.name}{OUTSIDE}{' '.join(offending)}",
            "write it as it is spoken",
        )
    if reading.doubts and utterance.split != "test":
        raise UnusableError(
            f"{utterance.split} text{DOUBT}{reading.doubts[0]}", "write it as it is spoken"
        )


class Audio(NamedTuple):
    """What an utterance's audio is.

    Attributes:
        sampling_rate: Of the file.
        in_file: Samples of the file.
        samples: Of the utterance.
        digest: Of the utterance's samples.
    """

    sampling_rate: int
    in_file: int
    samples: int
    digest: str


def checked_audio(utterance: Utterance, limits: Limits) -> Audio:
    """Decodes an utterance's audio and looks whether it can be used.

    Raises:
        UnusableError: The audio is missing, broken, silent, not mono, or of the wrong length, or
            its samples are not those of speech.
    """
    path = utterance.path
    try:
        if not path.is_file():
            raise UnusableError("no such file", "correct the path, or bring the file")
        if path.stat().st_size == 0:
            raise UnusableError("empty file", "copy it again")
        with soundfile.SoundFile(path) as file:
            rate, in_file = file.samplerate, check_header(path, file)
            _check_rate(rate)
            first, wanted = _place(utterance, in_file, rate, limits)
            levels = _decode(file, first, wanted)
    except soundfile.SoundFileError as error:
        reason = str(error).splitlines()[0]
        raise UnusableError(
            f"not readable as audio ({reason})", "convert it to FLAC or WAV"
        ) from None
    except (OSError, ValueError) as error:  # no permission, or no path that a file can have
        raise UnusableError(
            f"cannot be opened ({error})", "correct the path, or who may read it"
        ) from None
    if wanted - levels.samples > SHORTFALL_SECONDS * rate:
        raise UnusableError(
            f"truncated: {levels.samples} of {wanted} samples", "copy or convert it again"
        )
    promised = utterance.promised_seconds
    if promised is not None and in_file / rate < promised - _PROMISE_KEPT_SECONDS:
        raise UnusableError(
            f"truncated: {in_file / rate:.3f} of {promised:.3f} s that the corpus promises",
            "copy it again",
        )
    levels.check()
    return Audio(rate, in_file, wanted, levels.digest)


def _check_rate(rate: int) -> None:
    """Looks whether resampling is cheap: its filters grow with the terms of the ratio of rates."""
    common = math.gcd(rate, SAMPLING_RATE)
    if rate // common * (SAMPLING_RATE // common) > _LARGEST_FILTERS:
        raise UnusableError(
            f"sampled at {rate} Hz, which takes gigabytes to resample to {SAMPLING_RATE} Hz",
            f"convert it: ffmpeg -i FILE -ar {SAMPLING_RATE} FILE.flac",
        )


def _place(utterance: Utterance, in_file: int, rate: int, limits: Limits) -> tuple[int, int]:
    """Returns the first sample of an utterance and how many it has.

    Raises:
        UnusableError: It is too short or too long, or not in the file.
    """
    first = round(utterance.start * rate)
    if not 0 <= first < max(in_file, 1):
        raise UnusableError(
            f"starts outside of the file: at {utterance.start:.3f} s of {in_file / rate:.3f} s",
            "correct the offset",
        )
    wanted = in_file - first
    if utterance.seconds is not None:
        wanted = round(utterance.seconds * rate)
    # Before it is read: a broken header can promise hours.
    _check_length(wanted / rate, limits, utterance.split)
    if first + wanted > in_file + rate // 100:
        raise UnusableError(
            f"ends after the file: at {(first + wanted) / rate:.3f} s of {in_file / rate:.3f} s",
            "correct the offset and the duration, or copy the file again",
        )
    return first, min(wanted, in_file - first)


def _decode(file: soundfile.SoundFile, first: int, wanted: int) -> Levels:
    """Decodes a part of a file, or what there is of it."""
    levels = Levels()
    if first:
        file.seek(first)
    # Not SoundFile.blocks(): that yields whole blocks also when the file ends early.
    while levels.samples < wanted:
        asked = min(BLOCK // file.channels, wanted - levels.samples)
        block = file.read(asked, dtype="float32", always_2d=True)
        levels.add(block)
        if len(block) < asked:  # the end, or a hole: what follows it would be moved in time
            break
    return levels


def find_file(path: Path) -> Path:
    """Finds a file whose name, or a folder's, is written with composed or decomposed accents.

    Archives that were packed on a Mac have decomposed names; tables have composed ones.
    """
    exists = os.path.exists  # Path.exists() raises if a name is too long
    if str(path).isascii() or exists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        spelt = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found /= next((name for name in spelt if exists(found / name)), part)
    return found


def _check_length(seconds: float, limits: Limits, split: str) -> None:
    shortest, longest = limits.min_seconds, limits.max_seconds
    advice = "cut or join it, or change data.min_seconds and data.max_seconds"
    if split == "test":
        shortest, longest = SHORTEST_TEST_SECONDS, float("inf")
        advice = "remove the line: that is less than one chunk of 160 ms and its look-ahead"
    if not shortest <= seconds <= longest:
        side, limit = ("short", shortest) if seconds < shortest else ("long", longest)
        raise UnusableError(f"too {side}: {seconds:.3f} s, the limit is {limit:g} s", advice)


def _cut(utterance: Utterance, text: str, language: str, audio: Audio) -> dict[str, Any]:
    """Returns a lhotse cut as it stands in a manifest; other rates are resampled when read."""
    from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

    sampling_rate, file_samples, samples, digest = audio
    recording = Recording(
        id=utterance.id,
        sources=[AudioSource("file", [0], str(utterance.path))],
        sampling_rate=sampling_rate,
        num_samples=file_samples,
        duration=file_samples / sampling_rate,
    )
    if sampling_rate != SAMPLING_RATE:
        recording = recording.resample(SAMPLING_RATE)
    whole = samples == file_samples
    duration = recording.duration if whole else samples / sampling_rate
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=duration,
        text=text,
        language=language,
        speaker=utterance.speaker,
        custom={"raw_text": utterance.text},
    )
    cut = MonoCut(
        id=utterance.id,
        start=0.0 if whole else utterance.start,
        duration=duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
        custom={AUDIO_DIGEST: digest},
    )
    described: dict[str, Any] = cut.to_dict()
    return described
