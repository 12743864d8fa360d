"""What rooms, microphones and lines do to a waveform.

Samples are float32 (num_samples,) in [-1, 1] at 16 kHz, and keep their number.  All that is random
comes from the generator that is given.
"""

import hashlib
import io
import itertools
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse.augmentation.utils import FastRandomRIRGenerator
from numpy.typing import NDArray
from scipy import signal

from icetransfer.data.utterances import SAMPLING_RATE

Samples = NDArray[np.float32]

TELEPHONE_RATE = 8000
TELEPHONE_BAND = 300, 3400  # Hz
OPUS_COMPRESSION = 0.96  # of libsndfile's 0 to 1: some 15 kbit/s at 16 kHz
BREATH_BAND = 400, 5000  # Hz
QUIETEST = 1e-9  # a power below that of any recording, against division by nothing


def generator(*words: object) -> np.random.Generator:
    """A generator that is a function of these words, on every machine and in every process."""
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def power(samples: Samples) -> float:
    """The mean square."""
    return float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0


def at_level(samples: Samples, db: float) -> Samples:
    """The samples with a root mean square of so many dB against full scale."""
    factor = 10 ** (db / 20) / np.sqrt(max(power(samples), QUIETEST))
    return np.asarray(samples * factor, np.float32)


def amplify(samples: Samples, db: float) -> Samples:
    """Louder or softer, in 16 bits; what passes full scale is clipped."""
    louder = np.clip(samples * 10 ** (db / 20), -1, 32767 / 32768)
    return np.asarray(np.round(louder * 32768) / 32768, np.float32)


def coloured_noise(count: int, slope: float, draw: np.random.Generator) -> Samples:
    """Noise whose power falls with the frequency to the power of `slope`: 0 white, 1 pink, 2 brown.

    Returns:
        (count,) with a mean square of 1.
    """
    spectrum = np.fft.rfft(draw.standard_normal(count))
    # Below 50 Hz it stays level, or a brown noise would be inaudible rumble alone.
    frequencies = np.fft.rfftfreq(count, 1 / SAMPLING_RATE)
    shaped = np.fft.irfft(spectrum * np.maximum(frequencies, 50) ** (-slope / 2), count)
    return at_level(shaped.astype(np.float32), 0)


def breath(count: int, draw: np.random.Generator) -> Samples:
    """Someone breathing: hissing that swells and fades, with pauses.

    Returns:
        (count,) with a mean square of 1.
    """
    band = signal.butter(2, BREATH_BAND, "bandpass", fs=SAMPLING_RATE, output="sos")
    hiss = signal.sosfilt(band, draw.standard_normal(count))
    seconds = np.arange(count) / SAMPLING_RATE + draw.uniform(0, 2)
    swelling = np.maximum(np.sin(2 * np.pi * seconds / draw.uniform(1.2, 2.2)), 0.02)
    return at_level((hiss * swelling).astype(np.float32), 0)


def add_noise(samples: Samples, noise: Samples, snr: float) -> Samples:
    """Noise behind speech.

    Args:
        samples: the speech.
        noise: repeated where it is shorter.
        snr: the ratio of their powers in dB.
    """
    wanted = 10 * np.log10(max(power(samples), QUIETEST)) - snr
    return samples + at_level(np.resize(noise, samples.shape), wanted)


@lru_cache(maxsize=256)
def simulated_room(number: int, shortest: float = 0.1, longest: float = 0.8) -> Samples:
    """An impulse response of a simulated room, from its direct sound on.

    Args:
        number: which of the endless list of rooms.
        shortest: reverberation time (T60) in seconds.
        longest: the same.
    """
    # lhotse draws a time between 0.1 and `longest` first: a seed is taken that draws it in range.
    seeds = (seed for seed in itertools.count(1000 * number))
    seed = next(s for s in seeds if np.random.default_rng(s).uniform(0.1, longest) >= shortest)
    # A fast approximation of the image-source method, arXiv:2208.04101.
    simulate: Any = FastRandomRIRGenerator(
        sr=SAMPLING_RATE, max_T60=longest, room_seed=seed, source_seed=seed
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)  # it draws from torch's generator, too
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, about how it calls numpy
        return from_direct_sound(np.asarray(simulate(nsource=1)[0], np.float32))


def from_direct_sound(response: Samples) -> Samples:
    """An impulse response without what is before its largest sample, so that nothing is delayed."""
    return response[int(np.argmax(np.abs(response))) :]


def reverberate(samples: Samples, response: Samples) -> Samples:
    """The samples in a room, as loud as before."""
    heard = signal.fftconvolve(samples, response)[: len(samples)].astype(np.float32)
    return at_level(heard, 10 * np.log10(max(power(samples), QUIETEST)))


def telephone(samples: Samples) -> Samples:
    """A landline: 8 kHz, 300 to 3400 Hz, 8-bit mu-law (ITU-T G.711)."""
    narrow = signal.resample_poly(samples, TELEPHONE_RATE, SAMPLING_RATE)
    band = signal.butter(4, TELEPHONE_BAND, "bandpass", fs=TELEPHONE_RATE, output="sos")
    coded = _through(signal.sosfilt(band, narrow), TELEPHONE_RATE, format="WAV", subtype="ULAW")
    wide = signal.resample_poly(coded, SAMPLING_RATE, TELEPHONE_RATE)
    return np.resize(wide, samples.shape).astype(np.float32)


def opus(samples: Samples) -> Samples:
    """A voice message: Opus at some 15 kbit/s."""
    coded = _through(
        samples, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION
    )
    return np.resize(coded, samples.shape)


CODECS = {"telephone": telephone, "opus": opus}


def _through(samples: NDArray[Any], rate: int, **settings: Any) -> Samples:
    """What a format of libsndfile's leaves of samples."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1, 1), rate, **settings)
    file.seek(0)
    found: Samples = soundfile.read(file, dtype="float32")[0]
    return found
