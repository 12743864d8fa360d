"""Posteriors of long recordings: windows that hold everything once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from icetransfer.data.features import fbank
from icetransfer.model.checkpoint import load_transducer
from icetransfer.streaming.posteriors import CONTEXT_FRAMES, FRAME_SAMPLES, hear, windows

BASE_MODEL = Path(__file__).resolve().parents[3] / "egs" / "base_models" / "ml.pt"


@pytest.mark.parametrize("seconds", [0.01, 5.0, 23.9, 27.0, 27.04, 30.5, 51.0, 75.3])
def test_windows_hold_each_frame_once(seconds: float) -> None:
    samples = np.arange(round(16000 * seconds), dtype=np.float32)
    found = [*windows(iter(np.array_split(samples, max(1, round(seconds)))))]
    counted = []
    for number, window in enumerate(found):
        assert window.skipped == (CONTEXT_FRAMES if number else 0)
        first = window.skipped * FRAME_SAMPLES
        counted.append(window.samples[first : first + window.frames * FRAME_SAMPLES])
        assert len(window.samples) <= 30 * 16000 + 16000
    whole = np.concatenate(counted)
    assert len(whole) == sum(w.frames for w in found) * FRAME_SAMPLES
    assert 0 <= len(whole) - len(samples) < FRAME_SAMPLES
    np.testing.assert_array_equal(whole[: len(samples)], samples)


def test_a_window_is_heard_as_an_utterance(tmp_path: Path) -> None:
    model = load_transducer(BASE_MODEL)
    rng = np.random.default_rng(0)
    samples = (rng.normal(0, 0.1, 5 * 16000) * np.sin(np.arange(80000) / 3000)).astype(np.float32)
    done: list[float] = []
    heard = hear(model, iter([samples[:30000], samples[30000:]]), tmp_path, done.append)
    assert heard.log_probs.shape == (125, model.vocab_size)
    assert heard.energy.shape == (500,)
    assert done == [5.0]
    assert not [*tmp_path.iterdir()]
    padded = torch.from_numpy(fbank(np.pad(samples, (0, 8000 + FRAME_SAMPLES))))[None]
    with torch.inference_mode():
        out, _ = model.encode(padded, torch.tensor([padded.size(1)]))
        expected = model.ctc_output(out)[0, :125].numpy()
    np.testing.assert_allclose(heard.log_probs, expected, atol=0.02, rtol=1e-3)


def test_an_empty_recording(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the audio is empty"):
        hear(load_transducer(BASE_MODEL), iter([]), tmp_path, lambda seconds: None)
