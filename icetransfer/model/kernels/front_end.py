"""Kernels of the front end: the swoosh, BiasNorm, and the depthwise convolution of images.

Shapes: N batch, T frames, F bins, C channels, K convolution kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from icetransfer.model.gpu import launch
from icetransfer.model.kernels.common import (
    PROGRAMS,
    cdiv,
    channel_block,
    counters,
    is_last,
    next_power_of_2,
    rows_from,
    scratch,
    split,
    swoosh_of,
    swoosh_slope,
    total_of,
    total_of_tiles,
    whole_rows,
)

BLOCK = 1024  # values of an elementwise program


@triton.jit(do_not_specialize=["size"])
def _swoosh_kernel(
    x_ptr, out_ptr, size, SHIFT: tl.constexpr, OFFSET: tl.constexpr, B: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, swoosh_of(x, SHIFT, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _swoosh_grad_kernel(x_ptr, grad_ptr, out_ptr, size, SHIFT: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, grad * swoosh_slope(x, SHIFT), mask=inside)


def swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    """Swoosh of `x`, of any shape; keeps `x` and computes the derivative from it."""
    return _Swoosh.apply(x, shift, offset)


class _Swoosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        x = _dense(x)
        ctx.save_for_backward(x)
        ctx.shift = shift
        out = torch.empty_like(x)
        size = x.numel()
        launch(_swoosh_kernel, (cdiv(size, BLOCK),), x, out, size, shift, offset, BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        out, size = torch.empty_like(x), x.numel()
        grid = (cdiv(size, BLOCK),)
        launch(_swoosh_grad_kernel, grid, x, grad, out, size, ctx.shift, BLOCK)
        return out, None, None


def _dense(x: Tensor) -> Tensor:
    """`x` without holes in memory, channels-last images as they are."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


@triton.jit(do_not_specialize=["rows"])
def _bias_norm_kernel(
    x_ptr, bias_ptr, log_scale_ptr, out_ptr, scale_ptr, rows, C, BR: tl.constexpr, B: tl.constexpr
):
    channel = tl.arange(0, B)
    row, inside, at = rows_from(tl.program_id(0) * BR, rows, channel, C, BR)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - bias[None, :], 0.0)
    mean_square = tl.sum(centred * centred, axis=1) / C
    scale = tl.exp(tl.load(log_scale_ptr).to(tl.float32)) / tl.sqrt(mean_square)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(out_ptr + at, x * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def _bias_norm_grad_kernel(
    x_ptr, bias_ptr, log_scale_ptr, scale_ptr, grad_ptr, out_ptr, parts_ptr, counter_ptr, sums_ptr,
    rows, each, C, BR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    channel = tl.arange(0, B)
    there = channel < C
    bias = tl.load(bias_ptr + channel, mask=there, other=0.0).to(tl.float32)
    factor = tl.exp(-2.0 * tl.load(log_scale_ptr).to(tl.float32)) / C
    of_bias = tl.zeros([B], tl.float32)
    of_log_scale = tl.zeros([BR], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row, inside, at = rows_from(first, last, channel, C, BR)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < last, other=0.0)
        dot = tl.sum(grad * x, axis=1)
        # With r = RMS(x - b) and s = exp(l) / r: ds/d(x - b) = -s^3 exp(-2 l) (x - b) / C.
        pull = -dot * scale * scale * scale * factor
        through_norm = tl.where(inside, (x - bias[None, :]) * pull[:, None], 0.0)
        tl.store(out_ptr + at, through_norm + grad * scale[:, None], mask=inside)
        of_bias -= tl.sum(through_norm, axis=0)
        of_log_scale += dot * scale
    own = parts_ptr + part * (C + 1)
    tl.store(own + channel, of_bias, mask=there)
    tl.store(own + C, tl.sum(of_log_scale, axis=0))
    parts = tl.num_programs(0)
    if is_last(counter_ptr, parts):
        total = total_of(parts_ptr, parts, C + 1, channel, there, B)
        tl.store(sums_ptr + channel, total, mask=there)
        one = tl.arange(0, 16)
        total = tl.sum(total_of(parts_ptr + C, parts, C + 1, one, one < 1, 16), axis=0)
        tl.store(sums_ptr + C, total)


def bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
    """BiasNorm of `x` (..., C) with bias (C,) and a log scale ()."""
    return _BiasNorm.apply(x, bias, log_scale)


class _BiasNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        x = x.contiguous()
        channels = x.size(-1)
        rows = x.numel() // channels
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, bias.dtype))
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        block, together = whole_rows(channels)
        grid = (cdiv(rows, together),)
        launch(
            _bias_norm_kernel, grid, x, bias, log_scale, out, scale, rows, channels, together, block
        )
        ctx.save_for_backward(x, bias, log_scale, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias, log_scale, scale = ctx.saved_tensors
        grad, out, channels = grad.contiguous(), torch.empty_like(x), x.size(-1)
        rows = x.numel() // channels
        block, together = whole_rows(channels)
        programs, each = split(rows, PROGRAMS // 4, together)
        sums = torch.empty(channels + 1, dtype=torch.float32, device=x.device)
        launch(
            _bias_norm_grad_kernel, (programs,), x, bias, log_scale, scale, grad, out,
            scratch(programs * len(sums), x.device), counters(x.device), sums, rows, each, channels,
            BR=together, B=block,
        )  # fmt: skip
        of_bias, of_log_scale = sums.split((channels, 1))
        return out, of_bias.to(bias.dtype), of_log_scale.view(()).to(log_scale.dtype)


@triton.jit(do_not_specialize=["T", "rows"])
def _conv2d_kernel(
    x_ptr, weight_ptr, out_ptr, T, F, rows, C,
    K: tl.constexpr, FLIP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    inside = (row < rows)[:, None] & has_channel[None, :]
    f = row % F
    t = row // F % T
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    total = tl.zeros([BM, BC], tl.float32)
    for k in range(K * K):  # not unrolled, which takes seconds to compile
        dt = k // K - K // 2
        df = k % K - K // 2
        there = (t + dt >= 0) & (t + dt < T) & (f + df >= 0) & (f + df < F)
        x = tl.load(x_ptr + at + (dt * F + df) * C, mask=there[:, None] & inside, other=0.0)
        weight = tl.load(
            weight_ptr + channel * (K * K) + (K * K - 1 - k if FLIP else k),
            mask=has_channel,
            other=0.0,
        )
        total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    tl.store(out_ptr + at, total, mask=inside)


@triton.jit(do_not_specialize=["T", "lines", "each"])
def _conv2d_weight_grad_kernel(
    x_ptr, grad_ptr, parts_ptr, counter_ptr, out_ptr, T, F, lines, each, C,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Place by place, all taps at once; a line has the bins of one frame."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    k = tl.arange(0, BK)
    dt = k // K - K // 2
    df = k % K - K // 2
    is_tap = (k < K * K)[:, None] & has_channel[None, :]
    total = tl.zeros([BK, BC], tl.float32)
    for line in range(part * each, tl.minimum((part + 1) * each, lines)):
        t = line % T + dt
        in_time = ((t >= 0) & (t < T))[:, None] & is_tap
        start = tl.cast(line, tl.int64) * F * C
        shift = (dt * F + df)[:, None] * C + channel[None, :]
        for f in range(F):
            mask = ((f + df >= 0) & (f + df < F))[:, None] & in_time
            x = tl.load(x_ptr + start + f * C + shift, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + start + f * C + channel, mask=has_channel, other=0.0)
            total += x * grad.to(tl.float32)[None, :]
    size = K * K * C
    place = channel[None, :] * (K * K) + k[:, None]
    tl.store(parts_ptr + part.to(tl.int64) * size + place, total, mask=is_tap)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        tl.store(
            out_ptr + place, total_of_tiles(parts_ptr, parts, size, place, is_tap), mask=is_tap
        )


def depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of an image with zeros around it, without a bias.

    Args:
        x: (N, C, T, F), channels-last in memory.
        weight: (C, 1, K, K), K odd.

    Returns:
        (N, C, T, F), channels-last in memory.
    """
    return _DepthwiseConv2d.apply(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Takes (N, T, F, C) and gives the same."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return _conv2d(x, weight, flip=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        kernel, (batch, time, bins, channels) = weight.size(2), x.shape
        lines, block = batch * time, min(16, next_power_of_2(channels))
        blocks = cdiv(channels, block)
        each = cdiv(lines, max(1, min(lines, PROGRAMS // blocks)))
        programs = cdiv(lines, each)
        of_weight = torch.empty_like(weight)
        launch(
            _conv2d_weight_grad_kernel, (programs, blocks), x, grad,
            scratch(programs * weight.numel(), x.device), counters(x.device), of_weight, time, bins,
            lines, each, channels, K=kernel, BK=next_power_of_2(kernel * kernel), BC=block,
        )  # fmt: skip
        return _conv2d(grad, weight, flip=True), of_weight


def _conv2d(x: Tensor, weight: Tensor, flip: bool) -> Tensor:
    _, time, bins, channels = x.shape
    rows, block = x.numel() // channels, channel_block(channels)
    out = torch.empty_like(x)
    grid = (cdiv(rows, 32), cdiv(channels, block))
    launch(
        _conv2d_kernel, grid, x, weight, out, time, bins, rows, channels,
        K=weight.size(2), FLIP=flip, BM=32, BC=block,
    )  # fmt: skip
    return out
