"""The standalone export: files, other sizes of model, and errors that say what to do."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from icetransfer import export
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming.exported import Exported, read_tokens
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.search import Hypothesis
from icetransfer.streaming.sherpa import SherpaRecognizer


@pytest.fixture(scope="module")
def files(tmp_path_factory, nano_dims):
    folder = tmp_path_factory.mktemp("export")
    save_checkpoint(folder / "nano.pt", build_transducer(nano_dims, seed=1))
    names = ["<blk>", "<sos/eos>", "<unk>", *(f"t{i}" for i in range(3, nano_dims.vocab_size))]
    (folder / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(names)))
    return folder


def words(files, out, **more):
    given = {"checkpoint": files / "nano.pt", "tokens": files / "tokens.txt", "out": out} | more
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def tiers(files):
    """Two tiers of a model whose front end is narrower than sherpa-onnx's."""
    out = files / "tiers"
    export.export_checkpoint(words(files, out, chunk_size="8,-1", left_context_frames="20"))
    return out


def test_a_folder_for_each_tier_with_shared_heads(tiers) -> None:
    assert {path.name for path in tiers.iterdir()} == {"chunk-8-left-20", "offline"}
    streaming, offline = Exported(tiers / "chunk-8-left-20"), Exported(tiers / "offline")
    for part in ("decoder", "joiner"):
        assert streaming.model(part, "fp32").samefile(offline.model(part, "fp32"))
    assert streaming.model("decoder", "int8").samefile(streaming.model("decoder", "fp32"))
    assert not list(tiers.rglob("*partial*"))
    said = json.loads(streaming.description.read_text())
    assert said["difference_from_torch"] < 1e-4
    assert said["made_of"]["chunk_size"] == 8 and said["bytes"]["fp32"] == streaming.size("fp32")


def test_left_context_is_whole_chunks(tiers) -> None:
    model = OnnxTransducer(tiers / "chunk-8-left-20")
    assert model.chunk_size == 8 and model.left_context_frames == 16
    state = model.initial_state(3, 8, 20)
    assert state.tensors()[0].shape[:2] == (16, 3)
    assert state.embed_states.shape == (3, 128, 3, 19)  # what sherpa-onnx hands in
    with pytest.raises(ValueError, match="was exported for chunk_size=8, left_context_frames=16"):
        model.initial_state(3, 16, 20)
    with pytest.raises(ValueError, match="was exported for chunk_size=8"):
        model.encode(torch.zeros(1, 50, 80), torch.tensor([50]))


def test_any_number_of_streams_and_frames(tiers, files) -> None:
    model = OnnxTransducer(tiers / "offline")
    torchs = export.Source.load(files / "nano.pt", files / "tokens.txt").model
    for streams, frames in ((1, 9), (1, 40), (5, 333)):
        features = torch.randn(streams, frames, 80)
        lens = torch.full((streams,), frames)
        out, _ = model.encode(features, lens)
        expected = torchs.joiner.encoder_proj(torchs.encode(features, lens)[0])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    model, state = OnnxTransducer(tiers / "chunk-8-left-20"), None
    for streams in (1, 2, 7):
        state, expected = model.initial_state(streams, 8, 16), torchs.initial_state(streams, 8, 16)
        for _ in range(4):
            features = torch.randn(streams, 29, 80)
            out, state = model.encode_chunk(features, state)
            wanted, expected = torchs.encode_chunk(features, expected)
            wanted = torchs.joiner.encoder_proj(wanted)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_one_tier_goes_to_the_folder_itself_and_a_complete_one_is_kept(files) -> None:
    out = files / "one"
    command = words(files, out, chunk_size=8, left_context_frames=16, precisions="fp32")
    export.export_checkpoint(command)
    bundle = Exported(out)
    bundle.check("fp32")
    before = bundle.model("encoder", "fp32").stat().st_mtime_ns
    export.export_checkpoint(command)
    assert bundle.model("encoder", "fp32").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"encoder.int8.onnx, .* missing; run stage 8"):
        bundle.check("int8")
    export.export_checkpoint([*command[:-1], "precisions=fp32,int8"])
    bundle.check("int8")


def test_token_lists_of_icefall_have_two_more_lines_than_the_model(files, caplog) -> None:
    of_icefall, out = files / "icefall-tokens.txt", files / "icefall"
    given = (files / "tokens.txt").read_text()
    of_icefall.write_text(given + "#0 20\n#1 21\n")
    with caplog.at_level("INFO", logger="icetransfer"):
        export.export_checkpoint(words(files, out, tokens=of_icefall, chunk_size=8))
    assert "icefall-tokens.txt: the last 2, from #0 on, are not tokens of the model" in caplog.text
    assert (out / "tokens.txt").read_text() == given
    # a bundle of others, whose list was copied: both engines take it
    (out / "tokens.txt").write_text(of_icefall.read_text())
    (out / "export.json").unlink()
    assert OnnxTransducer(out).context_size == 2
    assert Exported(out).inspect("fp32").vocab_size == 20
    assert SherpaRecognizer(out, 8)([np.zeros(100, dtype=np.float32)]) == [Hypothesis([], [])]


def test_a_wrong_graph_is_caught(files, tiers, monkeypatch, nano_dims) -> None:
    other = build_transducer(nano_dims, seed=2).eval()
    with pytest.raises(RuntimeError, match="differs from torch by"):
        export.verify_export(other, Exported(tiers / "chunk-8-left-20"), 8)


def test_what_is_not_possible_is_said(files, nano_dims) -> None:
    def fails(match, **more):
        with pytest.raises(ValueError, match=match):
            export.export_checkpoint(words(files, files / "bad", **more))

    fails(r"chunk_size=7 \(140 ms\) does not fit this model.*multiple of 2", chunk_size=7)
    fails("precisions=int3: 'int3' is none of fp32, fp16, int8, int4", precisions="int3")
    fails(r"export.int4.block_size: expected 16, 32", **{"export.int4.block_size": 24})
    fails("unknown config key export.int5; did you mean export.int", **{"export.int5": 24})
    fails("chunk_size=big: expected whole numbers", chunk_size="big")
    fails("left_context_frames=-1: expected one number", left_context_frames=-1)
    fails("unknown dimension num_head; did you mean num_heads", num_head=4)
    fails("tokens.txt does not exist", tokens=files / "nowhere" / "tokens.txt")
    with pytest.raises(ValueError, match="tokens=, out= not given"):
        export.export_checkpoint(["checkpoint=x.pt"])
    with pytest.raises(ValueError, match="expected key=value"):
        export.export_checkpoint(["x.pt"])
    short = files / "short.txt"
    short.write_text("<blk> 0\na 1\n")
    fails(r"short.txt has 2 tokens and .*nano.pt has 20", tokens=short)
    short.write_text("<blk> 0\na 2\n")
    with pytest.raises(ValueError, match=r'short.txt:2: expected "token 1"'):
        read_tokens(short)
    short.write_text("a 0\n")
    with pytest.raises(ValueError, match="first token must be blank"):
        read_tokens(short)
    wide = dataclasses.replace(nano_dims, subsampling_channels=(2, 4, 160))
    save_checkpoint(files / "wide.pt", build_transducer(wide))
    fails("front end has 160 channels; .* at most 128", checkpoint=files / "wide.pt")


def test_other_families_and_broken_files(files, tiers, tmp_path) -> None:
    source = Exported(tiers / "chunk-8-left-20")
    bundle = Exported(tmp_path)
    for path in source.dir.glob("*[tx]"):  # without export.json, as those of others
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not bundle.description.exists()
    encoder = bundle.model("encoder", "fp32")
    proto = onnx.load(str(encoder))
    onnx.helper.set_model_props(proto, {"model_type": "conformer"})
    onnx.save(proto, str(encoder))
    with pytest.raises(ValueError, match=r"model_type is 'conformer'.* another model family"):
        OnnxTransducer(tmp_path)
    encoder.write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"encoder.onnx is not a whole ONNX model"):
        OnnxTransducer(tmp_path)


def test_the_command_prints_one_message_and_exit_code_2(files) -> None:
    command = [sys.executable, "-m", "icetransfer.export", *words(files, files / "x", chunk_size=7)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: chunk_size=7 (140 ms) does not fit")
    assert "Traceback" not in done.stderr
