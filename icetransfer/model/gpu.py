"""What is clever for GPUs: kernels in Triton, and when they are taken.

Each kernel has a plain form in torch that any device can take; tests hold the numbers of both
together, on a GPU or in Triton's interpreter.  There are two reasons for them.  cuDNN plans each
grouped convolution anew for each shape, 30 ms and more, and batches of speech hardly ever have the
same shape twice.  And most of what a model of this size does is bound by memory and by launches:
one pass in the place of eight.

Lengths and batch sizes are never part of what a kernel is compiled for (but for the power of two
above a row's length), so a new shape costs nothing.  Half precision is computed in float32 inside.

Shapes: N batch, T frames, C channels, K convolution kernel, H heads, S keys, R relative positions.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_kernels(x: Tensor) -> bool:
    """Whether kernels compute on `x`: on a GPU, where Triton is, and not in float64."""
    return HAS_TRITON and x.is_cuda and x.dtype in DTYPES


def kernels(room: str = "model") -> Any:
    """The module of a room's kernels, which cannot be imported where Triton is not."""
    return importlib.import_module(f"icetransfer.{room}.kernels")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Runs a kernel; on fake tensors, which have shapes but no memory, nothing is run."""
    if not isinstance(args[0], FakeTensor):
        kernel[grid](*args, **settings)
