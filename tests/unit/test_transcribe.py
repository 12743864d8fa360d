"""icetransfer.transcribe: tiers, files, what is live, formats, and its errors."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch

from icetransfer import transcribe
from icetransfer.bundle.check import FORMAT
from icetransfer.bundle.settings import LANGUAGE_MODEL, RULES
from icetransfer.data.tokenizer import Tokenizer, train_tokenizer, write_tokens
from icetransfer.export import Source, export_tier
from icetransfer.model.language_model import LanguageModel
from icetransfer.model.transducer import build_transducer
from icetransfer.onnx.language_model import export_language_model
from icetransfer.streaming import audio
from icetransfer.streaming.exported import Exported

TIERS = {8: "chunk-8-left-16", 16: "chunk-16-left-16", -1: "offline"}
BUNDLE = {"format": FORMAT, "sherpa_onnx": RULES, "min_confidence": 0.0, "reasons": {}}
COMMAND = [sys.executable, "-m", "icetransfer.transcribe"]


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


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process, as a user types it."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["transcribe", *map(str, words)])
        code = 0
        try:
            transcribe._main()
        except SystemExit as end:
            code = end.code
        return Done(code, *capsys.readouterr())

    return call


def test_the_tier_is_found(folder, tmp_path) -> None:
    assert transcribe.find_tier(folder, "160") == (Exported(folder / TIERS[8]), 8)
    assert transcribe.find_tier(folder, "offline") == (Exported(folder / TIERS[-1]), -1)
    assert transcribe.find_tier(folder / TIERS[16], None) == (Exported(folder / TIERS[16]), 16)
    with pytest.raises(ValueError, match="latencies 160, 320, offline; choose one"):
        transcribe.find_tier(folder, None)
    with pytest.raises(ValueError, match="not --latency 560"):
        transcribe.find_tier(folder, "560")
    with pytest.raises(ValueError, match=r"not a bundle and holds none"):
        transcribe.find_tier(tmp_path, None)
    with pytest.raises(ValueError, match="is not a folder"):
        transcribe.find_tier(tmp_path / "none", None)


def test_a_broken_tier_beside_good_ones_is_named_and_left_out(folder, tmp_path, caplog) -> None:
    shutil.copytree(folder / TIERS[8], tmp_path / TIERS[8])
    for name in ("half", ".partial.offline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "encoder.onnx").write_bytes(b"half")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "joiner.onnx").write_bytes(b"")
    bundle, size = transcribe.find_tier(tmp_path, None)
    assert (bundle.dir.name, size) == (TIERS[8], 8)
    assert "half" in caplog.text and "broken" in caplog.text and ".partial" not in caplog.text
    with pytest.raises(ValueError, match=r"broken.*half written(.|\n)*half"):
        transcribe.find_tier(tmp_path, "320")


def test_lines_in_the_files_order_and_bad_files_last(run, folder, wave, tmp_path) -> None:
    good, other, bad = tmp_path / "good.flac", tmp_path / "other.wav", tmp_path / "bad.wav"
    soundfile.write(good, np.tile(wave, 4), 16000)
    soundfile.write(other, wave[:8000], 16000)
    bad.write_bytes(b"RIFF")
    tier = ("--bundle", folder, "--latency", 160, "--precision", "int8")
    done = run(*tier, bad, good, other)
    assert done.returncode == 2
    assert f"{bad} cannot be read as audio" in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(good), str(other)]
    # One token in every frame of 40 ms, to the end of the silence that lets the last word out.
    name, start, end, text = rows[1]
    assert (name, start) == (str(other), "0.00")
    assert float(end) == 0.04 * len(text.split()) and {*text.split()} == {"een"}
    assert len(text.split()) > 12
    offline = run("--bundle", folder / TIERS[-1], other)
    assert offline.returncode == 0 and offline.stdout.startswith("0.00\t")


def test_formats(run, folder, wave, tmp_path) -> None:
    path, second = tmp_path / "a.wav", tmp_path / "b.wav"
    soundfile.write(path, wave[:8000], 16000)
    soundfile.write(second, wave[:8000], 16000)
    tier = ("--bundle", folder / TIERS[16])
    found = json.loads(run(*tier, "--json", path).stdout)
    assert found["start"] == 0 and found["words"][1]["start"] == 0.04
    assert 0.5 < found["words"][1]["confidence"] <= 1 and "file" not in found
    assert run(*tier, "--srt", path).stdout.startswith("1\n00:00:00,000 --> 00:00:0")
    done = run(*tier, "--vtt", path, second)
    assert done.returncode == 2 and "--out DIR" in done.stderr
    out = tmp_path / "out"
    assert run(*tier, "--vtt", "--out", out, path, second).returncode == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.vtt", "b.vtt"]
    assert (out / "a.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> ")
    (tmp_path / "in").mkdir()
    same = shutil.copy(path, tmp_path / "in" / "a.wav")
    done = run(*tier, "--out", out, path, same)
    assert done.returncode == 2 and "a.txt: rename one" in done.stderr


def test_a_pipe_is_read_as_it_comes(folder, wave, tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", np.tile(wave, 16), 16000, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # as ffmpeg writes, which does not know the length
    command = [*COMMAND, "--bundle", folder / TIERS[8], "-"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(content)  # 24 s, of which rule 3 ends a segment after 20; no end yet
    child.stdin.flush()
    first = child.stdout.readline().split(b"\t")
    assert child.poll() is None and 19 < float(first[1]) < 21
    child.stdin.write(content[44:88_044])
    rest, _ = child.communicate()
    assert float(rest.split(b"\t")[0]) == float(first[1])


def test_interrupted_it_prints_the_last_words(folder, wave, capsys) -> None:
    def pieces():
        for start in range(0, 8000, 1600):
            yield wave[start : start + 1600]
        raise KeyboardInterrupt

    args = types.SimpleNamespace(
        bundle=folder / TIERS[8], latency=None, precision="int8", microphone=True, files=[],
        min_confidence=None, blank_penalty=0.0, hotwords=None, no_lm=False,
    )  # fmt: skip
    listener = transcribe.make_listener(args)()
    transcribe.transcribe_live(listener, pieces(), transcribe.Captions())
    assert capsys.readouterr().out.startswith("0.00\t")


def test_least_confidence_and_blank_penalty(run, folder, wave, tmp_path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, wave[:8000], 16000)
    tier = ("--bundle", folder / TIERS[8], path)
    assert run(*tier, "--min-confidence", 1).stdout == ""
    assert run(*tier, "--min-confidence", 0, "--blank-penalty", 1).stdout != ""


def test_on_a_terminal_one_line_changes(folder, wave, tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="PCM_16")
    ours, theirs = pty.openpty()
    with subprocess.Popen(["cat", tmp_path / "a.wav"], stdout=subprocess.PIPE) as given:
        command = [*COMMAND, "--bundle", folder / TIERS[8], "-"]
        done = subprocess.run(command, stdin=given.stdout, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    assert done.returncode == 0
    assert shown.count("\r\x1b[K") > 5 and shown.count("\n") == 1
    assert shown.splitlines()[-1].rpartition("\x1b[K")[2].startswith("0.00\t")


def test_another_version_of_a_bundle(run, folder, tmp_path) -> None:
    tier = shutil.copytree(folder / TIERS[8], tmp_path / "tier")
    (tier / "bundle.json").write_text('{"format": 99}')
    done = run("--bundle", tier, "a.wav")
    assert done.returncode == 2 and "is of version 99" in done.stderr


class InputStream:
    """Half a second of a microphone at 44.1 kHz, which loses samples; then Ctrl-C."""

    def __init__(self, **settings: object) -> None:
        assert settings["samplerate"] == 44100
        self.calls = 0

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, frames: int):
        self.calls += 1
        if self.calls > 5:
            raise KeyboardInterrupt
        return np.zeros((frames, 1), dtype=np.float32), self.calls == 3


def test_the_microphone_at_its_own_rate(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match="needs the Python package sounddevice"):
        next(audio.microphone())

    def query(device: object, kind: str) -> dict[str, object]:
        if device == 9:
            raise ValueError("no such device")
        return {"name": "built in", "default_samplerate": 44100.0}

    fake = types.SimpleNamespace(
        InputStream=InputStream, PortAudioError=RuntimeError, query_devices=query
    )
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    heard = []
    with pytest.raises(KeyboardInterrupt):
        heard.extend(audio.microphone())
    assert 5 * 1600 - 600 < sum(map(len, heard)) <= 5 * 1600
    assert "built in at 44100 Hz" in caplog.text
    assert "samples were lost before 0.2 s" in caplog.text
    with pytest.raises(ValueError, match=r"no such device.*--device chooses one"):
        next(audio.microphone("9"))


class Pipe(io.BufferedReader):
    """What cannot be sought in."""

    def seekable(self) -> bool:
        return False


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
def test_wav_files_one_after_the_other_at_changing_rates(monkeypatch, subtype) -> None:
    tone = 0.5 * np.sin(np.arange(16000) / 20)
    given = b""
    for rate, channels in ((16000, 1), (8000, 2), (48000, 1)):
        file = io.BytesIO()
        samples = np.repeat(tone[: rate // 2, None], channels, axis=1)
        soundfile.write(file, samples, rate, subtype, format="WAV")
        given += file.getvalue()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Pipe(io.BytesIO(given))))
    heard = np.concatenate([*audio.read_standard_input()])
    # Half a second, half a second, and 16,000 samples at 48 kHz.
    assert abs(len(heard) - (8000 + 8000 + 16000 // 3)) <= 2
    np.testing.assert_allclose(heard[:8000], tone[:8000], atol=0.01)


def test_files_of_all_kinds(tmp_path) -> None:
    tone = 0.5 * np.sin(np.arange(24000) / 20)
    both = np.stack([tone, 0.5 * tone], axis=1)
    for suffix in ("wav", "flac", "mp3", "ogg"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, both, 16000)
        heard = np.concatenate([*audio.read_file(str(path))])
        assert heard.dtype == np.float32 and abs(len(heard) - len(tone)) < 1200
        if suffix in ("wav", "flac"):
            np.testing.assert_allclose(heard, 0.75 * tone, atol=1e-4)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, "FLOAT")
    for name, said in (("none", "does not exist"), ("empty", "is empty"), ("nan", "not numbers")):
        with pytest.raises(ValueError, match=rf"{name}.wav.*{said}"):
            list(audio.read_file(str(tmp_path / f"{name}.wav")))


def test_standard_input_that_is_not_audio(monkeypatch) -> None:
    for content, said in ((b"RIFF", "send 16-bit PCM"), (b"no audio", "cannot be read as audio")):
        given = Pipe(io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=given))
        with pytest.raises(ValueError, match=said):
            list(audio.read_standard_input())


def test_the_offline_tier_hears_long_recordings(run, folder, wave, tmp_path) -> None:
    """Two minutes, in parts: the words of one go on where those of the last end."""
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(wave, 80), 16000)
    done = run("--bundle", folder / TIERS[-1], "--json", path)
    starts = [
        word["start"] for line in done.stdout.splitlines() for word in json.loads(line)["words"]
    ]
    assert done.returncode == 0 and starts == sorted(starts) and 119 < starts[-1] < 121
    assert len(starts) > 0.95 * 120 / 0.04


def test_help_names_the_ways(run) -> None:
    shown = run("--help").stdout
    assert "ffmpeg" in shown and "--microphone" in shown


@pytest.fixture
def hesitant(tmp_path, nano_dims, wave):
    """A bundle that says "drie" and nearly "twee", with its tokenizer; and a.wav."""
    trained = train_tokenizer(["twee", "drie"], 99)
    tokenizer = Tokenizer(trained)
    write_tokens(tokenizer, tmp_path / "given.txt")
    model = build_transducer(nano_dims.with_vocabulary(tokenizer.vocab_size), seed=1).eval()
    first, second = (tokenizer.encode(word) for word in ("drie", "twee"))
    assert len(first) == len(second) == 1
    with torch.no_grad():
        model.joiner.output_linear.weight.zero_()
        model.joiner.output_linear.bias.fill_(-9)
        model.joiner.output_linear.bias[first[0]] = 1.0
        model.joiner.output_linear.bias[second[0]] = 0.0
    bundle = tmp_path / "bundle"
    source = Source(tmp_path / "nano.pt", model, tmp_path / "given.txt", "0" * 64)
    export_tier(source, Exported(bundle), 8, 16, [])
    soundfile.write(tmp_path / "a.wav", wave[:8000], 16000)
    return bundle, trained


def test_hotwords(run, tmp_path, hesitant) -> None:
    """With the hotword it says "twee"; a bad line is told at once."""
    bundle, trained = hesitant
    hotwords = tmp_path / "hotwords.txt"
    hotwords.write_text("Twee\n")
    command = ("--bundle", bundle, "--hotwords", hotwords, tmp_path / "a.wav")
    done = run(*command)
    assert done.returncode == 2 and "bpe.model does not exist" in done.stderr
    (bundle / "bpe.model").write_bytes(trained)
    (bundle / "bundle.json").write_text(json.dumps(BUNDLE | {"language": "nl"}))
    without = run("--bundle", bundle, tmp_path / "a.wav").stdout
    assert "drie" in without and "twee" not in without
    done = run(*command, "--hotwords-score", 3)
    assert "twee" in done.stdout and "drie" not in done.stdout
    assert "a score above 2 makes" in done.stderr
    done = run(*command, "--hotwords-score", 0.5)
    assert "drie" in done.stdout and "makes the model" not in done.stderr
    hotwords.write_text("twee\nQuatsch :1\n")
    done = run(*command)
    assert done.returncode == 2 and f"{hotwords}:2: 'quatsch' has 'quasch'" in done.stderr
    assert done.stdout == ""


def test_the_language_model_of_a_bundle(run, tmp_path, hesitant) -> None:
    """One that expects "twee" always: it is used unless --no-lm is there."""
    bundle, trained = hesitant
    tokenizer = Tokenizer(trained)
    model = LanguageModel(tokenizer.vocab_size, 8, 1).eval()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
        model.output.bias[tokenizer.encode("twee")[0]] = 5.0
    export_language_model(model, bundle / LANGUAGE_MODEL)
    arguments = RULES | {"lm": LANGUAGE_MODEL, "lm_scale": 1.0}
    (bundle / "bundle.json").write_text(json.dumps(BUNDLE | {"sherpa_onnx": arguments}))
    command = ("--bundle", bundle, tmp_path / "a.wav")
    said = run(*command).stdout
    assert "twee" in said and "drie" not in said
    assert "drie" in run(*command, "--no-lm").stdout
    (bundle / LANGUAGE_MODEL).unlink()
    assert f"{LANGUAGE_MODEL} is missing: copy the bundle again" in run(*command).stderr
