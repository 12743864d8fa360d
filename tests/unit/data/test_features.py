import dataclasses
import json
import sys

import numpy as np
import pytest
import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.cut import MonoCut

from icetransfer.data import features
from icetransfer.data.features import compute_split, fbank, read_manifest
from icetransfer.data.loader import load_features


def test_frames_are_one_for_each_10_ms():
    rng = np.random.default_rng(0)
    for samples in (80, 400, 1599, 1600, 1679, 1680, 16000, 16081):
        matrix = fbank(rng.standard_normal(samples).astype(np.float32) * 0.1)
        assert matrix.shape == ((samples + 80) // 160, 80)
        assert matrix.dtype == np.float32 and np.isfinite(matrix).all()


def test_a_tone_lights_its_bin_and_silence_is_the_floor():
    time = np.arange(16000) / 16000
    low, high = (
        fbank(np.sin(2 * np.pi * f * time).astype(np.float32))[50].argmax() for f in (300, 3000)
    )
    assert low < 20 < 50 < high
    assert np.allclose(
        fbank(np.zeros(16000, np.float32)), np.log(np.finfo(np.float32).eps), atol=1e-3
    )


def test_too_short_or_stereo_audio_is_refused():
    for samples in (np.zeros(79, np.float32), np.zeros((2, 16000), np.float32)):
        with pytest.raises(ValueError, match="one channel"):
            fbank(samples)


def test_the_extractor_refuses_another_sampling_rate():
    with pytest.raises(ValueError, match="8000 Hz"):
        features.StreamingFbank().extract(np.zeros((1, 8000), np.float32), 8000)


def test_train_has_every_speed_under_its_own_name(tone_recipe):
    experiment = tone_recipe("speeds")
    sources = read_manifest(experiment.manifests_dir / "tones_train.jsonl.gz")
    cuts = read_manifest(experiment.manifests_dir / "tones_train_fbank.jsonl.gz")
    assert len({cut.id for cut in cuts}) == len(cuts) == 3 * len(sources)
    by_source = {cut.id: cut.duration for cut in sources}
    for cut in cuts:
        speed = by_source[cut.source_id] / cut.duration
        assert min(abs(speed - known) for known in (0.9, 1.0, 1.1)) < 1e-3
        assert cut.load_features().shape == (cut.num_frames, 80)
    dev = read_manifest(experiment.manifests_dir / "tones_dev_fbank.jsonl.gz")
    assert [cut.id for cut in dev] == [f"dev-{i:02d}" for i in range(6)]


def test_stored_features_are_those_of_the_audio(tone_recipe):
    experiment = tone_recipe("stored")
    cuts = read_manifest(experiment.manifests_dir / "tones_dev_fbank.jsonl.gz")
    for cut in cuts:
        np.testing.assert_allclose(cut.load_features(), fbank(cut.load_audio()[0]), atol=0.005)
        half = cut.truncate(offset=0.1, duration=0.2)
        np.testing.assert_array_equal(half.load_features(), cut.load_features()[10:30])


def make_small(folder, tone_recipe, name):
    """An experiment with a data folder of its own, of the tones' test split."""
    source = tone_recipe(name)
    data = source.config.data.model_copy(update={"dir": folder})
    experiment = dataclasses.replace(source, config=source.config.model_copy(update={"data": data}))
    cuts = read_manifest(source.manifests_dir / "tones_test.jsonl.gz")
    return experiment, cuts


def test_corrupt_audio_is_named_and_costs_no_other(tone_recipe, tmp_path, caplog):
    experiment, cuts = make_small(tmp_path, tone_recipe, "corrupt")
    (tmp_path / "broken.flac").write_bytes(b"fLaC this is not audio")
    soundfile.write(tmp_path / "nan.wav", np.full(cuts[0].num_samples, np.nan), 16000, "FLOAT")
    bad = []
    for number, path in enumerate(("broken.flac", "absent.flac", "nan.wav")):
        source = json.loads(json.dumps(cuts[0].recording.to_dict()))
        source["sources"][0]["source"] = str(tmp_path / path)
        recording = Recording.from_dict({**source, "id": f"bad-{number}"})
        segment = SupervisionSegment(f"bad-{number}", f"bad-{number}", 0, 0.5, text="een")
        bad.append(MonoCut(f"bad-{number}", 0, cuts[0].duration, 0, [segment], recording=recording))
    mixed = [bad[0], *cuts[:2], *bad[1:], *cuts[2:]]
    features.write_manifest(mixed, experiment.manifests_dir / "tones_test.jsonl.gz")
    with caplog.at_level("WARNING", logger="icetransfer"):
        compute_split(experiment, "tones", "test")
    kept = read_manifest(experiment.manifests_dir / "tones_test_fbank.jsonl.gz")
    assert [cut.id for cut in kept] == [cut.id for cut in cuts]
    for number, path in enumerate(("broken.flac", "absent.flac", "nan.wav")):
        assert f"cut bad-{number}: {tmp_path / path}" in caplog.text
    assert "nan.wav has samples that are not finite" in caplog.text

    features.write_manifest(bad, experiment.manifests_dir / "tones_dev.jsonl.gz")
    with pytest.raises(ValueError, match="none of its 3 recordings"):
        compute_split(experiment, "tones", "dev")


def test_a_killed_run_keeps_its_finished_shards(tone_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_SECONDS", 1)
    experiment, cuts = make_small(tmp_path, tone_recipe, "killed")
    features.write_manifest(cuts, experiment.manifests_dir / "tones_test.jsonl.gz")
    compute_split(experiment, "tones", "test")
    target = experiment.manifests_dir / "tones_test_fbank.jsonl.gz"
    first = [cut.load_features() for cut in read_manifest(target)]
    shards = sorted((tmp_path / "fbank" / "tones_test").glob("*.npy"))
    assert len(shards) > 1
    written = [shard.stat().st_mtime_ns for shard in shards]

    target.unlink()
    (shards[0].parent / (shards[0].stem + ".jsonl.gz")).unlink()  # killed before this was written
    compute_split(experiment, "tones", "test")
    again = [shard.stat().st_mtime_ns for shard in shards]
    assert again[0] != written[0] and again[1:] == written[1:]
    cuts_again = read_manifest(target)
    for before, cut in zip(first, cuts_again, strict=True):
        np.testing.assert_array_equal(before, cut.load_features())


def test_an_empty_split_is_an_empty_manifest(tone_recipe, tmp_path):
    experiment, _ = make_small(tmp_path, tone_recipe, "empty")
    features.write_manifest([], experiment.manifests_dir / "tones_dev.jsonl.gz")
    compute_split(experiment, "tones", "dev")
    assert read_manifest(experiment.manifests_dir / "tones_dev_fbank.jsonl.gz") == []


def test_a_missing_manifest_says_what_to_run(tone_recipe, tmp_path):
    experiment, _ = make_small(tmp_path, tone_recipe, "missing")
    with pytest.raises(ValueError, match="tones_dev"):
        compute_split(experiment, "tones", "dev")


KALDIFEAT = """
import kaldi_native_fbank, torch
from icetransfer.data.features import fbank, fbank_options

class FbankOptions:
    def __init__(self):
        self.known = kaldi_native_fbank.FbankOptions()
        self.frame_opts, self.mel_opts = self.known.frame_opts, self.known.mel_opts

class Fbank:
    def __init__(self, options):
        assert str(options.known) == str(fbank_options())
        assert options.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = options.device

    def __call__(self, waves):
        assert type(waves) is list and waves
        for wave in waves:
            assert wave.ndim == 1 and wave.dtype == torch.float32 and abs(wave).max() <= 1
            assert wave.device.type == self.device.type
        return [torch.from_numpy(fbank(wave.cpu().numpy())).to(self.device) for wave in waves]
"""


def of_another_store(experiment, folder, **features):
    """The experiment with a data folder of its own, which has the tones' training manifest."""
    settings = experiment.config.data.features.model_copy(update=features)
    data = experiment.config.data.model_copy(update={"dir": folder, "features": settings})
    other = dataclasses.replace(
        experiment, config=experiment.config.model_copy(update={"data": data})
    )
    other.manifests_dir.mkdir(parents=True)
    manifest = experiment.manifests_dir / "tones_train.jsonl.gz"
    (other.manifests_dir / manifest.name).write_bytes(manifest.read_bytes())
    compute_split(other, "tones", "train")
    return read_manifest(other.manifests_dir / "tones_train_fbank.jsonl.gz")


def test_kaldifeat_gets_what_it_expects_and_gives_the_same(tone_recipe, tmp_path, monkeypatch):
    # A stand-in, which the processes of stage 2 import too.
    (tmp_path / "kaldifeat.py").write_text(KALDIFEAT)
    monkeypatch.syspath_prepend(tmp_path)
    experiment = tone_recipe("kaldifeat")
    ours = of_another_store(experiment, tmp_path / "ours")
    theirs = of_another_store(experiment, tmp_path / "theirs", extractor="kaldifeat")
    for cut, other in zip(ours, theirs, strict=True):
        assert cut.id == other.id
        np.testing.assert_array_equal(cut.load_features(), other.load_features())
    assert features.make_extractor("kaldifeat")([]) == []


def test_kaldifeat_that_is_not_there_says_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldifeat", None)
    with pytest.raises(ValueError, match=r"kaldifeat.*https://csukuangfj\.github\.io/kaldifeat"):
        features.make_extractor("kaldifeat")


def test_on_the_fly_stores_no_features_and_computes_the_same(tone_recipe, tmp_path):
    experiment = tone_recipe("on-the-fly")
    stored = of_another_store(experiment, tmp_path / "stored")
    computed = of_another_store(experiment, tmp_path / "computed", store="on_the_fly")
    assert not list((tmp_path / "computed").rglob("*.npy"))
    for cut, other in zip(computed, stored, strict=True):
        assert features.is_on_the_fly(cut) and not features.is_on_the_fly(other)
        assert (cut.id, cut.source_id) == (other.id, other.source_id)
        assert cut.num_frames == other.num_frames
        matrix = load_features(cut)
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(matrix.astype(np.float16), other.load_features())


def test_audio_that_vanished_is_named_when_its_features_are_wanted(tone_recipe, tmp_path):
    cut = of_another_store(tone_recipe("gone"), tmp_path / "data", store="on_the_fly")[0]
    cut.recording.sources[0].source = "elsewhere/gone.flac"
    with pytest.raises(ValueError, match=rf"cut {cut.id}: elsewhere/gone\.flac cannot be read"):
        load_features(cut)
