import sys

import numpy as np
import pytest

from icetransfer.data import acoustics
from icetransfer.data.conditions import CHANGES, make_condition
from icetransfer.data.features import FLOOR, fbank
from icetransfer.settings.robustness import CONDITIONS, Robustness
from tests.unit.conftest import speak


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(1)
    words = speak(["een", "vier", "twee"], rng), speak(["zes", "drie"], rng)
    return np.concatenate([words[0], np.zeros(4800, np.float32), words[1]])


def heard(name, samples, seed=1, cut_id="a"):
    return make_condition(name, seed)(cut_id, samples)


def test_every_condition_of_the_config_is_there():
    assert tuple(CHANGES) == CONDITIONS


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_is_a_function_of_seed_name_and_recording(name, samples):
    first = heard(name, samples)
    assert first.dtype == np.float32 and first.ndim == 1 and np.isfinite(first).all()
    assert not np.array_equal(first, samples)
    np.testing.assert_array_equal(first, heard(name, samples))
    if name.startswith(("breath", "room-noise", "noise")) or name.endswith(("room", "hum")):
        assert not np.array_equal(first, heard(name, samples, cut_id="b"))
        assert not np.array_equal(first, heard(name, samples, seed=2))


def test_levels(samples):
    for db in (20, 40):
        change = 10 * np.log10(
            acoustics.power(heard(f"softer-{db}dB", samples)) / acoustics.power(samples)
        )
        assert change == pytest.approx(-db, abs=0.1)
    loud = heard("clipped-20dB", samples)
    assert np.mean(np.abs(loud) > 0.999) > 0.3
    steps = heard("softer-50dB", samples) * 32768
    np.testing.assert_array_equal(steps, np.round(steps))


def test_pauses_are_where_they_should_be(samples):
    count, second = len(samples), 16000
    for filling, level in (("silence", None), ("breath", -40), ("room-noise", -55)):
        before, after = heard(f"{filling}-before", samples), heard(f"{filling}-after", samples)
        np.testing.assert_array_equal(before[2 * second :], samples)
        np.testing.assert_array_equal(after[:count], samples)
        inside = heard(f"{filling}-inside", samples)
        assert len(inside) == count + second
        pause = inside[len(samples) // 2 : len(samples) // 2 + 100]
        for found in (before[: 2 * second], after[count:], pause):
            if level is None:
                assert not found.any()
        if level is not None:
            assert 10 * np.log10(acoustics.power(before[: 2 * second])) == pytest.approx(level, 0.1)
    gap = heard("silence-inside", samples)
    assert (fbank(gap) < FLOOR + 0.01).all(1).sum() >= 100 + 20, "in the silence between words"


@pytest.mark.parametrize("snr", [20, 10, 0])
def test_noise_is_as_loud_as_its_name_says(samples, snr):
    noise = heard(f"noise-{snr}dB", samples) - samples
    found = 10 * np.log10(acoustics.power(samples) / acoustics.power(noise))
    assert found == pytest.approx(snr, abs=0.1)


def test_speed_and_rooms(samples):
    assert len(heard("faster-10%", samples)) == pytest.approx(len(samples) / 1.1, rel=0.01)
    assert len(heard("slower-10%", samples)) == pytest.approx(len(samples) / 0.9, rel=0.01)
    small, large = (heard(f"{size}-room", samples) for size in ("small", "large"))
    gap = slice(3 * 4800 + 1600, 4 * 4800)  # in the silence, 0.1 s after the last word
    assert acoustics.power(samples[gap]) == 0
    assert acoustics.power(large[gap]) > 2 * acoustics.power(small[gap]) > 0


def python(code):
    return f'{sys.executable} -c "{code}"'


HALVE = """import sys, io, soundfile as s
x, r = s.read(io.BytesIO(sys.stdin.buffer.read()))
f = io.BytesIO()
s.write(f, x[::2] / 2, r // 2, format='WAV')
f = bytearray(f.getvalue())
f[40:44] = LENGTH
sys.stdout.buffer.write(f)"""


@pytest.mark.parametrize("length", ["f[40:44]", "bytes(4 * [255])"])  # known, and as in a pipe
def test_a_command_is_a_condition(samples, length):
    found = make_condition("halved", 1, python(HALVE.replace("LENGTH", length)))("a", samples)
    assert abs(len(found) - len(samples)) <= 1
    assert acoustics.power(found) == pytest.approx(acoustics.power(samples) / 4, rel=0.1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no disk')", "exit code 1: no disk"),
        ("print('hello')", "writes no WAV"),
    ],
)
def test_a_command_that_fails_is_named_and_the_recording_goes_on(samples, code, said, caplog):
    condition = make_condition("mine", 1, python(code))
    with caplog.at_level("WARNING", logger="icetransfer"):
        np.testing.assert_array_equal(condition("cut-7", samples), samples)
    assert "cut cut-7 is decoded without mine" in caplog.text and said in caplog.text
    assert said in condition.unchanged["cut-7"]


def test_a_command_that_is_not_there_is_said_at_once():
    with pytest.raises(ValueError, match="no-such-program of 'no-such-program -x' is not"):
        make_condition("mine", 1, "no-such-program -x")
    with pytest.raises(ValueError, match="cannot be the name"):
        Robustness(commands={"a/b": "cat"})
