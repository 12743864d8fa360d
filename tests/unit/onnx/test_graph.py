"""Graph simplification: constants of sizes, freed sizes, branches and shifts."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from icetransfer.onnx.graph import simplify


def run(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def make(nodes, initializers, output_rank):
    """A model of x (N, 6) with output y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * output_rank)
    tensors = [numpy_helper.from_array(np.array(v), k) for k, v in initializers.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


SAMPLES = [{"x": np.zeros((n, 6), np.float32)} for n in (1, 2, 3)]


def operators(model):
    return sorted(node.op_type for node in model.graph.node)


def test_a_reshape_that_follows_the_batch_needs_no_arithmetic() -> None:
    """x -> (N, 2, 3) by Shape, Gather, Concat, as tracers write it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Gather", ["shape", "one"], ["six"]),
        helper.make_node("Div", ["six", "two"], ["three"]),
        helper.make_node("Concat", ["n", "two", "three"], ["new"], axis=0),
        helper.make_node("Reshape", ["x", "new"], ["y"]),
    ]
    model = make(nodes, {"zero": [0], "one": [1], "two": [2]}, 3)
    x = np.random.default_rng(0).random((5, 6), dtype=np.float32)
    before = run(model, x)
    simplify(model, SAMPLES)
    assert operators(model) == ["Reshape"]
    assert [t.name for t in model.graph.initializer] == ["y_shape"]
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == [-1, 2, 3]
    np.testing.assert_array_equal(run(model, x), before)


def test_what_changes_with_the_batch_is_kept() -> None:
    """x + N, and a branch on N == 1 that reads a constant of its surroundings."""
    then = helper.make_graph(
        [helper.make_node("Add", ["x", "plus"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    otherwise = helper.make_graph(
        [helper.make_node("Sub", ["x", "plus"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Equal", ["n", "one"], ["alone"]),
        helper.make_node("Cast", ["one"], ["plus"], to=TensorProto.FLOAT),
        helper.make_node("If", ["alone"], ["branch"], then_branch=then, else_branch=otherwise),
        helper.make_node("Cast", ["n"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["branch", "count"], ["y"]),
    ]
    model = make(nodes, {"zero": [0], "one": [1]}, 2)
    simplify(model, SAMPLES)
    for streams, expected in ((1, 2.0), (2, 1.0), (7, 6.0)):
        assert set(run(model, np.zeros((streams, 6), np.float32)).ravel()) == {expected}


def test_constants_of_weights_are_computed_once() -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.float32([1, 3]))),
        helper.make_node("Softmax", ["w"], ["s"], axis=0),
        helper.make_node("ReduceSum", ["s"], ["total"]),
        helper.make_node("Mul", ["x", "total"], ["y"]),
    ]
    model = make(nodes, {"unused": [1.0]}, 2)
    simplify(model, SAMPLES)
    assert operators(model) == ["Mul"]
    assert [t.name for t in model.graph.initializer] == ["total"]


def test_a_shift_goes_into_the_bias_before_it() -> None:
    """x W + b - 2, of which something else reads x W + b - 2 only."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["turned"], perm=[1, 0]),
        helper.make_node("Sub", ["turned", "two"], ["shifted"]),
        helper.make_node("Exp", ["shifted"], ["y"]),
    ]
    random = np.random.default_rng(0)
    w, b = random.random((6, 4), dtype=np.float32), random.random(4, dtype=np.float32)
    model = make(nodes, {"w": w, "b": b, "two": np.float32(2)}, 2)
    x = random.random((5, 6), dtype=np.float32)
    before = run(model, x)
    simplify(model, SAMPLES)
    assert operators(model) == ["Add", "Exp", "MatMul", "Transpose"]
    assert sorted(t.name for t in model.graph.initializer) == ["sum_bias", "w"]
    onnx.checker.check_model(model)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-6)


def test_a_shift_stays_where_others_read_what_it_shifts() -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["sum"]),
        helper.make_node("Sub", ["sum", "two"], ["shifted"]),
        helper.make_node("Mul", ["sum", "shifted"], ["y"]),
    ]
    model = make(nodes, {"b": np.ones(6, np.float32), "two": np.float32(2)}, 2)
    simplify(model, SAMPLES)
    assert operators(model) == ["Add", "Mul", "Sub"]
