"""Smaller encoders and joiners: fp16, int8 and 4-bit weights, made of the fp32 graphs.

fp16 and what is called "stored in 8 bits" below are formats of the file alone: the runtime widens
the weights once, when it loads them, and computes in fp32, so that every processor runs them at
fp32's speed.  In int8 the inputs of a product are quantised too, on the fly, with one scale for all
streams of a call, so its tokens depend a little on which streams share a batch (those of the other
precisions do not).  In int4 a block of weights of one output channel shares a scale, and so does a
block of inputs at accuracy_level 4.

A layer here is a node of the graph with weights of its own, named after the module that they come
from: encoder.encoders.0.layers.0.feed_forward1.in_proj.  What is lost depends on the checkpoint and
on the tier: it is measured by decoding each export.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from icetransfer.config import Export
from icetransfer.onnx.graph import replace_nodes, shorten_names
from icetransfer.stage import atomic
from icetransfer.streaming.exported import PARTS, Exported

WORTH_STORING = 32  # numbers of a tensor, below which a node that widens it costs more
FP16_LIMIT = float(np.finfo(np.float16).max)

Weight = NDArray[np.float32]
Stored = tuple[list[TensorProto], list[NodeProto]]


def layer_names(graph: GraphProto) -> list[str]:
    """The products and convolutions that have weights, in the order in which they run."""
    return [n.name for n in graph.node if n.name and n.op_type in ("MatMul", "Conv")]


def quantize_encoder(
    model: ModelProto, precision: str, settings: Export, layers: Set[str]
) -> ModelProto:
    """An encoder whose weights are smaller.

    Args:
        model: the fp32 encoder.
        precision: "fp16", "int8" or "int4".
        settings: how.
        layers: those that get this precision.  Of the others, fp16 and int8 leave the weights as
            they are, and int4 makes them what `settings.int4.rest` says.

    Returns:
        A new model; `model` is not changed.

    Raises:
        ValueError: another precision.
    """
    made = ModelProto()
    made.CopyFrom(model)
    products = {n.name for n in made.graph.node if n.name and n.op_type == "MatMul"}
    if precision == "fp16":
        _store_fp16(made.graph, layers)
    elif precision == "int8":
        made = _integer_products(made, layers & products, settings.int8.per_channel)
    elif precision == "int4":
        _block_products(made, layers & products, settings)
        if settings.int4.rest == "int8":
            made = _integer_products(made, products - layers, settings.int8.per_channel)
    else:
        raise ValueError(f"unknown precision {precision!r}; expected fp16, int8 or int4")
    if precision != "fp16" and settings.convolutions == "int8":
        _store_convolutions(made.graph, layers)
    return _as_declared(made, model)


def _quantize_head(model: ModelProto, precision: str, settings: Export) -> ModelProto:
    """The joiner or the decoder: smaller where that is int8's or fp16's to do."""
    made = ModelProto()
    made.CopyFrom(model)
    if precision == "fp16":
        _store_fp16(made.graph, {*layer_names(made.graph)})
    elif precision == "int8" or settings.int4.rest == "int8":
        made = _integer_products(made, None, settings.int8.per_channel)
    return _as_declared(made, model)


def quantize_export(
    exported: Exported, precision: str, settings: Export, kept: Set[str] = frozenset()
) -> None:
    """Adds the files of a precision to an export that has the fp32 ones.

    Args:
        exported: the files.
        precision: "fp16", "int8" or "int4".
        settings: how they are made.
        kept: layers of the encoder that are left in the next higher precision.

    Raises:
        ValueError: another precision, an unknown layer, or the fp32 files are missing.
    """
    exported.check("fp32")
    encoder = onnx.load(str(exported.model("encoder", "fp32")))
    layers = {*layer_names(encoder.graph)}
    if unknown := sorted(kept - layers):
        raise ValueError(f"{exported.dir} has no layer {unknown[0]}; its first is {min(layers)}")
    _save(quantize_encoder(encoder, precision, settings, layers - kept), exported, precision)
    for part in PARTS[1:]:
        source, target = exported.model(part, "fp32"), exported.model(part, precision)
        if part == "decoder" and not settings.int8.decoder:
            same_file(source, target)
        else:
            head = _quantize_head(onnx.load(str(source)), precision, settings)
            with atomic.atomic_path(target) as temporary:
                onnx.save(head, str(temporary))


def _save(encoder: ModelProto, exported: Exported, precision: str) -> None:
    with atomic.atomic_path(exported.model("encoder", precision)) as temporary:
        onnx.save(encoder, str(temporary))


def same_file(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where the file system has them."""
    with atomic.atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _as_declared(made: ModelProto, model: ModelProto) -> ModelProto:
    """With the outputs of the fp32 model, which quantisers declare anew, and short names."""
    del made.graph.output[:]
    made.graph.output.extend(model.graph.output)
    shorten_names(made)
    return made


def _integer_products(model: ModelProto, layers: Set[str] | None, per_channel: bool) -> ModelProto:
    """Products with weights and inputs in 8 bits, by onnxruntime's dynamic quantisation.

    `layers` are those of an encoder to quantise; None: all of the model's.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if layers is not None and not layers:
        return model
    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = Path(folder) / "int8.onnx"
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul"],  # and Gemm, which it takes apart first
            nodes_to_quantize=sorted(layers) if layers else None,
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(str(target))


def _block_products(model: ModelProto, layers: Set[str], settings: Export) -> None:
    """Products with weights in 4 bits, as onnxruntime's MatMulNBits; changes `model`."""
    names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    with _quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        nbits.logger.setLevel(logging.ERROR)
        nbits.MatMulNBitsQuantizer(
            model,
            block_size=settings.int4.block_size,
            is_symmetric=settings.int4.symmetric,
            accuracy_level=settings.int4.accuracy_level,
            nodes_to_exclude=[name for name in names if name not in layers],
        ).process()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hushes advice that does not apply and a line for each node, and the handler for them."""
    root = logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _store_convolutions(graph: GraphProto, layers: Set[str]) -> None:
    """Convolutions' weights in 8 bits, a scale for each output channel."""
    weights = {n.input[1] for n in graph.node if n.op_type == "Conv" and n.name in layers}

    def store(name: str, weight: Weight) -> Stored:
        largest = np.abs(weight).max(axis=(*range(1, weight.ndim),), keepdims=True)
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        tensors = [
            numpy_helper.from_array(np.round(weight / scale).astype(np.int8), f"{name}_int8"),
            numpy_helper.from_array(scale, f"{name}_scale"),
        ]
        # not a DequantizeLinear, which onnxruntime would compute in every call
        nodes = [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [name]),
        ]
        return tensors, nodes

    _store(graph, weights, store)


def _store_fp16(graph: GraphProto, layers: Set[str]) -> None:
    """The weights and biases of layers in 16 bits."""
    others = {
        name
        for node in graph.node
        if node.name and node.name not in layers and node.op_type in ("MatMul", "Conv")
        for name in node.input
    }

    def store(name: str, weight: Weight) -> Stored:
        half = numpy_helper.from_array(weight.astype(np.float16), f"{name}_fp16")
        return [half], [helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT)]

    _store(graph, {tensor.name for tensor in graph.initializer} - others, store)


def _store(graph: GraphProto, names: Set[str], store: Callable[[str, Weight], Stored]) -> None:
    """Replaces constants by smaller ones and nodes that widen them when the graph is loaded."""
    added: list[TensorProto] = []
    nodes: list[NodeProto] = []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        small = tensor.data_type != TensorProto.FLOAT or value.size < WORTH_STORING
        if small or tensor.name not in names or np.abs(value).max() > FP16_LIMIT:
            continue
        (stored, *more), widening = store(tensor.name, value)
        tensor.CopyFrom(stored)
        added += more
        nodes += widening
    graph.initializer.extend(added)
    replace_nodes(graph, [*nodes, *graph.node])
