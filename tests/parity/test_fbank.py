"""Features against kaldi-native-fbank as sherpa-onnx runs it, and against lhotse's own."""

import json

import numpy as np
import pytest

from icetransfer.data.features import fbank, fbank_options


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "fbank.npz")


@pytest.fixture(scope="module")
def wave(golden):
    return golden["wave_int16"].astype(np.float32) / 32768


@pytest.mark.parametrize("array", ["knf_sherpa", "knf_sherpa_online"])
def test_as_sherpa_onnx_computes_them(golden, wave, array):
    np.testing.assert_allclose(fbank(wave), golden[array], rtol=0, atol=1e-5)


@pytest.mark.parametrize("array", ["lhotse_default", "lhotse_num_mel_bins80"])
def test_close_to_lhotse_which_icefall_trains_with(golden, wave, array):
    difference = np.abs(fbank(wave) - golden[array])
    assert difference.max() < 0.0036  # as measured when the numbers were made
    assert difference.mean() < 2e-5


def test_sample_scale_moves_features_as_measured(golden):
    unscaled = fbank(golden["wave_int16"].astype(np.float32))
    np.testing.assert_allclose(unscaled, golden["knf_int16scale"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("array", ["knf_default_highfreq0", "knf_snip_edges_true"])
def test_other_settings_are_far_off(golden, wave, array):
    other, ours = golden[array], fbank(wave)
    assert other.shape != ours.shape or np.abs(other - ours).max() > 1


def test_options_are_the_recorded_ones(golden_dir):
    recorded = json.loads((golden_dir / "fbank.json").read_text())["knf_options"].split()
    assert str(fbank_options()).split() == recorded
