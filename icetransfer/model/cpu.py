"""What is clever for CPUs: products by oneDNN, and activations in blocks that stay in the cache.

Each has a plain form that any device can take, in `linear.py`, `swoosh.py` and `subsampling.py`;
tests hold the numbers of both together.

torch multiplies float32 matrices with MKL, which on processors of other makers than its own runs at
half their speed; oneDNN, which torch also brings and uses for convolutions, runs at full speed on
all of them. But it compiles code for each new shape, 0.3 to 3 ms, and batches of speech hardly ever
have the same length: so it multiplies blocks of one height, and MKL the rest.

Shapes: M rows, I input features, O output features, D hidden features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from icetransfer.model.exporting import is_exporting
from icetransfer.model.swoosh import SWOOSH_L, SWOOSH_MAX, SWOOSH_SLOPE

if TYPE_CHECKING:
    from icetransfer.model.scaling import Balancer

BLOCK_ROWS = 256  # rows of a product that oneDNN does at a time, for each core
LEAST_WEIGHTS = 2**13  # weights that pay for its calls
BLOCK = 262144  # values (1 MB) of `wide_swoosh`'s hidden layer for each core at a time
SWOOSH_BLOCK = 131072  # values (512 KB) that a core's cache holds with their results
ONEDNN: Callable[..., Tensor] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def is_plain_float32(x: Tensor) -> bool:
    """Whether `x` lies on the CPU and is computed with as it is."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not is_exporting()
        and not torch.is_autocast_enabled("cpu")
    )


def _block_rows() -> int:
    return BLOCK_ROWS * torch.get_num_threads()


def pays(rows: int, weight: Tensor) -> bool:
    """Whether oneDNN is there and has a block to multiply with enough weights."""
    return ONEDNN is not None and rows >= _block_rows() and weight.numel() >= LEAST_WEIGHTS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplys (M, I) with the transpose of (O, I)."""
    if not pays(x.size(0), weight):
        return F.linear(x, weight, bias)
    out = x.new_empty(x.size(0), weight.size(0))
    step = _block_rows()
    for rows, out_rows in zip(x.split(step), out.split(step), strict=True):
        if rows.size(0) == step:
            out_rows.copy_(ONEDNN(rows, weight, bias, "none", [], ""))
        else:
            out_rows.copy_(F.linear(rows, weight, bias))
    return out


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Multiplys the transpose of (M, O) with (M, I), block by block of M."""
    step = _block_rows()
    if ONEDNN is None or x.size(0) < step or grad.size(1) * x.size(1) < LEAST_WEIGHTS:
        return grad.t() @ x
    wider, narrower = (grad, x) if grad.size(1) > x.size(1) else (x, grad)
    total = x.new_zeros(narrower.size(1), wider.size(1))
    for left, right in zip(narrower.split(step), wider.split(step), strict=True):
        if left.size(0) == step:  # oneDNN wants the wider one as its weight
            total += ONEDNN(left.t(), right.t(), None, "none", [], "")
        else:
            total.addmm_(left.t(), right)
    return total.t() if wider is grad else total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Maps `x` (..., I) to (..., O) by oneDNN, where that `pays`."""
    rows = x.reshape(-1, x.size(-1))
    if torch.is_grad_enabled():
        out = _Linear.apply(rows, weight, bias)
    else:
        out = _product(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.size(0))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            _product(grad, weight.t()) if of_x else None,
            _weight_gradient(grad, x) if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


def swoosh_and_slope(
    x: Tensor, shift: float, offset: float, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """`swoosh.swoosh_and_slope`, in few passes over blocks that stay in the cache."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    x = x if channels_last else x.contiguous()
    flat = _flat(x)
    out = torch.empty_like(x)
    slope = torch.empty_like(x) if with_slope else out
    block = max(1, min(SWOOSH_BLOCK * torch.get_num_threads(), flat.numel()))
    scratch = [flat.new_empty(block), flat.new_empty(0 if with_slope else block)]
    k = math.exp(-offset)
    one = torch.tensor(k, dtype=x.dtype)
    high_slope = torch.full_like(one, 1.0 - SWOOSH_SLOPE)
    for x_part, out_part, slope_part in zip(
        flat.split(block), _flat(out).split(block), _flat(slope).split(block), strict=True
    ):
        size = x_part.numel()
        low, e = scratch[0][:size], slope_part if with_slope else scratch[1][:size]
        torch.clamp_max(x_part, SWOOSH_MAX, out=low)
        torch.exp(low, out=e)
        torch.add(one, e, alpha=k * math.exp(-shift), out=e)
        torch.log(e, out=out_part)
        out_part.add_(x_part, alpha=1.0 - SWOOSH_SLOPE).sub_(low)
        if with_slope:
            torch.sub(high_slope, e.reciprocal_(), alpha=k, out=e)
    return out, slope


def _flat(x: Tensor) -> Tensor:
    """Views dense `x` as one row in memory order."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(-1)


def wide_swoosh(
    x: Tensor, first: nn.Conv2d, bias: Tensor, balancer: Balancer | None, second: nn.Conv2d
) -> Tensor:
    """second(SwooshL(balancer(first(x)))) on a CPU, without a tensor of the hidden size.

    Goes block by block, so that the hidden values stay in the cache, and computes them once more
    in the backward pass.

    Args:
        x: (..., I).
        first: with weight (D, I, 1, 1).
        bias: (D,), in place of the first's own.
        balancer: of the hidden values, when it acts.
        second: with weight (O, D, 1, 1).

    Returns:
        (..., O).
    """
    rows = x.reshape(-1, x.size(-1))
    weights = (first.weight.flatten(1), bias, second.weight.flatten(1), second.bias)
    return _WideSwoosh.apply(rows, *weights, balancer).view(*x.shape[:-1], second.out_channels)


def _blocks(hidden: int, *matrices: Tensor) -> Any:
    """Cuts matrices of as many rows into blocks of which the hidden ones fit into the cache."""
    step = _block_rows()
    rows = max(1, BLOCK * torch.get_num_threads() // hidden // step) * step
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


class _WideSwoosh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        balancer: Balancer | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        ctx.balancer = balancer
        out = x.new_empty(x.size(0), weight2.size(0))
        for rows, out_rows in _blocks(weight1.size(0), x, out):
            hidden = _product(rows, weight1, bias1)
            hidden, _ = swoosh_and_slope(hidden, *SWOOSH_L, with_slope=False)
            out_rows.copy_(_product(hidden, weight2, bias2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors

        def hidden_and_gradient(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The hidden values before and after the activation, and the gradient of the former."""
            before = _product(rows, weight1, bias1)
            after, slope = swoosh_and_slope(before, *SWOOSH_L, with_slope=True)
            return before, after, slope.mul_(_product(grad, weight2.t()))

        grad = grad.contiguous()
        pushes = None
        if ctx.balancer is not None:
            before, _, of_hidden = hidden_and_gradient(*map(ctx.balancer.sample, (x, grad)))
            pushes = ctx.balancer.pushes(before, of_hidden)
        of_x = torch.empty_like(x)
        of_weight1, of_bias1, of_weight2 = map(torch.zeros_like, (weight1, bias1, weight2))
        for rows, grad_rows, of_rows in _blocks(weight1.size(0), x, grad, of_x):
            before, after, of_hidden = hidden_and_gradient(rows, grad_rows)
            of_weight2 += _weight_gradient(grad_rows, after)
            if pushes is not None:
                of_hidden = ctx.balancer.push(before, of_hidden, *pushes)
            of_weight1 += _weight_gradient(of_hidden, rows)
            of_bias1 += of_hidden.sum(dim=0)
            of_rows.copy_(_product(of_hidden, weight1.t()))
        return of_x, of_weight1, of_bias1, of_weight2, grad.sum(dim=0), None
