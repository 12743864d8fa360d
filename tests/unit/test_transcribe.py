"""tools/transcribe.py: sound files of all kinds, tiers, partial results, and its errors."""

import io
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import MonoCut, Recording

from icetransfer import decode
from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming.exported import Exported
from tests.scripts import load_script

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "transcribe.py"
TIERS = {8: "chunk-8-left-16", 16: "chunk-16-left-16", -1: "offline"}


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nano_dims):
    """Bundles of a model that says "een" in every frame."""
    root = tmp_path_factory.mktemp("bundles")
    tokens = root / "given.txt"
    names = ["<blk>", "<sos/eos>", "<unk>", "▁", "▁een", *(f"t{i}" for i in range(5, 20))]
    tokens.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    model = build_transducer(nano_dims, seed=1).eval()
    model.joiner.output_linear.bias.data[4] = 9.0
    source = Source(root / "nano.pt", model, tokens, "0" * 64)
    for size, name in TIERS.items():
        export_tier(source, Exported(root / name), size, 16, ["int8"])
    return root


@pytest.fixture(scope="module")
def wave():
    rng = np.random.default_rng(3)
    return (0.1 * rng.standard_normal(3 * 8000)).astype(np.float32)


def run(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, words)], input=stdin, capture_output=True
    )


def test_other_rates_are_resampled_as_stage_9_does(tool, wave, tmp_path) -> None:
    for rate in (8000, 44100, 48000):
        path = tmp_path / f"{rate}.wav"
        soundfile.write(path, wave, rate)
        recording = Recording.from_file(path).resample(16000)
        cut = MonoCut("cut", 0, recording.duration, 0, recording=recording)
        ((_, expected),) = decode.Reader([cut])
        np.testing.assert_array_equal(tool.read_audio(str(path)), expected)


def test_formats_and_channels(tool, wave, tmp_path, monkeypatch) -> None:
    both = np.stack([wave, 0.5 * wave], axis=1)
    for suffix in ("wav", "flac", "mp3"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, both, 16000)
        read = tool.read_audio(str(path))
        assert read.dtype == np.float32 and abs(len(read) - len(wave)) < 1200
        if suffix != "mp3":
            np.testing.assert_allclose(read, 0.75 * wave, atol=1e-4)
    given = types.SimpleNamespace(buffer=io.BytesIO((tmp_path / "a.flac").read_bytes()))
    monkeypatch.setattr(sys, "stdin", given)
    np.testing.assert_allclose(tool.read_audio("-"), 0.75 * wave, atol=1e-4)


def test_what_cannot_be_read(tool, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none.wav does not exist"):
        tool.read_audio(str(tmp_path / "none.wav"))
    (tmp_path / "text.wav").write_text("this is not audio")
    with pytest.raises(ValueError, match=r"text.wav cannot be read as audio: .*not recognised"):
        tool.read_audio(str(tmp_path / "text.wav"))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match=r"empty.wav: the audio is empty"):
        tool.read_audio(str(tmp_path / "empty.wav"))


def test_the_tier_is_found(tool, folder, tmp_path) -> None:
    assert tool.find_tier(folder, "160", "fp32") == (Exported(folder / TIERS[8]), 8)
    assert tool.find_tier(folder, "offline", "int8") == (Exported(folder / TIERS[-1]), -1)
    assert tool.find_tier(folder / TIERS[16], None, "fp32") == (Exported(folder / TIERS[16]), 16)
    with pytest.raises(ValueError, match="latencies 160, 320, offline; choose one"):
        tool.find_tier(folder, None, "fp32")
    with pytest.raises(ValueError, match="not --latency 560"):
        tool.find_tier(folder, "560", "fp32")
    with pytest.raises(ValueError, match="has no int4 models"):
        tool.find_tier(folder, "160", "int4")
    with pytest.raises(ValueError, match=r"not a bundle and holds none"):
        tool.find_tier(tmp_path, None, "fp32")
    with pytest.raises(ValueError, match="is not a folder"):
        tool.find_tier(tmp_path / "none", None, "fp32")


def test_partial_results_then_words_and_bad_files_last(folder, wave, tmp_path) -> None:
    good, bad = tmp_path / "good.flac", tmp_path / "bad.wav"
    soundfile.write(good, wave[:8000], 16000)
    bad.write_bytes(b"RIFF")
    done = run("--bundle", folder, "--latency", 160, "--precision", "int8", bad, good)
    assert done.returncode == 2
    assert f"{bad} cannot be read as audio" in done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    heard = [line.split(" s  ") for line in lines if " s  " in line]
    # windows of 29 frames every 16, four outputs each, and one frame more: 0.3075 s, then 0.4675
    assert [float(time) for time, _ in heard] == [0.4, 0.5]
    assert [text.split() for _, text in heard] == [["een"] * 4, ["een"] * 8]
    final = next(line for line in lines if "final:" in line)
    assert final.split()[1:] == ["een"] * len([line for line in lines if line.endswith("  een")])
    assert [line.split() for line in lines if line.endswith("  een")][1] == ["0.04", "een"]
    offline = run("--bundle", folder / TIERS[-1], "-", stdin=good.read_bytes())
    assert offline.returncode == 0 and "final:   een een" in offline.stdout.decode()


def test_the_microphone(tool, folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match="needs the Python package sounddevice"):
        next(tool.microphone())

    class InputStream:
        """Half a second of a microphone, then Ctrl-C."""

        def __init__(self, **_: object) -> None:
            self.calls = 0

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, frames: int):
            self.calls += 1
            if self.calls > 5:
                raise KeyboardInterrupt
            return np.zeros((frames, 1), dtype=np.float32), False

    fake = types.SimpleNamespace(InputStream=InputStream, PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    recognizer = tool.SherpaRecognizer(folder / TIERS[8], 8, tail_seconds=0.6)
    names = tool.read_tokens(folder / TIERS[8] / "tokens.txt")
    tool.transcribe(recognizer, tool.Printer(names), tool.microphone())
    assert "0.4 s  een een een een\n" in capsys.readouterr().out
