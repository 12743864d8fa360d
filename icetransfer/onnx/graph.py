"""Simpler ONNX graphs: what depends on sizes alone is computed once, at export.

A traced graph recomputes at every call whatever Python computed from tensor sizes: position
encodings, the shapes of reshapes, slice bounds.  Only the number of streams (and of frames, for
whole utterances) can change, so the graph is run at a few of those sizes: what comes out the same
every time is a constant, and a reshape in which one size changes takes -1 there.  Three quarters of
the nodes go; loading, quantising and running all get faster, most with few streams.

A tracer's names follow the calls, not the layers, and of a small model they are a tenth of the
file: products and convolutions are named here after the layers whose weights they read, all else
gets a number.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

Array = NDArray[np.generic]
#: Operators that read a layer's weights, before and after quantisation.
WEIGHTED = ("MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulNBits")


def simplify(model: ModelProto, samples: Sequence[Mapping[str, Array]]) -> None:
    """Folds what is the same for every input, and shifts into biases; changes `model`.

    Args:
        model: a graph without metadata that matters to its numbers.
        samples: inputs of at least three different sizes, one stream among them.
    """
    graph = model.graph
    _constants_to_initializers(graph)
    frontier = _size_only_tensors(graph)
    values = _evaluate(model, frontier, samples)
    for name in frontier:
        runs = values[name]
        if all(np.array_equal(run, runs[0]) for run in runs):
            graph.initializer.append(numpy_helper.from_array(np.asarray(runs[0]), name))
    _free_one_size(graph, values)
    _remove_unused(graph)
    _fold_shifts(graph)
    _remove_unused(graph)  # the biases that took a shift up


def _constants_to_initializers(graph: GraphProto) -> None:
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            kept.append(node)
    replace_nodes(graph, kept)


def _size_only_tensors(graph: GraphProto) -> list[str]:
    """Tensors that depend on sizes and constants alone and are read by a node that does not."""
    known = {tensor.name for tensor in graph.initializer}
    computed: set[str] = set()
    frontier: dict[str, None] = {}
    for node in graph.node:
        tensors = not _captured(node) and not node.op_type.startswith("Sequence")
        inputs = [name for name in node.input if name]
        if tensors and (node.op_type == "Shape" or all(name in known for name in inputs)):
            known.update(node.output)
            computed.update(node.output)
        else:
            frontier.update(dict.fromkeys(name for name in inputs if name in computed))
    return list(frontier)


def _evaluate(
    model: ModelProto, names: list[str], samples: Sequence[Mapping[str, Array]]
) -> dict[str, list[Array]]:
    """The value of each tensor for each sample."""
    if not names:
        return {}
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    runs = [session.run(names, dict(sample)) for sample in samples]
    return {name: [run[i] for run in runs] for i, name in enumerate(names)}


def _free_one_size(graph: GraphProto, values: Mapping[str, list[Array]]) -> None:
    """Gives reshapes in which a single size changes that size as -1."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in constants or node.input[1] not in values:
            continue
        runs = np.stack([run.astype(np.int64) for run in values[node.input[1]]])
        changing = np.flatnonzero((runs != runs[0]).any(axis=0))
        if len(changing) == 1 and (runs > 0).all():
            shape = runs[0].copy()
            shape[changing[0]] = -1
            name = f"{node.output[0]}_shape"
            graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name


def _remove_unused(graph: GraphProto) -> None:
    """Drops nodes and constants that nothing needs."""
    constants = {tensor.name for tensor in graph.initializer}
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        live = [name for name in node.output if name in needed and name not in constants]
        if live:
            kept.append(node)
            needed.update(node.input)
            needed.update(_captured(node))
    replace_nodes(graph, kept[::-1])
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _captured(node: NodeProto) -> set[str]:
    """The names that the branches of an If or the body of a Loop read, also from outside."""
    inner = [step for attribute in node.attribute for step in attribute.g.node]
    names = {output.name for attribute in node.attribute for output in attribute.g.output}
    return names.union(*(step.input for step in inner), *(_captured(step) for step in inner))


def _fold_shifts(graph: GraphProto) -> None:
    """Takes differences with a number into the bias that was added just before.

    Swoosh begins with such a difference, and there are five in a layer.
    """
    constants = {t.name: t for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)

    def absorb(name: str, shift: Array) -> bool:
        node = makers.get(name)
        if node is None or readers[name] != 1:
            return False
        if node.op_type in ("Transpose", "Reshape"):
            return absorb(node.input[0], shift)
        places = {"Add": (0, 1), "Conv": (2,)}.get(node.op_type, ())
        for place in places:
            if place < len(node.input) and (bias := constants.get(node.input[place])):
                made = numpy_helper.from_array(
                    numpy_helper.to_array(bias) - shift, f"{node.output[0]}_bias"
                )
                graph.initializer.append(made)
                node.input[place] = made.name
                return True
        return node.op_type == "Add" and any(absorb(given, shift) for given in node.input)

    kept, same = [], {}
    for node in graph.node:
        shift = constants.get(node.input[1]) if node.op_type == "Sub" else None
        number = None if shift is None else numpy_helper.to_array(shift)
        if number is not None and number.size == 1 and absorb(node.input[0], number.reshape(())):
            same[node.output[0]] = node.input[0]
        else:
            node.input[:] = [same.get(name, name) for name in node.input]
            kept.append(node)
    replace_nodes(graph, kept)


def replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    """Makes these, old or new, the graph's nodes."""
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def name_layers(graph: GraphProto, weights: Mapping[str, Array]) -> None:
    """Names each product and convolution with a constant after its layer; other nodes lose theirs.

    Args:
        graph: of the model; changed.
        weights: the model's parameters, as in its state_dict.  They are found by their values,
            because exporters transpose some and rename them.
    """
    layers = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            layer = name.removesuffix(".weight")
            layers[_digest(weight)] = layers[_digest(weight.T)] = layer
    of_constants = {
        tensor.name: layers.get(_digest(numpy_helper.to_array(tensor)), "")
        for tensor in graph.initializer
        if len(tensor.dims) > 1
    }
    for node in graph.node:
        found = [of_constants.get(name, "") for name in node.input]
        node.name = "".join(found) if node.op_type in WEIGHTED else ""


def _digest(weight: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest()


def shorten_names(model: ModelProto) -> None:
    """Numbers all tensors but the model's own inputs and outputs, and all nodes but `WEIGHTED`."""
    graphs = [*_with_branches(model.graph)]
    kept = {value.name for value in [*model.graph.input, *model.graph.output]} | {""}
    short: dict[str, str] = {name: name for name in kept}

    def rename(name: str) -> str:
        return short.setdefault(name, f"t{len(short)}")

    for graph in graphs:
        del graph.value_info[:]
        for value in [*graph.initializer, *graph.input, *graph.output]:
            value.name = rename(value.name)
        for node in graph.node:
            node.doc_string = ""
            if node.op_type not in WEIGHTED:
                node.name = ""
            node.input[:] = [rename(name) for name in node.input]
            node.output[:] = [rename(name) for name in node.output]


def _with_branches(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those of its Ifs and Loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _with_branches(attribute.g)
