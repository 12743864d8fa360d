"""Kernels of balancers and whiteners.

Shapes: N batch, T frames, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from icetransfer.model.gpu import launch
from icetransfer.model.kernels.common import (
    cdiv,
    column_sums,
    is_last,
    mm32,
    next_power_of_2,
    shares,
    tile,
    tiles,
    total_of,
)


@triton.jit
def _beyond(x, low, high):
    """1 where `x` is below `low`, -1 where it is above `high`, else 0."""
    return tl.where(x < low, 1.0, 0.0) - tl.where(x > high, 1.0, 0.0)


@triton.jit(do_not_specialize=["rows", "each", "every", "least", "most", "small", "large", "share"])
def _balance_kernel(
    x_ptr, grad_ptr, parts_ptr, counter_ptr, push_ptr, rows, each, every, C, X_ROW, GRAD_ROW,
    least, most, small, large, share, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    positive = tl.zeros([BC], tl.float32)
    size = tl.zeros([BC], tl.float32)
    of_grad = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & there[None, :]
        x_at = (row * every).to(tl.int64)[:, None] * X_ROW + column[None, :]
        x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
        grad_at = (row * every).to(tl.int64)[:, None] * GRAD_ROW + column[None, :]
        grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0).to(tl.float32)
        positive += tl.sum(tl.where(x > 0.0, 1.0, 0.0), axis=0)
        size += tl.sum(tl.abs(x), axis=0)
        of_grad += tl.sum(tl.abs(grad), axis=0)
    own = parts_ptr + part * 3 * C + column
    tl.store(own, positive, mask=there)
    tl.store(own + C, size, mask=there)
    tl.store(own + 2 * C, of_grad, mask=there)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        positive = total_of(parts_ptr, parts, 3 * C, column, there, BC) / rows
        size = total_of(parts_ptr + C, parts, 3 * C, column, there, BC) / rows
        push = share * total_of(parts_ptr + 2 * C, parts, 3 * C, column, there, BC) / rows
        tl.store(push_ptr + column, push * _beyond(positive, least, most), mask=there)
        tl.store(push_ptr + C + column, push * _beyond(size, small, large), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _push_kernel(
    x_ptr, grad_ptr, push_ptr, rows, C, X_ROW, GRAD_ROW, BR: tl.constexpr, BC: tl.constexpr
):
    row, column, inside, _ = tile(rows, C, BR, BC)
    row = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * X_ROW + column[None, :], mask=inside, other=0.0).to(tl.float32)
    own = grad_ptr + row * GRAD_ROW + column[None, :]
    grad = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(push_ptr + column, mask=column < C, other=0.0)[None, :]
    grow = tl.load(push_ptr + C + column, mask=column < C, other=0.0)[None, :]
    sign = tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)
    tl.store(own, grad - sign * grow - shift, mask=inside)


def balance(
    x: Tensor, grad: Tensor, limits: tuple[float, float, float, float], share: float, every: int
) -> None:
    """Adds a balancer's pushes for `x` (N, T, C) to `grad`, in place.

    Args:
        x: rows of channels, which may be some of a wider tensor's.
        grad: likewise.
        limits: of the fraction of positive values, and of the mean magnitude.
        share: size of a push, relative to the mean magnitude of the channel's gradient.
        every: the statistics are those of one frame in so many.
    """
    channels = x.size(-1)
    frames = x.numel() // channels
    rows = cdiv(frames, every)
    sums = shares(x, rows, channels, number=3)
    push = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    launch(
        _balance_kernel, sums.grid, x, grad, sums.parts, sums.counters, push, rows, sums.each,
        every, channels, x.stride(-2), grad.stride(-2), *limits, share, **sums.tile,
    )  # fmt: skip
    grid, settings = tiles(frames, channels)
    launch(
        _push_kernel, grid, x, grad, push, frames, channels, x.stride(-2), grad.stride(-2),
        **settings,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _centre_kernel(x_ptr, sums_ptr, out_ptr, rows, C, BR: tl.constexpr, BC: tl.constexpr):
    _, column, inside, at = tile(rows, C, BR, BC)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(sums_ptr + column, mask=column < C, other=0.0) / rows
    tl.store(out_ptr + at, x - mean[None, :], mask=inside)


@triton.jit(do_not_specialize=["limit"])
def _whiten_kernel(cov_ptr, out_ptr, C, limit, BR: tl.constexpr, B: tl.constexpr):
    column = tl.arange(0, B)
    traces = tl.zeros([B], tl.float32)
    squares = tl.zeros([B], tl.float32)
    for first in range(0, C, BR):
        row = first + tl.arange(0, BR)
        inside = (row < C)[:, None] & (column < C)[None, :]
        cov = tl.load(cov_ptr + row[:, None] * C + column[None, :], mask=inside, other=0.0)
        traces += tl.sum(tl.where(row[:, None] == column[None, :], cov, 0.0), axis=0)
        squares += tl.sum(cov * cov, axis=0)
    trace = tl.sum(traces, axis=0) + 1e-20
    square = tl.sum(squares, axis=0)
    centre = square / trace
    factor = tl.where(square * C > limit * trace * trace, 1.0 / trace, 0.0)
    for first in range(0, C, BR):
        row = first + tl.arange(0, BR)
        inside = (row < C)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        cov = tl.load(cov_ptr + at, mask=inside, other=0.0)
        own = cov - tl.where(row[:, None] == column[None, :], centre, 0.0)
        tl.store(out_ptr + at, factor * own, mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def _add_share_kernel(
    grad_ptr, penalty_ptr, grad_squares_ptr, penalty_squares_ptr, out_ptr, rows, C, share,
    B: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    _, _, inside, at = tile(rows, C, BR, BC)
    channel = tl.arange(0, B)
    of_grad = tl.load(grad_squares_ptr + channel, mask=channel < C, other=0.0)
    of_penalty = tl.load(penalty_squares_ptr + channel, mask=channel < C, other=0.0)
    sizes = tl.sqrt(tl.sum(of_grad, axis=0)), tl.sqrt(tl.sum(of_penalty, axis=0))
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    penalty = tl.load(penalty_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, grad + penalty * (share * sizes[0] / (sizes[1] + 1e-20)), mask=inside)


def whiten(x: Tensor, grad: Tensor, limit: float, share: float) -> Tensor:
    """`grad` and the gradient of the whitening measure of `x`, both (N, T, C), if it is too high.

    With S the covariance of the centred X, the measure is C tr(S^2) / tr(S)^2 and its gradient
    along X (S - tr(S^2) / tr(S) I).
    """
    channels = x.size(-1)
    rows = x.reshape(-1, channels).contiguous()
    grid, settings = tiles(len(rows), channels)
    centred = torch.empty_like(rows)
    launch(
        _centre_kernel, grid, rows, column_sums(rows), centred, len(rows), channels,
        **settings,
    )  # fmt: skip
    covariance = mm32(centred.t(), centred)
    matrix = torch.empty(channels, channels, dtype=x.dtype, device=x.device)
    block = next_power_of_2(channels)
    launch(
        _whiten_kernel, (1,), covariance, matrix, channels, limit,
        BR=max(1, min(block, 8192 // block)), B=block,
    )  # fmt: skip
    penalty = centred @ matrix
    grad, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
    launch(
        _add_share_kernel, grid, grad, penalty, column_sums(grad, square=True),
        column_sums(penalty, square=True), out, len(rows), channels, share, B=block, **settings,
    )  # fmt: skip
    return out
