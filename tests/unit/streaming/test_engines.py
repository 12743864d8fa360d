"""A real model says the same tokens in torch, onnxruntime and sherpa-onnx, whatever the audio."""

import dataclasses
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import sherpa_onnx
import soundfile
import torch
from lhotse import MonoCut, Recording
from scipy.signal import resample_poly

from icetransfer import decode
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import TransducerDims, TransducerModel, build_transducer
from icetransfer.streaming.alignment import spoken_words
from icetransfer.streaming.exported import Exported, write_tokens
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import SHERPA, Hypothesis, make_search
from icetransfer.streaming.sherpa import SherpaRecognizer

BASE_MODELS = Path(__file__).resolve().parents[3] / "egs" / "base_models"
TIERS = (8, 16, 32, -1)
LEFT = 128
RATE = 16000
STREAMS = 5  # fewer than recordings, so that streams begin beside others that go on

Waveforms = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The English seed, with made-up names for its tokens."""
    tokens = tmp_path_factory.mktemp("lang") / "tokens.txt"
    names = ["<blk>", "<sos/eos>", "<unk>", *(f"t{i}" for i in range(3, 80))]
    tokens.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    return Source.load(BASE_MODELS / "en.pt", tokens)


@pytest.fixture(scope="module")
def bundles(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Exported]:
    folder = tmp_path_factory.mktemp("onnx")
    found = {size: Exported(folder / str(size)) for size in TIERS}
    for size, bundle in found.items():
        export_tier(source, bundle, size, LEFT, [])
    return found


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Half a minute of synthetic English in voices that the seed was not trained on."""
    folder = tmp_path_factory.mktemp("spoken")
    code = (  # espeak-ng wants a process of its own
        "from pathlib import Path; from icetransfer.data.synthetic.speech import synthesise; "
        f"synthesise('en', 'slots', {{'test': 0.5}}, Path({str(folder)!r}), seed=5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    recordings = read_jsonl_gz(folder / "test_recordings.jsonl.gz")
    return [
        soundfile.read(recording["sources"][0]["source"], dtype="float32")[0]
        for recording in recordings
    ]


def through_files(samples: np.ndarray, rate: int, folder: Path) -> np.ndarray:
    """Audio of another sampling rate, as stage 9 reads it from a manifest of stage 1."""
    path = folder / f"{rate}.wav"
    soundfile.write(path, resample_poly(samples, rate, RATE), rate, subtype="FLOAT")
    recording = Recording.from_file(path).resample(RATE)
    (read,) = decode.Reader([MonoCut("cut", 0, recording.duration, 0, recording=recording)])
    return read[1]


@pytest.fixture(scope="module")
def hard_cases(spoken: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Waveforms:
    """What is not an ordinary utterance; every tier's chunk and window and their neighbours."""
    folder = tmp_path_factory.mktemp("rates")
    everything = np.concatenate(spoken)
    cases = {
        "shorter than a frame": everything[8000:8100],
        "60 s": np.resize(everything, 60 * RATE),
        "silence": np.zeros(2 * RATE, dtype=np.float32),
        "clipped": np.clip(spoken[0] * 30, -1, 1),
        "8 kHz": through_files(spoken[1], 8000, folder),
        "48 kHz": through_files(spoken[2], 48000, folder),
    }
    for size in TIERS[:-1]:
        for name, frames in (("chunk", 2 * size), ("window", 2 * size + 13)):
            for more in (-1, 0, 1):
                cases[f"{name} {size} {more:+d}"] = everything[8000 : 8000 + frames * 160 + more]
    return cases


def recognise(
    source: Source, bundle: Exported, size: int, search: str, waveforms: Waveforms
) -> dict[str, dict[str, Hypothesis]]:
    """Hypotheses of each engine; in order of length, as stage 9 does."""
    keyed = sorted(waveforms.items(), key=lambda item: len(item[1]))
    streams = STREAMS if size != -1 else 2  # padded to a minute, and attention is of all to all
    found = {}
    for engine, model in (("torch", source.model), ("onnxruntime", OnnxTransducer(bundle.dir))):
        searcher = make_search(search, model, 4, SHERPA)
        if size == -1:
            hypotheses = decode.decode_offline(model, searcher, iter(keyed), streams)
        else:
            hypotheses = decode.decode_streams(model, searcher, iter(keyed), size, LEFT, streams)
        found[engine] = dict(hypotheses)
    sherpa = SherpaRecognizer(
        bundle.dir, size, search=search, tail_seconds=decode.tail_seconds(size)
    )
    found["sherpa"] = {}
    pending = iter(keyed)
    while group := list(islice(pending, streams)):
        hypotheses = sherpa([samples for _, samples in group])
        found["sherpa"] |= zip((key for key, _ in group), hypotheses, strict=True)
    return found


def assert_equal(found: dict[str, dict[str, Hypothesis]], waveforms: Waveforms) -> None:
    for key in waveforms:
        said = {engine: hypotheses[key] for engine, hypotheses in found.items()}
        assert said["torch"] == said["onnxruntime"] == said["sherpa"], key


@pytest.mark.parametrize(
    ("size", "search"), [*((size, "greedy_search") for size in TIERS), (16, "modified_beam_search")]
)
def test_hard_cases(source, bundles, hard_cases, size, search) -> None:
    found = recognise(source, bundles[size], size, search, hard_cases)
    assert_equal(found, hard_cases)
    said = found["torch"]
    assert len(said["60 s"].tokens) > 200 and len(said["clipped"].tokens) > 5
    assert len(said["silence"].tokens) <= 1
    for key in ("8 kHz", "48 kHz"):
        assert len(said[key].tokens) > 5


@pytest.mark.parametrize("size", TIERS)
def test_real_speech(source, bundles, speech_dir, size) -> None:
    """Of several languages: the tokens are nonsense, and the same nonsense everywhere."""
    files = [path for folder in sorted(speech_dir.iterdir()) for path in folder.glob("audio/*")]
    chosen = sorted(files)[:: len(files) // 12]
    waveforms = {path.name: soundfile.read(path, dtype="float32")[0] for path in chosen}
    found = recognise(source, bundles[size], size, "greedy_search", waveforms)
    assert_equal(found, waveforms)
    assert sum(len(hypothesis.tokens) for hypothesis in found["torch"].values()) > 300


@pytest.mark.parametrize("size", TIERS[:-1])
def test_nothing_is_lost_at_the_end(source, bundles, spoken, size) -> None:
    """Recordings that stop with the last sound: two more seconds bring nothing more."""
    waveforms = {}
    for number, samples in enumerate(spoken):
        loud = np.flatnonzero(np.abs(samples) > 0.1 * np.abs(samples).max())
        waveforms[f"{number}"] = samples[: loud[-1]]
        silence = np.zeros(2 * RATE, dtype=np.float32)
        waveforms[f"{number} and silence"] = np.concatenate([samples[: loud[-1]], silence])
    found = recognise(source, bundles[size], size, "greedy_search", waveforms)
    assert_equal(found, waveforms)
    for number in range(len(spoken)):
        assert found["torch"][f"{number}"] == found["torch"][f"{number} and silence"]
        assert found["torch"][f"{number}"].timestamps[-1] * 640 > len(waveforms[f"{number}"]) - 8000


def one_after_another(dims: TransducerDims, vocab_size: int, order: list[int]) -> TransducerModel:
    """A model that says these tokens, a frame each, and then nothing, whatever it hears."""
    width = vocab_size + -vocab_size % 4  # the decoder's convolution has groups of four
    sizes = {"vocab_size": vocab_size, "decoder_dim": width, "joiner_dim": width}
    model = build_transducer(dataclasses.replace(dims, **sizes), seed=1).eval()
    with torch.no_grad():
        for parameter in (*model.decoder.parameters(), *model.joiner.parameters()):
            parameter.zero_()
        model.decoder.embedding.weight.fill_diagonal_(1.0)
        for channel in range(width):
            model.decoder.conv.weight[channel, channel % 4, -1] = 1.0  # the last token alone
        model.joiner.decoder_proj.weight.fill_diagonal_(3.0)
        for last, following in pairwise([0, *order, 0]):
            model.joiner.output_linear.weight[following, last] = 20.0
    return model


SPOKEN_BYTES = ["<0xE8>", "<0xAF>", "<0xB4>"]  # 说
SPECIAL = ["<blk>", "<sos/eos>", "<unk>"]
CHARACTERS = [*SPECIAL, " ", "\u00a0", "\u3000", "\u0085", "\u2028", *"說说▁ab", "é"]
FALLBACK = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256)), "▁", " ", "▁een", "A", "è"]
ELSEWHERE = [*SPECIAL, "▁een", *SPOKEN_BYTES, "<0xFF>", "<0x41>", "t", "A"]


@pytest.mark.parametrize("size", [8, -1])
@pytest.mark.parametrize(
    ("names", "said", "text", "of_sherpa"),
    [
        (
            CHARACTERS,
            ["a", " ", "說", "\u00a0", "说", "\u3000", "b", "\u0085", "é", "\u2028", "▁"],
            "a 說 说 b é",
            "a 說\u00a0说\u3000b\u0085é\u2028 ",
        ),
        (
            FALLBACK,
            ["▁een", "<0x20>", *SPOKEN_BYTES, "▁", "<0x41>", "A", " ", "è", "<0xFF>"],
            "een 说 AA è\ufffd",
            "een 说 AA è\ufffd",
        ),
        (  # bytes that do not begin after the three special tokens: sherpa-onnx prints their names
            ELSEWHERE,
            ["▁een", *SPOKEN_BYTES, "t", "<0xFF>", "<0x41>", "A"],
            "een说t\ufffdAA",
            "een<0xE8><0xAF><0xB4>t<0xFF><0x41>A",
        ),
    ],
    ids=["characters", "byte fallback", "bytes elsewhere"],
)
def test_unusual_tokens(nano_dims, tmp_path, names, said, text, of_sherpa, size) -> None:
    order = [names.index(name) for name in said]
    given, bundle = tmp_path / "given.txt", Exported(tmp_path / "bundle")
    write_tokens(names, given)
    model = one_after_another(nano_dims, len(names), order)
    source = Source(tmp_path / "nano.pt", model, given, "0" * 64)
    export_tier(source, bundle, size, LEFT, [])
    assert bundle.tokens.read_bytes() == given.read_bytes()

    waveforms = {"silence": np.zeros(RATE, dtype=np.float32)}
    found = recognise(source, bundle, size, "greedy_search", waveforms)
    assert_equal(found, waveforms)
    hypothesis = found["sherpa"]["silence"]
    assert hypothesis.tokens == order
    assert " ".join(word.text for word in spoken_words(hypothesis, names)) == text
    assert own_text(bundle, size, waveforms["silence"]) == of_sherpa


def own_text(bundle: Exported, size: int, samples: np.ndarray) -> str:
    """What sherpa-onnx prints where it is given the bundle itself, as users have it."""
    kind = sherpa_onnx.OfflineRecognizer if size == -1 else sherpa_onnx.OnlineRecognizer
    files = {part: str(path) for part, path in bundle.models("fp32").items()}
    recognizer = kind.from_transducer(tokens=str(bundle.tokens), **files, num_threads=1)
    stream = recognizer.create_stream()
    stream.accept_waveform(RATE, samples)
    if size == -1:
        recognizer.decode_stream(stream)
        return stream.result.text
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
    return recognizer.get_result_all(stream).text
