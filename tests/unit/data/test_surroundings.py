import numpy as np
import pytest
import soundfile

from icetransfer.config import Train, load_section
from icetransfer.data import acoustics, features
from icetransfer.data.acoustics import generator
from icetransfer.data.features import FLOOR, compute_shard, fbank, load_features
from icetransfer.data.surroundings import Augmenter, Level
from icetransfer.settings import augment as settings
from icetransfer.settings.augment import NAMED
from tests.unit.conftest import make_cut, speak


@pytest.fixture(scope="module")
def samples():
    """Tones like speech: three words, a breath of silence, two words."""
    rng = np.random.default_rng(1)
    words = speak(["een", "vier", "twee"], rng), speak(["zes", "drie"], rng)
    return np.concatenate([words[0], np.zeros(4800, np.float32), words[1]])


@pytest.fixture(scope="module")
def cuts(samples, tmp_path_factory):
    """The same cut with stored features and with none."""
    folder = tmp_path_factory.mktemp("cuts")
    cut = make_cut(folder / "a.flac", "een vier twee zes drie", samples)
    found = {}
    for store in ("precomputed", "on_the_fly"):
        settings = features.config.Features(store=store)
        compute_shard([cut], 1, folder / store, settings)
        (found[store],) = features.read_manifest(folder / f"{store}.jsonl.gz")
    return found


def augmenter(*listed, seed=1):
    return Augmenter(
        load_section(Train, "train", [f"train.augment=[{', '.join(listed)}]"]).augment, seed
    )


@pytest.mark.parametrize(
    ("listed", "most"),  # mean difference in nats between what is done to powers and to samples
    [
        ("kind: level, db: [-40, -40]", 0.2),
        ("kind: level, db: [6, 6]", 0.05),
        ("kind: silence, seconds: [1, 1]", 0.1),
        ("kind: noise, snr: [10, 10]", 0.5),
        ("kind: room", 1.0),
        ("kind: codec", 1.5),
    ],
)
def test_stored_features_are_changed_as_waveforms_are(cuts, listed, most):
    change = augmenter(f"{{{listed}, probability: 1}}")
    differences, done = [], []
    for key in map(str, range(8)):
        stored = change.load(cuts["precomputed"], key)
        computed = change.load(cuts["on_the_fly"], key)
        assert stored.dtype == computed.dtype == np.float32 and stored.shape == computed.shape
        assert len(stored) == cuts["precomputed"].num_frames + change.pauses(key)
        differences.append(np.abs(stored - computed).mean())
        if not change.pauses(key):
            done.append(np.abs(stored - load_features(cuts["precomputed"])).mean())
    assert np.mean(differences) < most
    assert not done or np.mean(differences) < 0.8 * np.mean(done), "nearer than doing nothing"


def test_level_is_an_addition(cuts):
    plain = load_features(cuts["precomputed"])
    softer = augmenter("{kind: level, db: [-20, -20], probability: 1}").load(
        cuts["precomputed"], "0"
    )
    loud = plain > FLOOR + 5
    np.testing.assert_allclose(softer[loud] - plain[loud], -2 * np.log(10), atol=1e-5)
    louder = augmenter("{kind: level, db: [20, 20], probability: 1}").load(cuts["precomputed"], "0")
    silent = plain < FLOOR + 0.01
    assert silent.any(), "the silence between the words"
    np.testing.assert_array_equal(louder[silent], plain[silent])


def test_what_is_too_loud_is_clipped_in_stored_features():
    noise = np.concatenate(
        [
            acoustics.at_level(acoustics.coloured_noise(16000, 1.5, generator(db)), db)
            for db in (-35, -30, -20, -10)
        ]
    )
    change = Level(settings.Level(kind="level", db=(20, 20)))
    wanted, stored = fbank(change.wave(noise, generator(1))), fbank(noise)
    found = change.features(stored, generator(1))
    added = stored + np.float32(2 * np.log(10))
    assert np.abs(found - wanted).mean() < 0.3 < 0.5 * np.abs(added - wanted)[300:].mean()
    soft = stored[:95] > FLOOR + 1
    np.testing.assert_allclose(found[:95][soft], added[:95][soft], atol=0.02)


def test_a_cut_is_changed_by_seed_epoch_and_name_alone(cuts):
    change, again = (Augmenter(NAMED["strong"], seed=1) for _ in range(2))
    for cut in cuts.values():
        first = [change.load(cut, str(key)) for key in range(6)]
        np.random.seed(5)
        for key in reversed(range(6)):
            np.testing.assert_array_equal(first[key], again.load(cut, str(key)))
        assert len({found.tobytes() for found in first}) == 6
    other = Augmenter(NAMED["strong"], seed=2)
    assert not np.array_equal(other.load(cut, "0"), change.load(cut, "0"))


def test_things_are_done_as_often_as_they_should_be(cuts):
    change = augmenter("{kind: silence, probability: 0.3}")
    pauses = [change.pauses(str(key)) for key in range(1000)]
    assert 0.25 < np.count_nonzero(pauses) / 1000 < 0.35
    assert min(filter(None, pauses)) >= 10 and 200 < max(pauses) <= 400


def test_recorded_noise_is_added_at_its_level(cuts, tmp_path):
    rng = np.random.default_rng(3)
    for name, seconds in (("short", 0.3), ("long", 8)):
        noise = 0.1 * rng.standard_normal(int(16000 * seconds)).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", noise, 16000)
    change = augmenter(f"{{kind: noise, path: {tmp_path}, snr: [5, 15], probability: 1}}")
    # White noise: what the pre-emphasis does to it is the same at every level.
    white = np.exp(fbank(acoustics.coloured_noise(160000, 0, generator(1)))).mean(0)
    speech = features.read_audio(cuts["precomputed"])
    plain = np.exp(load_features(cuts["precomputed"]).astype(float))
    levels = []
    for key in range(40):
        noisy = np.exp(change.load(cuts["precomputed"], str(key)).astype(float))
        power = ((noisy - plain).mean(0)[20:] / white[20:]).mean()
        levels.append(10 * np.log10(acoustics.power(speech) / power))
    assert 4 < min(levels) < 7 and 13 < max(levels) < 16


def test_a_bad_recording_is_named_and_the_cut_goes_on(cuts, tmp_path, caplog):
    (tmp_path / "broken.wav").write_bytes(b"RIFF no audio")
    change = augmenter(
        f"{{kind: noise, path: {tmp_path}, probability: 1}}",
        "{kind: level, db: [-20, -20], probability: 1}",
    )
    with caplog.at_level("WARNING", logger="icetransfer"):
        found = change.load(cuts["precomputed"], "0")
    assert "cut a goes on without its noise" in caplog.text and "broken.wav" in caplog.text
    assert (found <= load_features(cuts["precomputed"])).all(), "what comes after is done"


def test_a_folder_without_recordings_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"noise: path={tmp_path}: no recordings there"):
        augmenter(f"{{kind: noise, path: {tmp_path}}}")
    with pytest.raises(ValueError, match=r"room: path=.*nowhere does not exist"):
        augmenter(f"{{kind: room, path: {tmp_path / 'nowhere'}}}")


def test_impulse_responses_of_another_rate_are_resampled(cuts, tmp_path, caplog):
    response = np.zeros((24000, 2), np.float32)
    response[4800, 0], response[9600, 0] = 1, 0.5  # an echo 0.1 s later; at 48 kHz, two channels
    soundfile.write(tmp_path / "room.wav", response, 48000)
    change = augmenter(f"{{kind: room, path: {tmp_path}, probability: 1}}")
    with caplog.at_level("INFO", logger="icetransfer"):
        found = change.load(cuts["on_the_fly"], "0")
        change.load(cuts["on_the_fly"], "1")
    assert caplog.text.count("room.wav has 48000 Hz") == 1
    samples = features.read_audio(cuts["on_the_fly"])
    echo = np.concatenate([np.zeros(1600, np.float32), samples[:-1600]])
    wanted = acoustics.at_level(samples + echo / 2, 10 * np.log10(acoustics.power(samples)))
    assert np.abs(found - fbank(wanted)).mean() < 0.15


def test_rooms_are_the_same_whoever_asks_and_disturb_no_generator():
    import torch

    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    first = acoustics.simulated_room(7)
    assert torch.rand(1) == wanted
    acoustics.simulated_room.cache_clear()
    np.testing.assert_array_equal(first, acoustics.simulated_room(7))
    assert np.abs(first).argmax() == 0 and len(first) < 0.9 * 16000


def test_a_telephone_passes_its_band_alone():
    white = acoustics.at_level(acoustics.coloured_noise(32000, 0, generator(1)), -20)
    heard = np.abs(np.fft.rfft(acoustics.telephone(white))) ** 2
    hertz = np.fft.rfftfreq(32000, 1 / 16000)
    inside = heard[(hertz > 500) & (hertz < 3000)].mean()
    for low, high in ((0, 100), (4200, 8000)):
        assert heard[(hertz > low) & (hertz < high)].mean() < inside / 100


def test_what_a_saved_config_of_an_earlier_version_holds():
    old = {"path": None, "snr": [10, 20], "probability": 0.5}
    assert Train.model_validate({"noise": old}).augment == ()
    (noise,) = Train.model_validate({"noise": old | {"path": "musan"}}).augment
    assert (noise.kind, str(noise.path), noise.snr) == ("noise", "musan", (10, 20))
    with pytest.raises(ValueError, match=r"one of train\.augment's list"):
        Train.model_validate({"noise": old | {"path": "musan"}, "augment": "default"})
