"""Kernels of the model in Triton, each with the function of torch tensors that runs it.

Imported only where Triton is; see `gpu.takes_kernels`.  What gradients of parameters sum over all
frames is summed by a fixed number of programs, whose parts torch then adds up: the same order, and
so the same result, in each run.

Shapes: N batch, T frames, C channels, K convolution kernel, H heads, S keys, R relative positions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from icetransfer.model.gpu import launch
from icetransfer.model.swoosh import SWOOSH_SLOPE

BLOCK = 1024  # values of an elementwise program
SPLITS = 64  # programs that share the sum over all frames, for each block of channels
SLOPE = tl.constexpr(SWOOSH_SLOPE)


def _channel_block(channels: int, most: int = 64) -> int:
    return min(most, triton.next_power_of_2(channels))


# ------------------------------------------------------------------------------------- activations


@triton.jit(do_not_specialize=["size"])
def _swoosh_kernel(
    x_ptr, out_ptr, size, SHIFT: tl.constexpr, OFFSET: tl.constexpr, B: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = x - SHIFT
    softplus = tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
    tl.store(out_ptr + at, softplus - SLOPE * x - OFFSET, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _swoosh_grad_kernel(x_ptr, grad_ptr, out_ptr, size, SHIFT: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0 / (1.0 + tl.exp(SHIFT - x)) - SLOPE
    tl.store(out_ptr + at, grad * slope, mask=inside)


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
        launch(_swoosh_kernel, (triton.cdiv(size, BLOCK),), x, out, size, shift, offset, BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        out, size = torch.empty_like(x), x.numel()
        grid = (triton.cdiv(size, BLOCK),)
        launch(_swoosh_grad_kernel, grid, x, grad, out, size, ctx.shift, BLOCK)
        return out, None, None


def _dense(x: Tensor) -> Tensor:
    """`x` without holes in memory, channels-last images as they are."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()



# ---------------------------------------------------------------------------------------- BiasNorm


@triton.jit(do_not_specialize=["rows"])
def _bias_norm_kernel(
    x_ptr, bias_ptr, log_scale_ptr, out_ptr, scale_ptr, rows, C, R: tl.constexpr, B: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    channel = tl.arange(0, B)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - bias[None, :], 0.0)
    mean_square = tl.sum(centred * centred, axis=1) / C
    scale = tl.exp(tl.load(log_scale_ptr).to(tl.float32)) / tl.sqrt(mean_square)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(out_ptr + at, x * scale[:, None], mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def _bias_norm_grad_kernel(
    x_ptr, bias_ptr, log_scale_ptr, scale_ptr, grad_ptr, out_ptr, parts_ptr, rows, rows_each, C,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, B)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    factor = tl.exp(-2.0 * tl.load(log_scale_ptr).to(tl.float32)) / C
    of_bias = tl.zeros([B], tl.float32)
    of_log_scale = tl.zeros([R], tl.float32)
    last = tl.minimum((part + 1) * rows_each, rows)
    for first in range(part * rows_each, last, R):
        row = first + tl.arange(0, R)
        inside = (row < last)[:, None] & (channel < C)[None, :]
        at = row[:, None] * C + channel[None, :]
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
    tl.store(own + channel, of_bias, mask=channel < C)
    tl.store(own + C, tl.sum(of_log_scale, axis=0))


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
        block, together = _norm_blocks(channels)
        grid = (triton.cdiv(rows, together),)
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
        block, together = _norm_blocks(channels)
        programs = 4 * SPLITS
        rows_each = triton.cdiv(triton.cdiv(rows, programs), together) * together
        parts = torch.empty(programs, channels + 1, dtype=torch.float32, device=x.device)
        launch(
            _bias_norm_grad_kernel, (programs,), x, bias, log_scale, scale, grad, out, parts, rows,
            rows_each, channels, together, block,
        )  # fmt: skip
        of_bias, of_log_scale = parts.sum(0).split((channels, 1))
        return out, of_bias.to(bias.dtype), of_log_scale.view(()).to(log_scale.dtype)


def _norm_blocks(channels: int) -> tuple[int, int]:
    """Channels, rounded up to a power of two, and rows that a program takes at a time."""
    block = triton.next_power_of_2(channels)
    return block, max(1, 2048 // block)


# ---------------------------------------------------------------------- depthwise convolution, 2-D


@triton.jit(do_not_specialize=["T", "rows"])
def _conv2d_kernel(
    x_ptr, weight_ptr, out_ptr, T, F, rows, C,
    K: tl.constexpr, FLIP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    inside = (row < rows)[:, None] & has_channel[None, :]
    f = (row % F).to(tl.int32)
    t = ((row // F) % T).to(tl.int32)
    at = row[:, None] * C + channel[None, :]
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


@triton.jit(do_not_specialize=["T", "rows", "rows_each"])
def _conv2d_weight_grad_kernel(
    x_ptr, grad_ptr, parts_ptr, T, F, rows, rows_each, C,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A part of the sums over all places, one place at a time and all taps at once."""
    part = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    k = tl.arange(0, BK)
    dt = k // K - K // 2
    df = k % K - K // 2
    shift = (dt * F + df)[:, None] * C + channel[None, :]
    total = tl.zeros([BK, BC], tl.float32)
    for row in range(part * rows_each, tl.minimum((part + 1) * rows_each, rows)):
        f = (row % F).to(tl.int32) + df
        t = ((row // F) % T).to(tl.int32) + dt
        there = (k < K * K) & (t >= 0) & (t < T) & (f >= 0) & (f < F)
        mask = there[:, None] & has_channel[None, :]
        x = tl.load(x_ptr + row * C + shift, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * C + channel, mask=has_channel, other=0.0).to(tl.float32)
        total += x * grad[None, :]
    own = parts_ptr + part * (K * K) * C + k[:, None] * C + channel[None, :]
    tl.store(own, total, mask=(k < K * K)[:, None] & has_channel[None, :])


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
        kernel, (_, time, bins, channels) = weight.size(2), x.shape
        rows, block = x.numel() // channels, min(16, triton.next_power_of_2(channels))
        each = triton.cdiv(rows, min(rows, 4 * SPLITS))
        programs = triton.cdiv(rows, each)
        parts = torch.empty(
            programs, kernel * kernel, channels, dtype=torch.float32, device=x.device
        )
        launch(
            _conv2d_weight_grad_kernel, (programs, triton.cdiv(channels, block)), x, grad, parts,
            time, bins, rows, each, channels, K=kernel,
            BK=triton.next_power_of_2(kernel * kernel), BC=block,
        )  # fmt: skip
        of_weight = parts.sum(0).t().reshape(weight.shape)
        return _conv2d(grad, weight, flip=True), of_weight


def _conv2d(x: Tensor, weight: Tensor, flip: bool) -> Tensor:
    _, time, bins, channels = x.shape
    rows, block = x.numel() // channels, _channel_block(channels)
    out = torch.empty_like(x)
    grid = (triton.cdiv(rows, 32), triton.cdiv(channels, block))
    launch(
        _conv2d_kernel, grid, x, weight, out, time, bins, rows, channels,
        K=weight.size(2), FLIP=flip, BM=32, BC=block,
    )  # fmt: skip
    return out
