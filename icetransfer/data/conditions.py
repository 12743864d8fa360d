"""Recordings as if made elsewhere: softer, in noise, over a telephone, by a command of the user's.

What a condition makes of a recording is a function of the seed, the recording's name and the
condition's alone.
"""

import io
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import soundfile
from scipy import signal

from icetransfer.data import acoustics
from icetransfer.data.acoustics import Samples, generator
from icetransfer.data.utterances import SAMPLING_RATE
from icetransfer.experiment import log

Draw = np.random.Generator
Change = Callable[[Samples, Draw], Samples]

VERSION = 1  # goes up when a condition changes: what was decoded is then decoded again
PAUSE_SECONDS = 2.0
INSIDE_SECONDS = 1.0
BREATH_DB = -40.0  # against full scale
ROOM_NOISE_DB = -55.0
HUM_HZ = 50
HUM_SNR = 10.0
OFFSET = 0.1
SMALL_ROOM, LARGE_ROOM = (0.1, 0.35), (0.5, 0.8)  # seconds of reverberation (T60)
ROOMS = 50  # of each size
COMMAND_SECONDS = 60  # that a command may take for one recording


def _digital(count: int, draw: Draw) -> Samples:
    return np.zeros(count, np.float32)


def _breath(count: int, draw: Draw) -> Samples:
    return acoustics.at_level(acoustics.breath(count, draw), BREATH_DB)


def _room_noise(count: int, draw: Draw) -> Samples:
    return acoustics.at_level(acoustics.coloured_noise(count, 1.5, draw), ROOM_NOISE_DB)


def _before(filling: Callable[[int, Draw], Samples], samples: Samples, draw: Draw) -> Samples:
    return np.concatenate([filling(round(PAUSE_SECONDS * SAMPLING_RATE), draw), samples])


def _after(filling: Callable[[int, Draw], Samples], samples: Samples, draw: Draw) -> Samples:
    return np.concatenate([samples, filling(round(PAUSE_SECONDS * SAMPLING_RATE), draw)])


def _inside(filling: Callable[[int, Draw], Samples], samples: Samples, draw: Draw) -> Samples:
    """A pause where the middle third of the recording is quietest for 80 ms."""
    window = round(0.08 * SAMPLING_RATE)
    loudness = np.convolve(np.square(samples, dtype=np.float64), np.ones(window), "same")
    third = len(samples) // 3
    where = third + int(np.argmin(loudness[third : len(samples) - third]))
    pause = filling(round(INSIDE_SECONDS * SAMPLING_RATE), draw)
    return np.concatenate([samples[:where], pause, samples[where:]])


def _noise(snr: float, samples: Samples, draw: Draw) -> Samples:
    return acoustics.add_noise(samples, acoustics.coloured_noise(len(samples), 1, draw), snr)


def _room(seconds: tuple[float, float], samples: Samples, draw: Draw) -> Samples:
    room = acoustics.simulated_room(int(draw.integers(ROOMS)), *seconds)
    return acoustics.reverberate(samples, room)


def _speed(factor: float, samples: Samples, draw: Draw) -> Samples:
    """Faster and higher, as a tape that runs too fast."""
    up, down = round(100 / factor), 100
    return np.asarray(signal.resample_poly(samples, up, down), np.float32)


def _hum(samples: Samples, draw: Draw) -> Samples:
    """The mains and its harmonics."""
    phase = 2 * np.pi * HUM_HZ * np.arange(len(samples)) / SAMPLING_RATE + draw.uniform(0, 6)
    hum = sum(np.sin(n * phase) / n for n in (1, 2, 3, 5, 7))
    return acoustics.add_noise(samples, np.asarray(hum, np.float32), HUM_SNR)


def _without_draw(change: Callable[[Samples], Samples]) -> Change:
    return lambda samples, draw: change(samples)


_FILLINGS = {"silence": _digital, "breath": _breath, "room-noise": _room_noise}
CHANGES: dict[str, Change] = {
    **{f"softer-{db}dB": _without_draw(partial(acoustics.amplify, db=-db)) for db in (20, 40, 50)},
    "clipped-20dB": _without_draw(partial(acoustics.amplify, db=20)),
    **{
        f"{name}-{where}": partial(pause, filling)
        for name, filling in _FILLINGS.items()
        for where, pause in (("before", _before), ("inside", _inside), ("after", _after))
    },
    **{name: _without_draw(codec) for name, codec in acoustics.CODECS.items()},
    **{f"noise-{snr}dB": partial(_noise, snr) for snr in (20, 10, 0)},
    "small-room": partial(_room, SMALL_ROOM),
    "large-room": partial(_room, LARGE_ROOM),
    "slower-10%": partial(_speed, 0.9),
    "faster-10%": partial(_speed, 1.1),
    "hum": _hum,
    "dc": lambda samples, draw: np.clip(samples + np.float32(OFFSET), -1, 1),
}


def command_change(command: str) -> Change:
    """A change by a command that reads a mono 16 kHz WAV from its input and writes one.

    What it writes may have any rate, and is resampled.

    Raises:
        ValueError: there is no such program, here; when called, it fails or writes no audio.
    """
    words = shlex.split(command)
    if shutil.which(words[0]) is None:
        raise ValueError(f"robustness.commands: {words[0]} of {command!r} is not a program here")

    def change(samples: Samples, draw: Draw) -> Samples:
        wav = io.BytesIO()
        soundfile.write(wav, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
        try:
            done = subprocess.run(
                words, input=wav.getvalue(), capture_output=True, timeout=COMMAND_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"{words[0]}: {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError(f"{words[0]}: exit code {done.returncode}: {' '.join(said[-1:])}")
        try:
            written, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise ValueError(f"{words[0]} writes no WAV ({error})") from error
        if not len(written) or written.shape[1] != 1 or not np.isfinite(written).all():
            raise ValueError(
                f"{words[0]} writes {written.shape[0]} samples of {written.shape[1]} channels: "
                f"expected one channel of numbers"
            )
        changed = signal.resample_poly(written[:, 0], SAMPLING_RATE, rate)
        return np.asarray(changed, np.float32)

    return change


@dataclass
class Condition:
    """A way in which a test set is changed.

    Attributes:
        name: of it.
        seed: of what is drawn.
        change: what is done.
        made_of: what decides the result besides the recordings.
        unchanged: why a recording went on as it was, by the cut's id.
    """

    name: str
    seed: int
    change: Change
    made_of: dict[str, str | int]
    unchanged: dict[str, str] = field(default_factory=dict)

    def __call__(self, cut_id: str, samples: Samples) -> Samples:
        """The recording under the condition; as it is, with a warning, where that fails."""
        try:
            return self.change(samples, generator(self.name, self.seed, cut_id))
        except ValueError as error:
            self.unchanged[cut_id] = str(error)
            log.warning("cut %s is decoded without %s: %s", cut_id, self.name, error)
            return samples


def make_condition(name: str, seed: int, command: str | None = None) -> Condition:
    """A condition of ours, or by a command of the user's.

    Raises:
        ValueError: the command's program does not exist.
    """
    change = CHANGES[name] if command is None else command_change(command)
    made_of: dict[str, str | int] = {
        "condition": name,
        "condition_version": VERSION,
        "condition_seed": seed,
        "condition_command": command or "",
    }
    return Condition(name, seed, change, made_of)
