"""Word times from a forced alignment, against words put together at known times."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from icetransfer.data.features import fbank
from icetransfer.model.checkpoint import load_transducer
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming.alignment import SpokenWord, align, spoken_words, word_end
from icetransfer.streaming.search import Hypothesis

BASE_MODEL = Path(__file__).resolve().parents[3] / "egs" / "base_models" / "en.pt"
WORDS = ("seventeen", "kilometres", "yesterday", "hotel", "remember", "amsterdam", "window")
SAY = """
import sys, numpy, soxr
from icetransfer.data.synthetic.espeak import Espeak
voice = Espeak("en", "f5")
words = {}
for word in sys.argv[2:]:
    said = voice.say(word, rate=150, pitch=50, pitch_range=50, seed=1).astype("float32") / 32768
    said = soxr.resample(said, voice.sample_rate, 16000)
    loud = numpy.flatnonzero(abs(said) > 0.02 * abs(said).max())
    words[word] = said[loud[0] : loud[-1]]
numpy.savez(sys.argv[1], **words)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Words, each from its first to its last sound; espeak-ng wants a process of its own."""
    path = tmp_path_factory.mktemp("words") / "words.npz"
    subprocess.run([sys.executable, "-c", SAY, str(path), *WORDS], check=True)
    with np.load(path) as words:
        return [0.5 * words[word] for word in WORDS]


def best_path(model, samples: np.ndarray) -> list[int]:
    """What the CTC head makes of a recording: the vocabulary that it was trained with is gone."""
    features = torch.from_numpy(fbank(samples)).unsqueeze(0)
    with torch.inference_mode():
        out, _ = model.encode(features, torch.tensor([features.size(1)]))
        path = model.ctc_output(out).argmax(dim=2)[0]
    return [token for token in torch.unique_consecutive(path).tolist() if token]


@pytest.mark.parametrize(("pause", "end_ms"), [(0.3, 40), (0.15, 40), (0.0, 120)])
def test_known_times(said, pause, end_ms) -> None:
    model = load_transducer(BASE_MODEL)
    rng = np.random.default_rng(0)
    edge = np.zeros(3200, dtype=np.float32)
    tokens = [best_path(model, np.concatenate([edge, word, edge])) for word in said]
    assert all(tokens)
    gap = np.zeros(int(pause * 16000), dtype=np.float32)
    parts, known, position = [edge], [], len(edge)
    for word in said:
        known.append((position / 16000, (position + len(word)) / 16000))
        parts += [word, gap]
        position += len(word) + len(gap)
    audio = np.concatenate([*parts, edge])
    audio += (0.0005 * rng.standard_normal(len(audio))).astype(np.float32)
    found = align(model, audio, tokens)
    wrong = 1000 * (np.array(found) - np.array(known))
    starts, ends = np.abs(wrong).T
    assert np.median(starts) < 60
    assert np.median(ends) < end_ms / 2 and np.percentile(ends, 75) < end_ms
    assert all(start < end for start, end in found)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(found))


def test_a_word_ends_at_its_first_pause() -> None:
    energy = np.full(100, -20.0, dtype=np.float32)
    energy[10:40] = 0  # the word
    energy[20:28] = -20  # the closure of a plosive
    energy[60:90] = 0  # the next one, whose first token comes late
    assert word_end(energy, 12, 70) == 40
    assert word_end(energy, 62, 80) == 80
    assert word_end(energy, 42, 55) == 46  # nothing loud: the token's own frames


def test_tokens_make_words() -> None:
    names = ["<blk>", "▁", "▁een", "t", "wee"]
    hypothesis = Hypothesis([3, 2, 1, 3, 4, 2, 1], [0, 2, 5, 6, 9, 12, 13])
    assert spoken_words(hypothesis, names) == [
        SpokenWord("t", 0, 0),
        SpokenWord("een", 2, 2),
        SpokenWord("twee", 5, 9),
        SpokenWord("een", 12, 12),
    ]


def test_byte_tokens_and_white_space_make_words() -> None:
    names = ["<blk>", "▁", "<0xE8>", "<0xAF>", "<0xB4>", "<0x20>", "<0x41>", "說", "\u3000", "a▁b"]
    whole = Hypothesis([2, 3, 4, 7, 5, 6, 8, 7, 9], [0, 1, 3, 4, 6, 7, 9, 10, 12])
    assert spoken_words(whole, names) == [
        SpokenWord("说說", 0, 4),
        SpokenWord("A", 6, 7),
        SpokenWord("說a", 9, 12),
        SpokenWord("b", 12, 12),
    ]
    torn = Hypothesis([1, 2, 3, 7, 4], [0, 1, 2, 3, 4])  # each byte that is of no character
    assert spoken_words(torn, names) == [SpokenWord("\ufffd\ufffd說\ufffd", 0, 4)]


def test_what_cannot_be_aligned(nano_dims) -> None:
    model = build_transducer(nano_dims).eval()
    samples = np.zeros(1600, dtype=np.float32)
    assert align(model, samples, []) == []
    with pytest.raises(ValueError, match=r"0.10 s of audio are too short for 3 tokens"):
        align(model, samples, [[5, 6, 7]])
    model.ctc_output = None
    with pytest.raises(ValueError, match=r"no CTC head.*transfer.ctc=true"):
        align(model, samples, [[5]])
