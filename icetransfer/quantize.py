"""int8 weights for an exported model, by onnxruntime's dynamic quantisation.

Weights of matrix products are stored in 8 bits, one scale for each tensor; activations are
quantised on the fly, one scale for all streams of a call, so int8 tokens depend a little on which
streams share a batch (fp32 ones do not).  What is lost depends on the checkpoint and on the tier:
it is measured by decoding each export.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from icetransfer import atomic
from icetransfer.bundle import PARTS, Bundle


def _int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a pre-processing that changes nothing here
    try:
        quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8
        )
    finally:
        root.setLevel(level)
    proto = onnx.load(str(target))
    del proto.graph.output[:]  # declared anew on the way: keep what the fp32 graph declares
    proto.graph.output.extend(onnx.load(str(source)).graph.output)
    onnx.save(proto, str(target))


#: How each precision below fp32 is made of an fp32 graph.
METHODS: dict[str, Callable[[Path, Path], None]] = {"int8": _int8}
#: The decoder is an embedding and a small convolution: quantising it saves next to nothing and is
#: where published int8 models lost most.
KEPT_FP32 = ("decoder",)


def quantize_bundle(bundle: Bundle, precision: str) -> None:
    """Adds the files of a precision to a bundle that has the fp32 ones.

    Raises:
        ValueError: the precision is unknown, or the fp32 files are missing.
    """
    if precision not in METHODS:
        raise ValueError(f"unknown precision {precision!r}; expected fp32 or one of {[*METHODS]}")
    bundle.check("fp32")
    for part in PARTS:
        source, target = bundle.model(part, "fp32"), bundle.model(part, precision)
        if part in KEPT_FP32:
            same_file(source, target)
        else:
            with atomic.atomic_path(target) as temporary:
                METHODS[precision](source, temporary)


def same_file(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where the file system has them."""
    with atomic.atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
