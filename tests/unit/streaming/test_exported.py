"""Bundles that are not whole, caught before a runtime sees them."""

import json
import shutil

import numpy as np
import onnx
import pytest

from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming.exported import Exported, Facts, read_tokens, write_tokens
from icetransfer.streaming.onnx_model import OnnxTransducer
from icetransfer.streaming.sherpa import SherpaRecognizer

ENGINES = {"onnxruntime": OnnxTransducer, "sherpa": lambda folder: SherpaRecognizer(folder, 8)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, nano_dims):
    """Two tiers of one model, and a tier of another."""
    root = tmp_path_factory.mktemp("bundles")
    tokens = root / "tokens.txt"
    tokens.write_text("<blk> 0\n" + "".join(f"t{i} {i}\n" for i in range(1, nano_dims.vocab_size)))
    for seed, name in ((1, "model"), (2, "other")):
        source = Source(root / name, build_transducer(nano_dims, seed).eval(), tokens, name)
        for size in (8, 16) if seed == 1 else (8,):
            export_tier(source, Exported(root / name / str(size)), size, 16, ["int8"])
    return root


@pytest.fixture
def bundle(made, tmp_path):
    return Exported(shutil.copytree(made / "model" / "8", tmp_path / "8"))


def fails(bundle, match):
    for load in ENGINES.values():
        with pytest.raises(ValueError, match=match):
            load(bundle.dir)


def test_what_the_graphs_are_for(bundle, nano_dims) -> None:
    assert bundle.inspect("int8") == Facts(8, 16, nano_dims.vocab_size, nano_dims.context_size)
    bundle.description.unlink()
    assert bundle.inspect("fp32").left_context_frames == 16
    ENGINES["sherpa"](bundle.dir)([np.zeros(8000, np.float32)])


@pytest.mark.parametrize("part", ["encoder", "decoder", "joiner"])
def test_a_missing_file(bundle, part) -> None:
    bundle.model(part, "fp32").unlink()
    fails(bundle, rf"has no fp32 models: {part}.onnx missing; run stage 8")


@pytest.mark.parametrize("part", ["encoder", "decoder", "joiner"])
def test_a_file_cut_short(bundle, part) -> None:
    path = bundle.model(part, "fp32")
    path.write_bytes(path.read_bytes()[:-100])
    fails(bundle, rf"{part}.onnx has \d+ bytes and .*export.json says \d+: it is cut short")
    bundle.description.unlink()
    fails(bundle, rf"{part}.onnx is not a whole ONNX model .*; copy it again")


def test_a_file_of_another_tier(bundle, made) -> None:
    shutil.copy(made / "model" / "16" / "encoder.onnx", bundle.dir)
    fails(bundle, r"encoder.onnx has \d+ bytes and .*: it is cut short or of another export")
    bundle.description.unlink()
    with pytest.raises(ValueError, match="is for chunk_size=16, not 8"):
        SherpaRecognizer(bundle.dir, 8)


def test_a_file_of_another_model_with_the_same_size(bundle, made) -> None:
    shutil.copy(made / "other" / "8" / "decoder.onnx", bundle.dir)
    fails(bundle, r"decoder.onnx is not the file that .*export.json tells of: .*run stage 8 again")


def test_parts_of_models_of_different_sizes(bundle) -> None:
    bundle.description.unlink()
    path = bundle.model("joiner", "fp32")
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, {"joiner_dim": "32"})
    onnx.save(proto, str(path))
    fails(bundle, r"encoder.onnx has 16 outputs, 32 were expected .* of different models")
    del proto.metadata_props[:]
    onnx.save(proto, str(path))
    fails(bundle, "joiner.onnx: joiner_dim is not in its metadata; export again")


def test_another_vocabulary(bundle) -> None:
    lines = bundle.tokens.read_text().splitlines(keepends=True)
    bundle.tokens.write_text("".join(lines[:-1]))
    fails(bundle, r"tokens.txt has \d+ bytes and .*export.json says")
    bundle.description.unlink()
    fails(bundle, r"tokens.txt has 19 tokens and .*decoder.onnx has 20")


def test_how_a_precision_was_made(bundle) -> None:
    assert bundle.quantisation("fp32") == {}
    said = bundle.quantisation("int8")
    assert said == {"per_channel": True, "decoder": False, "convolutions": "int8", "kept": []}
    assert json.loads(bundle.description.read_text())["files"].keys() == {
        *(
            f"{part}{end}.onnx"
            for part in ("encoder", "decoder", "joiner")
            for end in ("", ".int8")
        ),
        "tokens.txt",
    }


def test_token_lists_of_icefall_end_with_symbols_that_are_no_tokens(tmp_path, caplog) -> None:
    path = tmp_path / "tokens.txt"
    path.write_text("<blk> 0\na 1\n#2 2\n#0 3\n#1 4\n")
    with caplog.at_level("INFO", logger="icetransfer"):
        assert read_tokens(path) == ["<blk>", "a", "#2"]
    assert "the last 2, from #0 on, are not tokens of the model" in caplog.text
    path.write_text("<blk> 0\n#0 1\nb 2\n")  # in the middle it is a token
    assert read_tokens(path) == ["<blk>", "#0", "b"]


SPACES = ["<blk>", " ", "\u00a0", "\u3000", "\u0085", "\u2028", "<0xE8>", "\u2581"]


def test_tokens_that_are_white_space(tmp_path) -> None:
    path = tmp_path / "tokens.txt"
    write_tokens(SPACES, path)
    assert read_tokens(path) == SPACES
    path.write_text("<blk> 0\n 1\n")
    with pytest.raises(ValueError, match=r'tokens.txt:2: expected "token 1"'):
        read_tokens(path)
