"""sherpa-onnx's recogniser: what it is given, and mistakes caught before the runtime ends."""

import numpy as np
import onnx
import pytest

from icetransfer.export import Source, export_tier
from icetransfer.model.transducer import build_transducer
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.sherpa import SherpaRecognizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, nano_dims):
    folder = tmp_path_factory.mktemp("sherpa")
    tokens = folder / "given.txt"
    names = ["<blk>", "<sos/eos>", "<unk>", "▁", "▁een", *(f"t{i}" for i in range(5, 20))]
    tokens.write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    model = build_transducer(nano_dims, seed=1).eval()
    model.joiner.output_linear.bias.data[4] = 9.0  # it says nothing but "▁een"
    source = Source(folder / "nano.pt", model, tokens, "0" * 64)
    export_tier(source, Exported(folder), 8, 16, ["int8"])
    return Exported(folder)


@pytest.fixture
def copy(bundle, tmp_path):
    """The files without export.json: as those that others have exported."""
    for path in bundle.files(["fp32", "int8"]):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return Exported(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tokens_come_back_as_ids(bundle, precision) -> None:
    recognizer = SherpaRecognizer(bundle.dir, 8, precision, tail_seconds=0.6)
    short, long = recognizer([np.zeros(n, dtype=np.float32) for n in (100, 16000)])
    assert set(short.tokens) == set(long.tokens) == {4}
    assert long.timestamps == [*range(len(long.tokens))]
    # windows of 29 frames every 16, 4 outputs each; the last one ends before the last frame
    assert len(short.tokens) == 4 * 2 and len(long.tokens) == 4 * 9
    assert recognizer([]) == []


def test_mistakes_are_told_before_the_runtime_ends_the_process(copy, tmp_path) -> None:
    with pytest.raises(ValueError, match="is for chunk_size=8, not 16"):
        SherpaRecognizer(tmp_path, 16)
    with pytest.raises(ValueError, match="is for chunk_size=8, not -1"):
        SherpaRecognizer(tmp_path, -1)
    with pytest.raises(ValueError, match=r"has no int4 models: encoder.int4.onnx"):
        SherpaRecognizer(tmp_path, 8, "int4")
    lines = copy.tokens.read_text().splitlines(keepends=True)
    copy.tokens.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"tokens.txt has 19 tokens and .*decoder.onnx has 20"):
        SherpaRecognizer(tmp_path, 8)
    copy.tokens.write_text("".join(lines))
    copy.model("joiner", "fp32").unlink()
    with pytest.raises(ValueError, match=r"joiner.onnx missing"):
        SherpaRecognizer(tmp_path, 8)


def test_other_families_and_broken_files(copy, tmp_path) -> None:
    encoder = copy.model("encoder", "fp32")
    proto = onnx.load(str(encoder))
    onnx.helper.set_model_props(proto, {"model_type": "lstm"})
    onnx.save(proto, str(encoder))
    with pytest.raises(ValueError, match="model_type is 'lstm'"):
        SherpaRecognizer(tmp_path, 8)
    encoder.write_bytes(b"not a graph")
    with pytest.raises(ValueError, match=r"encoder.onnx is not a whole ONNX model"):
        SherpaRecognizer(tmp_path, 8)
