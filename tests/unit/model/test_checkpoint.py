"""Checkpoints of other layouts, contradictions, other kinds of file."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from icetransfer.model.checkpoint import load_transducer, read_checkpoint, save_checkpoint
from icetransfer.model.transducer import TransducerDims, TransducerModel, build_transducer


class Surprise:
    """Its unpickling would run code."""

    def __reduce__(self) -> Any:
        return print, ("code has run",)


@pytest.fixture(scope="module")
def dims(nano_dims: TransducerDims) -> TransducerDims:
    return nano_dims


@pytest.fixture(scope="module")
def model(dims: TransducerDims) -> TransducerModel:
    return build_transducer(dims, seed=3)


def save(path: Path, **content: Any) -> Path:
    torch.save(content, path)
    return path


def test_round_trip(tmp_path: Path, dims: TransducerDims, model: TransducerModel) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, batch_idx_train=7, notes={"loss": [1.5, torch.ones(2)]})
    checkpoint = read_checkpoint(path)
    assert checkpoint.dims == dims
    assert checkpoint.extra["batch_idx_train"] == 7
    assert torch.equal(checkpoint.extra["notes"]["loss"][1], torch.ones(2))
    loaded = load_transducer(path)
    assert not loaded.training
    assert loaded.chunk_sizes == dims.chunk_sizes
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_icefall_layouts(tmp_path: Path, model: TransducerModel, prefix: str) -> None:
    weights = {prefix + name: value.double() for name, value in model.state_dict().items()}
    path = save(tmp_path / "epoch-1.pt", model=weights, exp_dir=Path("zipformer/exp"))
    loaded = load_transducer(path, num_heads=2, chunk_size="16,-1")
    assert loaded.dims.query_head_dim == (8, 8)
    assert loaded.chunk_sizes == (16, -1)
    assert loaded.joiner.output_linear.weight.dtype == torch.float32
    same = load_transducer(path, query_head_dim="8", causal=True, encoder_dim="16,24")
    assert same.dims.num_heads == (2, 2)


def test_a_bare_state_dict(tmp_path: Path, model: TransducerModel) -> None:
    path = tmp_path / "bare.pt"
    torch.save(model.state_dict(), path)
    assert load_transducer(path, num_heads="2").vocab_size == model.vocab_size


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({}, "icefall's defaults"),
        ({"num_heads": "3"}, "num_heads"),
        ({"num_heads": "2", "value_head_dim": "12"}, "value_head_dim"),
        ({"num_heads": "2,2,2"}, "2 encoder stacks"),
        ({"num_heads": "two"}, "comma list"),
        ({"num_heads": "2", "encoder_dim": "16,32"}, "encoder_dim is 16,24"),
        ({"num_heads": "2", "causal": False}, "causal"),
        ({"num_head": "2"}, "did you mean num_heads"),
    ],
)
def test_contradictions(
    tmp_path: Path, model: TransducerModel, overrides: dict[str, Any], said: str
) -> None:
    path = save(tmp_path / "epoch-1.pt", model=model.state_dict())
    with pytest.raises(ValueError, match=said):
        load_transducer(path, **overrides)


def test_weights_that_do_not_fit(tmp_path: Path, model: TransducerModel) -> None:
    weights = model.state_dict()
    del weights["encoder.encoders.1.out_combiner.bypass_scale"]
    path = save(tmp_path / "epoch-1.pt", model=weights)
    with pytest.raises(ValueError, match=r"out_combiner\.bypass_scale is missing"):
        load_transducer(path, num_heads=2)
    weights = model.state_dict() | {"joiner.output_linear.weight": torch.zeros(3, 16)}
    path = save(tmp_path / "epoch-2.pt", model=weights)
    with pytest.raises(ValueError, match=r"output_linear\.weight is \(3, 16\)"):
        load_transducer(path, num_heads=2)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["encoder.encoder_embed.out.weight", "encoder.encoders.0.layers.0.norm.eps"], "first gen"),
        (["encoder.pre_encode.out.weight", "joint.enc.weight"], "NeMo"),
        (["encoder.encoder.layers.0.conv_module.norm.weight"], "Conformer"),
        (["encoder_embed.conv.0.weight", "encoder.encoders.0.layers.0.norm.bias"], "causal"),
        (["wav2vec2.encoder.layers.0.attention.k_proj.weight"], "another model"),
    ],
)
def test_other_families(tmp_path: Path, names: list[str], said: str) -> None:
    path = save(tmp_path / "other.pt", model={name: torch.zeros(2) for name in names})
    with pytest.raises(ValueError, match=said):
        load_transducer(path)


def test_ctc_only(tmp_path: Path, model: TransducerModel) -> None:
    weights = {n: v for n, v in model.state_dict().items() if n.startswith(("encoder", "ctc"))}
    path = save(tmp_path / "ctc.pt", model=weights)
    with pytest.raises(ValueError, match="CTC only"):
        load_transducer(path)


def test_other_kinds_of_file(tmp_path: Path, model: TransducerModel) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_transducer(tmp_path / "absent.pt")
    text = tmp_path / "text.pt"
    text.write_text("epoch 1\n")
    with pytest.raises(ValueError, match="not a PyTorch checkpoint"):
        load_transducer(text)
    archive = tmp_path / "scripted.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("scripted/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript"):
        load_transducer(archive)
    for suffix, said in ((".onnx", "ONNX"), (".nemo", "NeMo"), (".safetensors", "safetensors")):
        other = tmp_path / f"other{suffix}"
        other.write_bytes(b"\x08\x07")
        with pytest.raises(ValueError, match=said):
            load_transducer(other)
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, model)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:50000])
    with pytest.raises(ValueError, match="damaged"):
        load_transducer(cut)


def test_code_is_not_run(
    tmp_path: Path, model: TransducerModel, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "epoch-1.pt", model=model.state_dict(), sampler=Surprise())
    with pytest.raises(ValueError, match="trusted=True"):
        load_transducer(path, num_heads=2)
    assert "code has run" not in capsys.readouterr().out
    assert load_transducer(path, num_heads=2, trusted=True).vocab_size == model.vocab_size


def test_a_later_format(tmp_path: Path, dims: TransducerDims, model: TransducerModel) -> None:
    metadata = {"format": 2, "dims": dims.to_dict()}
    path = save(tmp_path / "later.pt", model=model.state_dict(), icetransfer=metadata)
    with pytest.raises(ValueError, match="format 2"):
        read_checkpoint(path)
