"""Kernels between the matrix products of a layer: activations, dropout and gates.

Shapes: N batch, T frames, C channels, E channels of the non-linear attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from icetransfer.model.gpu import launch
from icetransfer.model.kernels.common import (
    Sight,
    finish,
    rows_from,
    shares,
    swoosh_of,
    swoosh_slope,
    tile,
    tiles,
    uniform,
)


@triton.jit(do_not_specialize=["rows", "T", "seed", "rate"])
def _swoosh_dropout_kernel(
    x_ptr, out_ptr, rows, T, C, seed, rate, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, column, inside, at = tile(rows, C, BR, BC)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    drawn = uniform(seed, (row // T)[:, None] * C + column[None, :])
    kept = tl.where(drawn >= rate, 1.0 / (1.0 - rate), 0.0)
    tl.store(out_ptr + at, swoosh_of(x, SHIFT, OFFSET) * kept, mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "seed", "rate"])
def _swoosh_dropout_grad_kernel(
    x_ptr, grad_ptr, out_ptr, of_x_ptr, parts_ptr, counter_ptr, sums_ptr, rows, each, T, C, seed,
    rate, SHIFT: tl.constexpr, OFFSET: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row, inside, at = rows_from(first, last, column, C, BR)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        drawn = uniform(seed, (row // T)[:, None] * C + column[None, :])
        kept = tl.where(drawn >= rate, 1.0 / (1.0 - rate), 0.0)
        tl.store(out_ptr + at, swoosh_of(x, SHIFT, OFFSET) * kept, mask=inside)
        of_x = grad * kept * swoosh_slope(x, SHIFT)
        tl.store(of_x_ptr + at, of_x, mask=inside)
        sums += tl.sum(tl.where(inside, of_x, 0.0), axis=0)
    finish(sums, parts_ptr, counter_ptr, sums_ptr, column, there, C, BC)


def swoosh_dropout(
    x: Tensor, form: tuple[float, float], rate: float = 0.0, seed: int = 0
) -> Tensor:
    """Swoosh of (N, T, C), then whole channels of a sequence dropped with probability `rate`."""
    _, time, channels = x.shape
    out, rows = torch.empty_like(x), x.numel() // channels
    grid, settings = tiles(rows, channels)
    launch(
        _swoosh_dropout_kernel, grid, x, out, rows, time, channels, seed, rate, *form, **settings
    )
    return out


def swoosh_dropout_grad(
    x: Tensor, grad: Tensor, form: tuple[float, float], rate: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of `swoosh_dropout` once more, the gradient of `x` and its sums (C,)."""
    _, time, channels = x.shape
    rows = x.numel() // channels
    share = shares(x, rows, channels)
    out, of_x = torch.empty_like(x), torch.empty_like(x)
    launch(
        _swoosh_dropout_grad_kernel, share.grid, x, grad, out, of_x, share.parts, share.counters,
        share.sums, rows, share.each, time, channels, seed, rate, *form, **share.tile,
    )  # fmt: skip
    return out, of_x, share.sums[0]


@triton.jit(do_not_specialize=["rows", "T", "step"])
def _glu_kernel(x_ptr, lengths_ptr, out_ptr, rows, T, C, step, BR: tl.constexpr, BC: tl.constexpr):
    row, column, inside, at = tile(rows, C, BR, BC)
    value_at = row.to(tl.int64)[:, None] * 2 * C + column[None, :]
    value = tl.load(x_ptr + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + value_at + C, mask=inside, other=0.0).to(tl.float32)
    there = row % T * step < tl.load(lengths_ptr + row // T, mask=row < rows, other=0)
    out = tl.where(there[:, None], value / (1.0 + tl.exp(-gate)), 0.0)
    tl.store(out_ptr + at, out, mask=inside)


def glu(x: Tensor, sight: Sight) -> Tensor:
    """First half of the channels of (N, T, 2C) times the sigmoid of the second; 0 past the end."""
    batch, time, width = x.shape
    out = x.new_empty(batch, time, width // 2)
    grid, settings = tiles(batch * time, width // 2)
    launch(
        _glu_kernel, grid, x, sight.lengths, out, batch * time, time, width // 2, sight.step,
        **settings,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _tanh_gate_kernel(x_ptr, out_ptr, rows, E, BR: tl.constexpr, BC: tl.constexpr):
    row, column, inside, at = tile(rows, E, BR, BC)
    own = row.to(tl.int64)[:, None] * 3 * E + column[None, :]
    inner = tl.load(x_ptr + own, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + own + E, mask=inside, other=0.0).to(tl.float32)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    tl.store(out_ptr + at, value * tanh, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _outer_gate_grad_kernel(
    x_ptr, out_ptr, grad_ptr, of_out_ptr, of_x_ptr, gated_ptr, rows, E,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, column, inside, at = tile(rows, E, BR, BC)
    own = row.to(tl.int64)[:, None] * 3 * E + column[None, :] + 2 * E
    gate = tl.load(x_ptr + own, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_out_ptr + at, grad * gate, mask=inside)
    tl.store(of_x_ptr + own, grad * out, mask=inside)
    tl.store(gated_ptr + at, out * gate, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _tanh_gate_grad_kernel(x_ptr, grad_ptr, of_x_ptr, rows, E, BR: tl.constexpr, BC: tl.constexpr):
    row, column, inside, at = tile(rows, E, BR, BC)
    own = row.to(tl.int64)[:, None] * 3 * E + column[None, :]
    inner = tl.load(x_ptr + own, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + own + E, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    tl.store(of_x_ptr + own, grad * value * (1.0 - tanh * tanh), mask=inside)
    tl.store(of_x_ptr + own + E, grad * tanh, mask=inside)


def tanh_gate(x: Tensor) -> Tensor:
    """The second third of (N, T, 3E) times tanh of the first."""
    batch, time, width = x.shape
    out = x.new_empty(batch, time, width // 3)
    grid, settings = tiles(batch * time, width // 3)
    launch(_tanh_gate_kernel, grid, x, out, batch * time, width // 3, **settings)
    return out


def outer_gate_grad(x: Tensor, out: Tensor, grad: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
    """Back through out * gate, the gate being the last third of `x` (N, T, 3E).

    `grad` is that of the product (N, T, E); `of_x` (N, T, 3E) takes the gate's.

    Returns:
        The gradient of `out`, and the product once more.
    """
    of_out, gated, width = torch.empty_like(out), torch.empty_like(out), out.size(2)
    rows = out.numel() // width
    grid, settings = tiles(rows, width)
    launch(
        _outer_gate_grad_kernel, grid, x, out, grad, of_out, of_x, gated, rows, width, **settings
    )
    return of_out, gated


def tanh_gate_grad(x: Tensor, grad: Tensor, of_x: Tensor) -> None:
    """Back through `tanh_gate`: fills the first two thirds of `of_x`."""
    width = grad.size(2)
    rows = grad.numel() // width
    grid, settings = tiles(rows, width)
    launch(_tanh_gate_grad_kernel, grid, x, grad, of_x, rows, width, **settings)
