"""Layers to blame, how many of them to keep, and that the export then keeps them."""

import dataclasses
import json
import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from icetransfer import export, remedy
from icetransfer.config import Export
from icetransfer.model.checkpoint import save_checkpoint
from icetransfer.model.transducer import build_transducer
from icetransfer.onnx.quantize import layer_names
from icetransfer.remedy import Trial
from icetransfer.score import Counts
from icetransfer.streaming.exported import Exported

FEED_FORWARD = "encoder.encoders.0.layers.0.feed_forward2"


@pytest.fixture(scope="module")
def experiment(prepare, nano_dims):
    run = prepare(
        "remedy",
        "decode.precisions=[fp32,int8,int4]",
        "decode.chunk_sizes=[8]",
        "decode.left_context_frames=16",
    )
    tokens = len((run.lang_dir / "tokens.txt").read_text().splitlines())
    model = build_transducer(dataclasses.replace(nano_dims, vocab_size=tokens), seed=4)
    save_checkpoint(run.averaged_checkpoint, model)
    export.export_tiers(run)
    return run


@pytest.fixture
def encoder(experiment):
    return onnx.load(str(Exported(experiment.onnx_dir(8)).model("encoder", "fp32")))


def test_layers_are_parts_of_zipformer_layers(encoder) -> None:
    found = remedy.groups(layer_names(encoder.graph))
    assert found[FEED_FORWARD] == [f"{FEED_FORWARD}.in_proj", f"{FEED_FORWARD}.out_proj"]
    assert {"encoder_embed.conv", "encoder_embed.out", "joiner.encoder_proj"} <= {*found}
    assert "encoder.encoders.1.encoder.layers.0.self_attn_weights" in found
    assert sum(map(len, found.values())) == len(layer_names(encoder.graph))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_layer_that_speaks_loudest_is_the_most_sensitive(
    experiment, encoder, precision
) -> None:
    (node,) = (n for n in encoder.graph.node if n.name == f"{FEED_FORWARD}.out_proj")
    tensor = next(t for t in encoder.graph.initializer if t.name in node.input)
    weight = 50 * numpy_helper.to_array(tensor)  # most of what comes out of its stack
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    folder = experiment.dir / "probe"
    features = torch.randn(2, 93, 80, generator=torch.Generator().manual_seed(1)) - 6
    source = Exported(experiment.onnx_dir(8))
    folder.mkdir(exist_ok=True)
    for name in ("decoder.onnx", "joiner.onnx", "tokens.txt"):
        (folder / name).write_bytes((source.dir / name).read_bytes())

    def outputs(model):
        onnx.save(model, str(folder / "encoder.onnx"))
        return remedy.encoder_outputs(folder, features)

    found = remedy.sensitivities(encoder, precision, Export(), outputs)
    assert next(layer for layer in found if layer.startswith("encoder.")) == FEED_FORWARD
    assert [*found.values()] == sorted(found.values(), reverse=True)
    assert min(found.values()) >= 0 and outputs(encoder).shape == (2, 5 * 4, 16)


def test_the_number_of_layers_doubles_until_the_margin_holds() -> None:
    order = [f"layer{i}" for i in range(11)]
    tried = []

    def measure(count):
        tried.append(count)
        return Trial(count, 20.0 - count, 0)

    trials = remedy.keep_layers(Trial(0, 20.0, 0), order, measure, 15.0)
    assert tried == [1, 2, 4, 8] and trials[-1].wer == 12
    tried.clear()
    trials = remedy.keep_layers(Trial(0, 20.0, 0), order, measure, 0.0)
    assert tried == [1, 2, 4, 8, 11]  # all, and it is not enough
    assert remedy.keep_layers(Trial(0, 20.0, 0), order, measure, 20.0) == [Trial(0, 20.0, 0)]


def test_what_is_found_is_exported_and_told(experiment, monkeypatch, caplog) -> None:
    """WER as if int4 were cured by two layers, and int8 by none."""
    source = Exported(experiment.onnx_dir(8))
    caplog.set_level(logging.INFO, "icetransfer")

    def errors(self, bundle, chunk_size, precision):
        assert (chunk_size, precision) == (8, "fp32")
        if bundle.dir == source.dir:
            return Counts(10, 0, 0, 100)
        operators = [n.op_type for n in onnx.load(str(bundle.dir / "encoder.onnx")).graph.node]
        if "MatMulNBits" in operators:
            kept = operators.count("MatMulInteger") > 2
            return Counts(10 if kept else 12, 0, 0, 100)
        return Counts(11, 0, 0, 100)

    monkeypatch.setattr(remedy.Dev, "errors", errors)
    remedy.remedy(experiment)
    found = json.loads(experiment.remedy_file.read_text())
    int8, int4 = found["rows"]
    assert (int8["precision"], int8["holds"], int8["layers"], int8["kept"]) == (
        "int8",
        False,
        0,
        [],
    )
    assert int8["trials"][-1]["layers"] == len(int8["sensitivities"])
    assert int4["holds"] and int4["layers"] == int4["trials"][-1]["layers"] > 0
    assert source.quantisation("int4")["kept"] == int4["kept"]
    made = onnx.load(str(source.model("encoder", "int4")))
    of_kept = {
        n.name.removesuffix("_quant") for n in made.graph.node if n.op_type == "MatMulInteger"
    }
    products = {n.name for n in onnx.load(str(source.model("encoder", "fp32"))).graph.node}
    assert of_kept <= products and of_kept <= {*int4["kept"]}
    assert "the margin is not reached" in caplog.text


def test_another_checkpoint_is_not_remedied(experiment, tmp_path) -> None:
    found = {"checkpoint_sha256": "0", "rows": [{"tier": "x", "precision": "int8", "kept": ["y"]}]}
    other = dataclasses.replace(experiment, dir=tmp_path)
    other.remedy_file.write_text(json.dumps(found))
    assert export.kept_layers(other, Exported(tmp_path / "x"), "0") == {"int8": ["y"]}
    assert export.kept_layers(other, Exported(tmp_path / "x"), "1") == {}


def test_probes_and_errors_of_the_dev_set(experiment) -> None:
    dev = remedy.Dev(experiment)
    probes = dev.probes()
    assert probes.shape[0] == 6 and probes.shape[2] == 80 and probes.shape[1] <= 400
    counts = dev.errors(Exported(experiment.onnx_dir(8)), 8, "int8")
    assert counts.length == sum(len(cut.supervisions[0].text.split()) for cut in dev._sets[0][0])
    assert np.isfinite(counts.rate)
