"""What tests of Triton kernels share: where they run, poisoned memory, gradients."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from icetransfer.model.gpu import HAS_TRITON

# Without a GPU, kernels run on the CPU in Triton's interpreter (tests/conftest.py sets it).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernels_of(module: str) -> ModuleType:
    """The module of kernels; skips the tests of the file where they cannot run."""
    if not HAS_TRITON:
        pytest.skip(
            "Triton is not installed: it comes with torch for CUDA", allow_module_level=True
        )
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.import_module(module)


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger shares and smaller tiles, for the interpreter takes a millisecond for each program."""
    if DEVICE.type != "cpu":
        return
    for name in ("attention", "common", "convolution", "front_end", "stream"):
        module = importlib.import_module(f"icetransfer.model.kernels.{name}")
        for setting, value in (("PROGRAMS", 6), ("TILE", 16), ("TILE_VALUES", 256)):
            if hasattr(module, setting):
                monkeypatch.setattr(module, setting, value)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch fills with NaN what it allocates, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, Sequence[Tensor]]:
    """What a function gives, and its gradients from one that is random but always the same.

    Args:
        function: of the inputs.
        inputs: that require gradients.
        dtype: in which to compute, if not in that of the inputs.
    """
    if dtype is not None:
        inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16)
    return out, torch.autograd.grad(out, inputs, grad.to(out.dtype))
