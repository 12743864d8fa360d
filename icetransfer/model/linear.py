"""Linear maps, at the speed of the machine.

Shapes: I input features, O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icetransfer.model import cpu, gpu


class Linear(nn.Linear):
    """torch's Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., I) to (..., O)."""
        return linear(x, self.weight, self.bias)


def scaled_linear(in_features: int, out_features: int, scale: float, bias: bool = True) -> Linear:
    """A Linear whose initial weight is `scale` times torch's own, with a small initial bias."""
    layer = Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(scale)
        if bias:
            layer.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return layer


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Maps `x` (..., I) with `weight` (O, I) and `bias` (O,) to (..., O)."""
    if cpu.is_plain_float32(x) and cpu.pays(x.numel() // x.size(-1), weight):
        return cpu.linear(x, weight, bias)
    if gpu.takes_kernels(x) and torch.is_autocast_enabled(x.device.type):
        return gpu.kernels("model.layer").linear(x, weight, bias)
    return F.linear(x, weight, bias)
