"""What is clever for GPUs: kernels in Triton, and when they are taken.

Each kernel has a plain form in torch that any device can take; tests hold the numbers of both
together, on a GPU or in Triton's interpreter.  There are two reasons for them.  cuDNN plans each
grouped convolution again for each shape, 30 ms and more, and batches of speech hardly ever have the
same shape twice.  And most of what a model of this size does is bound by memory and by launches:
one pass in the place of eight.

Lengths and batch sizes are never part of what a kernel is compiled for, so a new shape costs
nothing.  Half precision is computed in float32 inside.  `layer.py` puts the kernels of `kernels/`
together to the layers of `zipformer.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # older cards have too little shared memory for the largest tiles
DRIVER = Path("/proc/driver/nvidia/version")


def takes_kernels(x: Tensor) -> bool:
    """Whether kernels compute on `x`: on a GPU that can, where Triton is, and not in float64."""
    return x.is_cuda and x.dtype in DTYPES and HAS_TRITON and _is_able(x.device)


@functools.cache
def _is_able(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def prepare() -> str | None:
    """Sets torch up for training on what is here.

    Returns:
        What makes it slower than it could be, and what to do about it; None for nothing.
    """
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if torch.version.cuda is None or hidden or not DRIVER.is_file():
            return None
        return (
            f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it, so training "
            f"runs on the CPU: install a driver for CUDA {torch.version.cuda} or newer (nvidia-smi "
            f"shows which CUDA this one is for), or a torch built for an older CUDA; to train on "
            f"the CPU on purpose, set CUDA_VISIBLE_DEVICES="
        )
    able = _is_able(torch.device("cuda", torch.cuda.current_device()))
    if HAS_TRITON and able:
        return None
    # cuDNN plans a grouped convolution for each new shape, which takes longer than to compute it.
    torch.backends.cudnn.enabled = False
    if able:
        return "Triton is not installed, so training is several times slower: pip install triton"
    name, least = torch.cuda.get_device_name(), ".".join(map(str, LEAST_CAPABILITY))
    return (
        f"{name} is older than what the kernels are for (compute capability {least}), so training "
        f"is several times slower; try train.precision=fp16"
    )


def kernels(name: str) -> Any:
    """A module that has to do with kernels, which cannot be imported where Triton is not.

    Args:
        name: such as `model.kernels.front_end`.
    """
    return importlib.import_module(f"icetransfer.{name}")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Runs a kernel; on fake tensors, which have shapes but no memory, nothing is run."""
    if not isinstance(args[0], FakeTensor):
        kernel[grid](*args, **settings)


def working_type(x: Tensor) -> torch.dtype:
    """The type of matrix products of `x`: autocast's, where it is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# Of each parameter that was asked for, its version when it was copied, and the copy.
_halves = WeakTensorKeyDictionary()


def half(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in the type of matrix products; a parameter is copied once, until it changes.

    Autocast's own copies last for one forward pass, and cost a launch each, and as many backwards.
    """
    if weight.dtype == dtype:
        return weight.detach()
    if not isinstance(weight, nn.Parameter):
        return weight.detach().to(dtype)
    version, copy = _halves.get(weight, (None, None))
    if version == weight._version and copy.dtype == dtype:
        return copy
    with torch.inference_mode(False), torch.no_grad():
        copy = weight.detach().to(dtype)
    _halves[weight] = (weight._version, copy)
    return copy


def refresh_halves() -> None:
    """Copies anew, in a few launches, all parameters that have changed since they were copied."""
    stale = [(w, copy) for w, (version, copy) in _halves.items() if version != w._version]
    if not stale:
        return
    with torch.no_grad():
        torch._foreach_copy_([copy for _, copy in stale], [w.detach() for w, _ in stale])
    for weight, copy in stale:
        _halves[weight] = (weight._version, copy)
