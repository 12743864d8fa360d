"""The Swoosh activations (arXiv:2310.11230, eq. 4 and 5) and their derivatives, in plain form."""

import math

import torch
from torch import Tensor

SWOOSH_SLOPE = 0.08
SWOOSH_R = (1.0, 0.313261687)  # shift and offset: SwooshR(0) = 0
SWOOSH_L = (4.0, 0.035)
SWOOSH_MAX = 80.0  # exp() of this is still a float32


def swoosh_to_export(x: Tensor, shift: float, offset: float) -> Tensor:
    """Swoosh in the fewest steps of a graph; the first is a difference that a bias takes up.

    With a = (offset + 0.08 shift) / 0.92 and u = x - shift - a, Swoosh is
    log(exp(-a) + exp(u)) - 0.08 u.  exp(u) is kept from overflowing as in `swoosh_and_slope`.
    """
    a = (offset + SWOOSH_SLOPE * shift) / (1.0 - SWOOSH_SLOPE)
    u = x - (shift + a)
    low = u.clamp_max(SWOOSH_MAX)
    return torch.log(torch.exp(low) + math.exp(-a)) + (u * (1.0 - SWOOSH_SLOPE) - low)


def swoosh_and_slope(
    x: Tensor, shift: float, offset: float, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """Swoosh of `x` and its derivative (only where asked for, else the value again).

    One exponential, e = exp(x), gives both: with k = exp(-offset), log(k + k exp(-shift) e) is
    softplus(x - shift) - offset, and the reciprocal of the argument gives the derivative. Where
    exp(x) would overflow, softplus is linear; the part of x above the limit is added back as it is.
    The error is that of a few roundings of x, below what softplus itself costs three times as much
    to avoid. Half precision is computed in float32, which exp(80) needs.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    k = math.exp(-offset)
    low = wide.clamp_max(SWOOSH_MAX)
    argument = torch.exp(low).mul_(k * math.exp(-shift)).add_(k)
    out = argument.log().add_(wide, alpha=1.0 - SWOOSH_SLOPE).sub_(low).to(x.dtype)
    if not with_slope:
        return out, out
    slope = argument.reciprocal_().mul_(-k).add_(1.0 - SWOOSH_SLOPE)
    return out, slope.to(x.dtype)
