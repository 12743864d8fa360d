"""Weights that tiers have in common lie in one file, and every tier computes what it did."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from icetransfer.onnx.share import bytes_on_disk, share_weights
from icetransfer.streaming.exported import Exported


def write_encoder(folder, weight, of_tier):
    """A product with a weight, and a sum with what only this tier has."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("Add", ["y", "tier"], ["out"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", len(weight)])
        for n in ("x", "out")
    ]
    constants = [numpy_helper.from_array(a, n) for n, a in (("weight", weight), ("tier", of_tier))]
    graph = helper.make_graph(nodes, "encoder", ends[:1], ends[1:], constants)
    folder.mkdir(parents=True)
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "encoder.onnx")


@pytest.fixture
def tiers(tmp_path):
    """Three tiers with a weight in common, and where they are written with it outside."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 64), dtype=np.float32)
    for name in "abc":
        of_tier = random.standard_normal(64, dtype=np.float32)
        write_encoder(tmp_path / "exported" / name, weight, of_tier)
    return {Exported(tmp_path / "exported" / n): Exported(tmp_path / "shared" / n) for n in "abc"}


def run(tier):
    session = onnxruntime.InferenceSession(str(tier.model("encoder", "fp32")))
    return session.run(None, {"x": np.eye(3, 64, dtype=np.float32)})[0]


def test_one_file_for_all_tiers(tiers) -> None:
    before = [*tiers]
    assert share_weights(tiers, "fp32")
    after = [*tiers.values()]
    assert all(tier.weights("fp32").samefile(after[0].weights("fp32")) for tier in after)
    assert after[0].weights("fp32").stat().st_size == 64 * 64 * 4  # and nothing of a single tier
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(run(old), run(new))
        # a copy: the onnx package, not the runtimes, refuses a file of weights with several names
        copy = Exported(shutil.copytree(new.dir, new.dir.with_suffix(".copy")))
        loaded = [onnx.load(str(tier.model("encoder", "fp32"))) for tier in (old, copy)]
        assert loaded[0].graph.node == loaded[1].graph.node
        for was, made in zip(*(model.graph.initializer for model in loaded), strict=True):
            assert (was.name, was.dims, was.raw_data) == (made.name, made.dims, made.raw_data)


def test_tiers_that_have_nothing_in_common_stay_as_they_are(tiers, tmp_path) -> None:
    random = np.random.default_rng(1)
    others = {}
    for name in "de":
        weight, of_tier = random.standard_normal((2, 64, 64), dtype=np.float32)
        write_encoder(tmp_path / name, weight, of_tier[0])
        others[Exported(tmp_path / name)] = Exported(tmp_path / "not shared" / name)
    assert not share_weights(others, "fp32")
    assert not [path for path in (tmp_path / "not shared").rglob("*") if path.is_file()]


def test_hard_links_are_counted_once(tmp_path) -> None:
    first, second, link = (tmp_path / name for name in "abc")
    first.write_bytes(bytes(10))
    second.write_bytes(bytes(5))
    link.hardlink_to(first)
    assert bytes_on_disk([first, second, link]) == 15
