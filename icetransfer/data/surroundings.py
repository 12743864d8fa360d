"""Training speech in other surroundings: louder, with pauses, in noise, in a room, over a line.

`train.augment` lists what is done to the cuts, one after the other.  Where features are computed on
the fly it is done to waveforms.  Where they are stored, the same is done to the powers of mel bins:
loudness is an addition to their logarithms, noise a sum of powers, a room an echo of powers from
frame to frame, a telephone line an attenuation of each bin.  What is done to a cut depends on the
seed, the epoch and the cut's name alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from lhotse import Recording, RecordingSet
from lhotse.cut import Cut
from numpy.typing import NDArray
from scipy import signal
from scipy.special import erf

from icetransfer.data import acoustics
from icetransfer.data.acoustics import Samples, generator
from icetransfer.data.features import (
    FLOOR,
    FRAME_SHIFT,
    fbank,
    is_on_the_fly,
    load_features,
    read_audio,
)
from icetransfer.data.shards import NUM_BINS
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import log
from icetransfer.settings import augment as settings

Features = NDArray[np.float32]
Draw = np.random.Generator

HOP = round(FRAME_SHIFT * SAMPLING_RATE)  # samples of a frame
NATURAL = np.log(10) / 10  # what a decibel adds to a logarithm of powers
ROOMS = 50  # simulated ones; to make one takes some 70 ms, once in a process
STRETCH_SECONDS = 8  # of generated noise, which is cut out anywhere and repeated
SLOPES = (0, 0.5, 1, 1.5, 2)  # of generated noise: from white to brown
STRETCHES = 3 * len(SLOPES)  # of which every third is breath
ROUNDED = 0.05  # by which stored features differ from computed ones
DISTORTION_SLOPE = 1.5  # of what clipping adds; with its share, nearest to clipped Dutch speech
DISTORTION_SHARE = 0.3  # in most bins: the rest is in few
DIGITAL = 0.4  # share of pauses that are digital silence


class Effect(Protocol):
    """Something that is done to a cut, to its samples or to its features."""

    def wave(self, samples: Samples, draw: Draw) -> Samples:
        """Does it to samples (num_samples,)."""

    def features(self, features: Features, draw: Draw) -> Features:
        """Does it to features (T, 80)."""


E = TypeVar("E", bound=Effect)


@lru_cache(maxsize=STRETCHES)
def _stretch(number: int) -> tuple[Samples, Features]:
    """Generated noise with a mean square of 1, as samples and as features."""
    if number % 3:
        return _coloured(SLOPES[number % len(SLOPES)])
    noise = acoustics.breath(STRETCH_SECONDS * SAMPLING_RATE, generator("breath", number))
    return noise, fbank(noise)


@lru_cache(maxsize=len(SLOPES))
def _coloured(slope: float) -> tuple[Samples, Features]:
    """Noise of a falling spectrum with a mean square of 1, as samples and as features."""
    draw = generator("noise", slope)
    noise = acoustics.coloured_noise(STRETCH_SECONDS * SAMPLING_RATE, slope, draw)
    return noise, fbank(noise)


def _noise_samples(count: int, draw: Draw) -> Samples:
    """Generated noise from anywhere in a stretch, (count,)."""
    samples = _stretch(int(draw.integers(STRETCHES)))[0]
    return np.resize(np.roll(samples, int(draw.integers(len(samples)))), count)


def _noise_features(frames: int, draw: Draw) -> Features:
    """The same as features, (frames, 80)."""
    features = _stretch(int(draw.integers(STRETCHES)))[1]
    return np.resize(np.roll(features, int(draw.integers(len(features))), 0), (frames, NUM_BINS))


class Level:
    """Softer or louder."""

    def __init__(self, section: settings.Level) -> None:
        self._section = section

    def wave(self, samples: Samples, draw: Draw) -> Samples:
        """Clips what becomes too loud."""
        return acoustics.amplify(samples, draw.uniform(*self._section.db))

    def features(self, features: Features, draw: Draw) -> Features:
        """Adds to the logarithms, and distorts what becomes too loud."""
        db = draw.uniform(*self._section.db)
        louder = features + np.float32(NATURAL * db)
        if db > 0:
            louder = _clipped(louder)
        is_silent = features < FLOOR + ROUNDED  # stays so, however loud
        return np.where(is_silent, features, np.maximum(louder, FLOOR))


def _clipped(features: Features) -> Features:
    """Features as if their samples were clipped at full scale.

    By Bussgang's theorem clipped Gaussian noise is the noise, weaker, and a distortion that is not
    correlated with it (Papoulis & Pillai, "Probability, Random Variables and Stochastic Processes",
    chapter 9).  Frames of speech are taken as Gaussian, and the distortion as noise of a falling
    spectrum.
    """
    unit = _mean_power(_coloured(0)[1])  # of noise with a mean square of 1
    power = np.maximum(_frame_powers(features) / unit, acoustics.QUIETEST)[:, np.newaxis]
    full_scale = 1 / np.sqrt(2 * power)
    gain = erf(full_scale)
    clipped = power * gain - np.sqrt(2 * power / np.pi) * np.exp(-(full_scale**2)) + 1 - gain
    distortion = np.maximum(clipped - gain**2 * power, acoustics.QUIETEST**2)
    spread = _mean_log(_coloured(DISTORTION_SLOPE)[1]) + np.log(DISTORTION_SHARE)
    found = np.logaddexp(features + 2 * np.log(gain), np.log(distortion) + spread)
    return np.asarray(found, np.float32)


class Silence:
    """Pauses before and after the speech, which are longer cuts: see `Augmenter.pauses`."""

    def __init__(self, section: settings.Silence) -> None:
        self._section = section

    def frames(self, draw: Draw) -> tuple[int, int]:
        """Lengths of the pauses before and after, in frames; not both are 0."""
        shortest, longest = (round(seconds / FRAME_SHIFT) for seconds in self._section.seconds)
        before, after = (int(n) for n in draw.integers(shortest, longest + 1, 2))
        where = draw.integers(3)  # before, after or both
        return before * (where != 1), after * (where != 0)

    def wave(self, samples: Samples, draw: Draw) -> Samples:
        """Puts samples between two pauses."""
        before, after = (self._pause(frames * HOP, draw) for frames in self.frames(draw))
        return np.concatenate([before, samples, after])

    def _pause(self, count: int, draw: Draw) -> Samples:
        if draw.random() < DIGITAL:
            return np.zeros(count, np.float32)
        noise = _noise_samples(count, draw)
        return np.asarray(noise * 10 ** (draw.uniform(*self._section.db) / 20), np.float32)

    def features(self, features: Features, draw: Draw) -> Features:
        """Puts features between two pauses."""
        before, after = (self._pause_features(frames, draw) for frames in self.frames(draw))
        return np.concatenate([before, features, after])

    def _pause_features(self, frames: int, draw: Draw) -> Features:
        if draw.random() < DIGITAL:
            return np.full((frames, NUM_BINS), FLOOR, np.float32)
        noise = _noise_features(frames, draw)
        level = NATURAL * draw.uniform(*self._section.db)
        return np.asarray(np.maximum(noise + level, FLOOR), np.float32)


class Noise:
    """Noise behind the speech, generated or recorded."""

    def __init__(self, section: settings.Noise) -> None:
        self._section = section
        self._recordings = None if section.path is None else Recordings("noise", section.path)

    def wave(self, samples: Samples, draw: Draw) -> Samples:
        """Adds the noise."""
        noise = self._noise(len(samples), draw)
        return acoustics.add_noise(samples, noise, draw.uniform(*self._section.snr))

    def features(self, features: Features, draw: Draw) -> Features:
        """Adds powers of mel bins, as if noise and speech were not correlated."""
        if self._recordings is None:
            noise = _noise_features(len(features), draw)
        else:
            noise = fbank(self._noise(len(features) * HOP, draw))
            noise = np.resize(noise, features.shape)  # repeats what is too short
        snr = draw.uniform(*self._section.snr)
        louder = np.log(_mean_power(features) / _mean_power(noise)) - snr * NATURAL
        noisy: Features = np.logaddexp(features, noise + np.float32(louder))
        return noisy

    def _noise(self, count: int, draw: Draw) -> Samples:
        if self._recordings is None:
            return _noise_samples(count, draw)
        return self._recordings.read(draw, count / SAMPLING_RATE)


class Room:
    """The echo of a room."""

    def __init__(self, section: settings.Room) -> None:
        self._recordings = None if section.path is None else Recordings("room", section.path)

    def _response(self, draw: Draw) -> Samples:
        if self._recordings is None:
            return acoustics.simulated_room(int(draw.integers(ROOMS)))
        return acoustics.from_direct_sound(self._recordings.read(draw))

    def wave(self, samples: Samples, draw: Draw) -> Samples:
        """Convolves samples with an impulse response."""
        return acoustics.reverberate(samples, self._response(draw))

    def features(self, features: Features, draw: Draw) -> Features:
        """Convolves powers with the power of an impulse response, from frame to frame."""
        response = self._response(draw)
        padded = np.pad(response.astype(np.float64), (0, -len(response) % HOP))
        echo = np.square(padded).reshape(-1, HOP).sum(1, keepdims=True) / np.square(padded).sum()
        # In double precision: a loud frame's rounding would be heard in quiet ones.
        powers = signal.fftconvolve(np.exp(features, dtype=np.float64), echo, axes=0)
        powers = powers[: len(features)]
        return np.asarray(np.log(np.maximum(powers, np.exp(FLOOR))), np.float32)


class Codec:
    """What a line does."""

    def __init__(self, section: settings.Codec) -> None:
        self._names = section.names

    def wave(self, samples: Samples, draw: Draw) -> Samples:
        """Codes and decodes samples."""
        return acoustics.CODECS[self._names[int(draw.integers(len(self._names)))]](samples)

    def features(self, features: Features, draw: Draw) -> Features:
        """Weakens each bin as a telephone line does, and adds the noise of its 8 bits."""
        attenuation, noise = _telephone_line()
        floor = np.log(np.exp(features).mean(1, keepdims=True)) + noise
        return np.asarray(np.maximum(np.logaddexp(features + attenuation, floor), FLOOR))


@lru_cache(maxsize=1)
def _telephone_line() -> tuple[Features, Features]:
    """Of each bin the attenuation of a telephone line, and its noise against the speech's power.

    Both are measured on noise: on white noise where the line passes sound, and, where it does not,
    on what is heard there of a noise as coloured as speech is.
    """
    draw = generator("telephone")
    white = acoustics.at_level(acoustics.coloured_noise(4 * SAMPLING_RATE, 0, draw), -25)
    before, after = (_mean_log(fbank(x)) for x in (white, acoustics.telephone(white)))
    pink = acoustics.at_level(acoustics.coloured_noise(4 * SAMPLING_RATE, 1.5, draw), -25)
    loud, heard = (_mean_log(fbank(x)) for x in (pink, acoustics.telephone(pink)))
    attenuation = np.minimum(after - before, 0)
    noise = np.minimum(heard - np.log(np.exp(loud).mean()), 0)
    passes = attenuation > np.log(0.1)
    return attenuation, np.where(passes, np.float32(-30 * NATURAL), noise).astype(np.float32)


def _mean_log(features: Features) -> Features:
    mean: Features = np.log(np.exp(features.astype(np.float64)).mean(0)).astype(np.float32)
    return mean


@lru_cache(maxsize=1)
def _emphasis() -> NDArray[np.float64]:
    """By how much the pre-emphasis of filter banks weakens the power of each bin, at its centre."""
    low, high = (1127 * np.log1p(hertz / 700) for hertz in (20, SAMPLING_RATE / 2 - 400))
    centres = 700 * np.expm1(np.linspace(low, high, NUM_BINS + 2)[1:-1] / 1127)
    return np.abs(1 - 0.97 * np.exp(-2j * np.pi * centres / SAMPLING_RATE)) ** 2


def _frame_powers(features: Features) -> NDArray[np.float64]:
    """What is in proportion to the power of the samples of each frame, (T,)."""
    powers: NDArray[np.float64] = (np.exp(features, dtype=np.float64) / _emphasis()).mean(1)
    return powers


def _mean_power(features: Features) -> float:
    return float(_frame_powers(features).mean())


class Recordings:
    """The recordings of a folder or of a manifest, of noise or of rooms."""

    def __init__(self, kind: str, path: Path) -> None:
        """Finds them.

        Args:
            kind: of augmentation, for messages.
            path: a folder, or a lhotse manifest of recordings.

        Raises:
            ValueError: there are none.
        """
        self._kind, self._told_of_rate = kind, False
        where = f"train.augment, {kind}: path={path}"
        self._found: list[Path] | list[Recording]
        if path.is_dir():
            suffixes = (".wav", ".flac", ".ogg", ".mp3")
            self._found = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes)
        elif path.is_file():
            recordings = [*RecordingSet.from_file(path)]
            recordings.sort(key=lambda recording: recording.id)
            self._found = recordings
        else:
            raise ValueError(f"{where} does not exist: give a folder of audio, or a manifest")
        if not self._found:
            raise ValueError(
                f"{where}: no recordings there; expected wav, flac, ogg or mp3 files, or a lhotse "
                f"manifest of recordings"
            )

    def read(self, draw: Draw, seconds: float = np.inf) -> Samples:
        """One of them, or so many seconds from somewhere in it; its first channel at 16 kHz.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        found = self._found[int(draw.integers(len(self._found)))]
        try:
            recording = Recording.from_file(found) if isinstance(found, Path) else found
        except Exception as error:  # whatever a decoder raises on a broken file
            raise ValueError(f"{found} cannot be read ({error})") from error
        if recording.sampling_rate != SAMPLING_RATE and not self._told_of_rate:
            self._told_of_rate = True
            log.info(
                "train.augment, %s: %s has %d Hz; recordings of other rates are resampled to %d Hz",
                self._kind, recording.sources[0].source, recording.sampling_rate, SAMPLING_RATE,
            )  # fmt: skip
        whole = recording.resample(SAMPLING_RATE).to_cut()
        cut = whole if recording.num_channels == 1 else whole.to_mono()[0]
        spare = cut.duration - seconds
        if spare > 0:
            cut = cut.truncate(offset=draw.uniform(0, spare), duration=seconds)
        return read_audio(cut)


EFFECTS: dict[str, Callable[..., Effect]] = {
    "level": Level,
    "silence": Silence,
    "noise": Noise,
    "room": Room,
    "codec": Codec,
}


class Augmenter:
    """Does what a list of augmentations says to the cuts that are loaded."""

    def __init__(self, listed: Sequence[settings.AnyAugmentation], seed: int) -> None:
        """Finds the recordings that augmentations need.

        Args:
            listed: in the order in which they are done.
            seed: of what is drawn.

        Raises:
            ValueError: there are no recordings where there should be.
        """
        self._seed = seed
        self._effects = [
            (number, section, EFFECTS[section.kind](section))
            for number, section in enumerate(listed)
        ]
        self._silences = [
            (number, section, effect)
            for number, section, effect in self._effects
            if isinstance(effect, Silence)
        ]

    def pauses(self, key: str) -> int:
        """Frames by which a cut becomes longer.

        Args:
            key: as of `load`.
        """
        drawn = self._drawn(self._silences, key)  # alone: every cut of a block is asked for them
        return sum(sum(effect.frames(draw)) for _, effect, draw in drawn)

    def load(self, cut: Cut, key: str) -> Features:
        """The features of a cut, or of what becomes of it.

        Args:
            cut: any.
            key: decides with the seed what is done.

        Returns:
            (T, 80), of its own.

        Raises:
            ValueError: its features or its audio cannot be read.
        """
        if is_on_the_fly(cut):
            return fbank(self._done(cut, read_audio(cut), key, "wave"))
        return self._done(cut, load_features(cut), key, "features")

    def _drawn(
        self, effects: Iterable[tuple[int, settings.AnyAugmentation, E]], key: str
    ) -> Iterator[tuple[settings.AnyAugmentation, E, Draw]]:
        """Those of the effects that are done to a cut, each with a generator of its own."""
        for number, section, effect in effects:
            draw = generator(section.kind, number, self._seed, key)
            if draw.random() < section.probability:
                yield section, effect, draw

    def _done(self, cut: Cut, x: Features, key: str, to: Literal["wave", "features"]) -> Features:
        """Does it, one after the other; what fails is said, and left out."""
        for section, effect, draw in self._drawn(self._effects, key):
            try:
                x = getattr(effect, to)(x, draw)
            except ValueError as error:
                log.warning("cut %s goes on without its %s: %s", cut.id, section.kind, error)
        return x
