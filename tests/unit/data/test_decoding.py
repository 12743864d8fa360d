"""Audio is what it decodes to, whatever its header says; samples that are not speech are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import MonoCut
from numpy.typing import NDArray

from icetransfer.data.recordings import Limits, check
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.utterances import Rejection, Utterance

RATE = 16_000
LIMITS = Limits(0.5, 30.0)


def noise(seconds: float, pauses: bool = True) -> NDArray[np.float64]:
    samples = np.random.default_rng(1).normal(0, 0.1, round(seconds * RATE))
    if pauses:  # so that the bit rate varies, and nothing can be guessed from the file's size
        samples[np.arange(len(samples)) % 8000 > 4000] = 0
    return samples


def checked(path: Path, **fields: Any) -> dict[str, Any] | Rejection:
    utterance = Utterance("a", path, "ja", "x", "train", **fields)
    normalizer = Normalizer("nl")
    return check(utterance, normalizer.read(utterance.text), normalizer, LIMITS)


def duration(path: Path, **fields: Any) -> float:
    cut = checked(path, **fields)
    assert isinstance(cut, dict), cut
    return float(cut["duration"])


def reason(path: Path, **fields: Any) -> str:
    found = checked(path, **fields)
    assert isinstance(found, Rejection), found
    assert found.advice
    return found.reason


def mp3(path: Path, seconds: float) -> bytes:
    soundfile.write(path, noise(seconds), RATE, "MPEG_LAYER_III", format="MP3",
                    bitrate_mode="VARIABLE")  # fmt: skip
    return path.read_bytes()


def without_xing(data: bytes) -> bytes:
    """An MP3 without its first frame, which holds no audio but says how long the others are."""
    assert b"Xing" in data[:200]
    second = data.index(data[:2], 100)
    assert second == 288, "the frame of 64 kbit/s at 16 kHz"
    return data[second:]


def test_mp3_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    data = mp3(path, 3.0)
    assert duration(path) == 3.0
    path.write_bytes(data + b"TAG".ljust(128, b" "))
    assert duration(path) == 3.0, "a tag is no audio"
    cover = b"ID3\4\0\0" + bytes((0, 0, 78, 16)) + bytes(78 * 128 + 16)
    path.write_bytes(cover + data)
    assert duration(path) == 3.0, "nor is a picture"


def test_mp3_without_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    data = without_xing(mp3(path, 3.0))
    path.write_bytes(data)
    assert soundfile.info(path).duration < 2, "libsndfile guesses: that is what is to be found"
    assert "without a length in its header: 3.096 s, of which 1.4" in reason(path)
    path.write_bytes(data + without_xing(mp3(tmp_path / "b.mp3", 2.0)))
    assert "without a length in its header: 5.184 s" in reason(path)


def test_mp3_of_a_constant_bit_rate_needs_no_length(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(3.0, pauses=False), RATE, "MPEG_LAYER_III", format="MP3",
                    bitrate_mode="CONSTANT", compression_level=0.1)  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], 100) :])
    cut = checked(path)
    assert isinstance(cut, dict), cut
    assert cut["duration"] == pytest.approx(3.0, abs=0.1), "with the encoder's padding"
    assert MonoCut.from_dict(cut).load_audio().shape[1] == round(cut["duration"] * RATE)


def test_glued_mp3(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3(path, 3.0) + mp3(tmp_path / "b.mp3", 2.0))
    assert reason(path) == (
        "MP3s joined end to end: some 2.0 s after the 3.000 s that the first header promises"
    )


def test_truncated_mp3(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    data = mp3(path, 3.0)
    path.write_bytes(data[: len(data) // 2])
    assert reason(path).startswith("truncated: ")


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_chained_ogg(tmp_path: Path, codec: str) -> None:
    path, second = tmp_path / "a.ogg", tmp_path / "b.ogg"
    soundfile.write(path, noise(3.0), RATE, codec, format="OGG")
    soundfile.write(second, noise(2.0), RATE, codec, format="OGG")
    assert duration(path) == 3.0
    path.write_bytes(path.read_bytes() + second.read_bytes())
    assert reason(path) == "2 Ogg streams end to end, of which only the first is decoded"


def test_ogg_with_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(path, noise(6.0), RATE, "OPUS", format="OGG")
    data = bytearray(path.read_bytes())
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    data[pages[4] + 100] ^= 0xFF  # so that the sum of this page is wrong
    path.write_bytes(data)
    assert re.fullmatch(r"truncated: \d+ of 96000 samples", reason(path))


def test_wav_that_lost_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(3.0), RATE)
    data = path.read_bytes()
    path.write_bytes(data[:50_000])
    assert reason(path) == "truncated: 49956 of 96000 bytes that its header promises"
    path.write_bytes(data[:44])
    assert reason(path).startswith("truncated: 0 of 96000 bytes")
    path.write_bytes(data[:40] + b"\xff" * 4 + data[44:])  # as programs write to a pipe
    assert duration(path) == 3.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.aiff", "AIFF"), ("a.au", "AU"), ("a.w64", "W64"), ("a.rf64", "RF64"), ("a.sph", "NIST")],
)
def test_other_files_that_lost_their_end(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    soundfile.write(path, noise(3.0), RATE, format=kind)
    assert duration(path) == 3.0
    path.write_bytes(path.read_bytes()[:50_000])
    assert re.fullmatch(r"truncated: \d+ of \d+ (bytes|samples) that its .*", reason(path))


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_that_lost_its_end(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(path, noise(3.0), RATE, codec, format="OGG")
    data = path.read_bytes()
    last = data.rindex(b"OggS")
    for end in (last, last + 20, len(data) - 1, len(data) // 2):
        path.write_bytes(data[:end])
        assert reason(path) == "truncated: its last page of Ogg is missing", end


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "CAF", "RF64", "W64", "FLAC", "OGG", "MP3"])
def test_no_damage_raises(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    soundfile.write(path, noise(1.0), RATE, format=kind)
    data, draw = path.read_bytes(), np.random.default_rng(4)
    for _ in range(30):
        damaged = bytearray(data[: draw.integers(1, len(data) + 1)])
        places = np.minimum(draw.exponential(60, 3).astype(int), len(damaged) - 1)
        for place in (*places, -1 - places[0]):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged)
        assert isinstance(checked(path), dict | Rejection)


@pytest.mark.parametrize("kind", ["FLAC", "AU", "CAF", "RF64"])
def test_files_joined_end_to_end(tmp_path: Path, kind: str) -> None:
    path, second = tmp_path / "a", tmp_path / "b"
    soundfile.write(path, noise(3.0), RATE, format=kind)
    soundfile.write(second, noise(2.0), RATE, format=kind)
    assert duration(path) == 3.0
    path.write_bytes(path.read_bytes() + second.read_bytes())
    assert reason(path) == "2 files end to end, of which only the first is decoded"


@pytest.mark.parametrize(("promised", "lost"), [(0, 96_000), (32_000, 64_000)])
def test_wav_that_holds_more_than_its_header_says(tmp_path: Path, promised: int, lost: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(3.0, pauses=False), RATE)
    data = path.read_bytes()
    notes = b"LIST" + (40_000).to_bytes(4, "little") + b"x" * 40_000
    path.write_bytes(data + notes)
    assert duration(path) == 3.0, "chunks behind the audio are none"
    path.write_bytes(data[:40] + promised.to_bytes(4, "little") + data[44:])
    assert reason(path).startswith(f"{lost} bytes behind the audio that its header promises")


@pytest.mark.parametrize(("rate", "good"), [(44_100, True), (11_025, True), (11_127, False)])
def test_a_rate_that_would_take_all_memory(tmp_path: Path, rate: int, good: bool) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(3.0), rate)
    if good:
        assert duration(path) == pytest.approx(3.0 * RATE / rate, abs=0.001)
    else:
        assert reason(path).startswith("sampled at 11127 Hz, which takes gigabytes")


def test_flac_that_does_not_say_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(3.0), RATE)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the number of samples: 36 bits
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert reason(path) == "its header does not say how long it is"


def stereo(path: Path) -> None:
    soundfile.write(path, np.stack([noise(1.0), np.zeros(RATE)], axis=1), RATE)


def writer(change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        soundfile.write(path, change(noise(1.0)).astype(np.float32), RATE, "FLOAT")

    return write


def with_value(value: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    return lambda samples: np.where(np.arange(len(samples)) == 5000, value, samples)


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (writer(with_value(np.nan)), "samples that are not finite (NaN or infinity)"),
        (writer(with_value(np.inf)), "samples that are not finite (NaN or infinity)"),
        (writer(lambda s: s * np.nan), "samples that are not finite (NaN or infinity)"),
        (writer(lambda s: np.round(s * 32768)), "samples up to 12889: expected -1 to 1"),
        (writer(lambda s: s + 0.25), "a DC offset of 0.25, the limit is 0.1"),
        (writer(lambda s: s * 0), "nothing but digital silence"),
        (writer(lambda s: s * 0 + 0.5), "nothing but digital silence"),
        (stereo, "2 channels, of which 1 (from 0) is empty"),
    ],
)
def test_samples_that_are_not_speech(
    tmp_path: Path, write: Callable[[Path], None], wanted: str
) -> None:
    write(tmp_path / "a.wav")
    assert reason(tmp_path / "a.wav") == wanted


def test_loud_floats_and_a_small_offset_are_speech(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, (noise(1.0) * 4 + 0.05).astype(np.float32), RATE, "FLOAT")
    assert duration(path) == 1.0


def test_places_outside_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(3.0), RATE)
    assert duration(path, start=1.0) == 2.0, "to the end"
    assert reason(path, start=3.5) == "starts outside of the file: at 3.500 s of 3.000 s"
    assert reason(path, start=-1.0) == "starts outside of the file: at -1.000 s of 3.000 s"
    assert reason(path, start=2.0, seconds=2.0) == "ends after the file: at 4.000 s of 3.000 s"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "."])
def test_a_path_that_no_file_can_have_is_named(tmp_path: Path, name: str) -> None:
    assert "no such file" in reason(tmp_path / name) or "opened" in reason(tmp_path / name)


@pytest.mark.parametrize(("on_disk", "given"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_the_other_normal_form_is_found(tmp_path: Path, on_disk: Any, given: Any) -> None:
    import unicodedata

    path = tmp_path / unicodedata.normalize(on_disk, "Lübeck/café.wav")
    path.parent.mkdir()
    soundfile.write(path, noise(1.0), RATE)
    for name in ("Lübeck/café.wav", "Lübeck/cafe\u0301.wav"):  # the second in a mix of both
        cut = checked(tmp_path / unicodedata.normalize(given, name))
        assert isinstance(cut, dict)
        assert cut["recording"]["sources"][0]["source"] == str(path)
