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


@triton.jit(do_not_specialize=["size"])
def _glu_kernel(x_ptr, padding_ptr, out_ptr, size, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    frame = at // C
    value_at = frame * 2 * C + at % C
    value = tl.load(x_ptr + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + value_at + C, mask=inside, other=0.0).to(tl.float32)
    padded = tl.load(padding_ptr + frame, mask=inside, other=1)
    out = value / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + at, tl.where(padded != 0, 0.0, out), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _glu_grad_kernel(x_ptr, padding_ptr, grad_ptr, out_ptr, size, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    frame = at // C
    value_at = frame * 2 * C + at % C
    value = tl.load(x_ptr + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + value_at + C, mask=inside, other=0.0).to(tl.float32)
    padded = tl.load(padding_ptr + frame, mask=inside, other=1)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.where(padded != 0, 0.0, grad)
    open_ = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + value_at, grad * open_, mask=inside)
    tl.store(out_ptr + value_at + C, grad * value * open_ * (1.0 - open_), mask=inside)


def glu(x: Tensor, padding: Tensor) -> Tensor:
    """First half of the channels times the sigmoid of the second, zero where there is no frame.

    Args:
        x: (N, T, 2C).
        padding: (N, T), True where there is no frame.

    Returns:
        (N, T, C).
    """
    return _Glu.apply(x, padding)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: Tensor) -> Tensor:
        x, padding = x.contiguous(), padding.contiguous().view(torch.uint8)
        ctx.save_for_backward(x, padding)
        channels = x.size(2) // 2
        out = x.new_empty(x.size(0), x.size(1), channels)
        size = out.numel()
        grid = (triton.cdiv(size, BLOCK),)
        launch(_glu_kernel, grid, x, padding, out, size, channels, BLOCK)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, padding = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(x)
        size = grad.numel()
        grid = (triton.cdiv(size, BLOCK),)
        launch(_glu_grad_kernel, grid, x, padding, grad, out, size, x.size(2) // 2, BLOCK)
        return out, None


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


# ------------------------------------------------------------------------------- attention weights


@triton.jit(do_not_specialize=["N", "T", "S", "R", "cap_batch_stride", "cap_frame_stride"])
def _softmax_kernel(
    content_ptr, position_ptr, caps_ptr, out_ptr, N, T, S, R, cap_batch_stride, cap_frame_stride,
    B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query = row % T
    batch = (row // T) % N
    key = tl.arange(0, B)
    inside = key < S
    content = tl.load(content_ptr + row * S + key, mask=inside, other=0.0).to(tl.float32)
    shifted = position_ptr + row * R + (T - 1 - query) + key
    position = tl.load(shifted, mask=inside, other=0.0).to(tl.float32)
    caps = caps_ptr + batch * cap_batch_stride + query * cap_frame_stride + key
    cap = tl.load(caps, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(inside, tl.minimum(content + position, cap), float("-inf"))
    e = tl.exp(score - tl.max(score, axis=0))
    tl.store(out_ptr + row * S + key, e / tl.sum(e, axis=0), mask=inside)


@triton.jit(do_not_specialize=["N", "T", "S", "R", "cap_batch_stride", "cap_frame_stride"])
def _softmax_grad_kernel(
    weights_ptr, caps_ptr, grad_ptr, content_ptr, position_ptr, N, T, S, R, cap_batch_stride,
    cap_frame_stride, MASKED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query = row % T
    batch = (row // T) % N
    key = tl.arange(0, B)
    inside = key < S
    weight = tl.load(weights_ptr + row * S + key, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * S + key, mask=inside, other=0.0).to(tl.float32)
    caps = caps_ptr + batch * cap_batch_stride + query * cap_frame_stride
    dot = tl.sum(weight * grad, axis=0)
    seen = tl.load(caps + key, mask=inside, other=MASKED).to(tl.float32) > MASKED
    tl.store(content_ptr + row * S + key, tl.where(seen, weight * (grad - dot), 0.0), mask=inside)
    # The same by offset: what no key has is zero.
    for first in range(0, R, B):
        offset = first + tl.arange(0, B)
        own = offset - (T - 1 - query)
        there = (own >= 0) & (own < S)
        weight_ = tl.load(weights_ptr + row * S + own, mask=there, other=0.0).to(tl.float32)
        grad_ = tl.load(grad_ptr + row * S + own, mask=there, other=0.0).to(tl.float32)
        seen_ = tl.load(caps + own, mask=there, other=MASKED).to(tl.float32) > MASKED
        by_offset = tl.where(seen_, weight_ * (grad_ - dot), 0.0)
        tl.store(position_ptr + row * R + offset, by_offset, mask=offset < R)


def capped_softmax(content: Tensor, position: Tensor, caps: Tensor, masked: float) -> Tensor:
    """softmax(min(content + shifted position scores, caps)), in the type of the scores.

    Args:
        content: (H, N, T, S).
        position: (H, N, T, R), by offset; entry r of query i belongs to key r - (T - 1) + i.
        caps: broadcastable to (N, T, S).
        masked: the cap of a key that is hidden; it has no gradient.

    Returns:
        (H, N, T, S).
    """
    return _CappedSoftmax.apply(content, position, caps, masked)


class _CappedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, content: Tensor, position: Tensor, caps: Tensor, masked: float) -> Tensor:
        content, position = content.contiguous(), position.contiguous()
        heads, batch, queries, keys = content.shape
        caps = caps.expand(batch, queries, keys)
        if caps.stride(2) != 1:
            caps = caps.contiguous()
        ctx.sizes = (batch, queries, keys, position.size(3), caps.stride(0), caps.stride(1))
        block = triton.next_power_of_2(keys)
        ctx.settings = {"B": block, "num_warps": 1 if block <= 128 else 2 if block <= 512 else 4}
        ctx.masked = masked
        out = torch.empty_like(content)
        grid = (heads * batch * queries,)
        launch(_softmax_kernel, grid, content, position, caps, out, *ctx.sizes, **ctx.settings)
        ctx.save_for_backward(out, caps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, caps = ctx.saved_tensors
        grad = grad.contiguous()
        heads, batch, queries, _ = weights.shape
        of_content = torch.empty_like(weights)
        of_position = weights.new_empty(heads, batch, queries, ctx.sizes[3])
        launch(
            _softmax_grad_kernel, (heads * batch * queries,), weights, caps, grad, of_content,
            of_position, *ctx.sizes, MASKED=ctx.masked, **ctx.settings,
        )  # fmt: skip
        return of_content, of_position, None, None


# ------------------------------------------------------------------- chunk-causal convolution, 1-D


@triton.jit
def _tile(T, C, BT: tl.constexpr, BC: tl.constexpr):
    """A program's frames and channels, where its sequence starts, and which of them are there."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.program_id(2).to(tl.int64) * T * C
    has_channel = channel < C
    return t, channel, start, has_channel, (t < T)[:, None] & has_channel[None, :]


@triton.jit
def _edges(scale_ptr, position, channel, inside, frames, C, K: tl.constexpr):
    """The scale of frames near both edges of a chunk, (positions, channels)."""
    before = inside & (position < K)[:, None]
    after = inside & (position + K >= frames)[:, None]
    at = channel[None, :] * K + position[:, None]
    edges = tl.load(scale_ptr + at, mask=before, other=0.0).to(tl.float32)
    return edges + tl.load(scale_ptr + C * K + at + K - frames, mask=after, other=0.0)


@triton.jit(do_not_specialize=["T", "frames"])
def _chunk_conv_kernel(
    x_ptr, causal_ptr, causal_bias_ptr, chunk_ptr, chunk_bias_ptr, scale_ptr, out_ptr, T, frames, C,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, channel, start, has_channel, inside = _tile(T, C, BT, BC)
    chunk = t // frames
    left: tl.constexpr = K // 2
    causal = tl.zeros([BT, BC], tl.float32)
    chunkwise = tl.zeros([BT, BC], tl.float32)
    for k in tl.static_range(K):
        source = t + (k - left)
        there = ((source >= 0) & (source < T))[:, None] & inside
        x = tl.load(x_ptr + start + source[:, None] * C + channel[None, :], mask=there, other=0.0)
        x = x.to(tl.float32)
        if k <= left:
            weight = tl.load(causal_ptr + channel * (left + 1) + k, mask=has_channel, other=0.0)
            causal += x * weight[None, :]
        weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
        same = (source >= 0) & (source // frames == chunk)
        chunkwise += tl.where(same[:, None], x, 0.0) * weight[None, :]
    causal += tl.load(causal_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    chunkwise += tl.load(chunk_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    edges = _edges(scale_ptr, t % frames, channel, inside, frames, C, K)
    at = start + t[:, None] * C + channel[None, :]
    tl.store(out_ptr + at, causal + chunkwise * (1.0 + edges), mask=inside)


@triton.jit(do_not_specialize=["T", "frames"])
def _chunk_conv_edge_grad_kernel(
    x_ptr, grad_ptr, chunk_ptr, chunk_bias_ptr, scale_ptr, scaled_ptr, of_edges_ptr, T, frames, C,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient times the edges' scale, and times what the edges scale."""
    t, channel, start, has_channel, inside = _tile(T, C, BT, BC)
    chunk = t // frames
    left: tl.constexpr = K // 2
    chunkwise = tl.zeros([BT, BC], tl.float32)
    for k in tl.static_range(K):
        source = t + (k - left)
        same = (source >= 0) & (source < T) & (source // frames == chunk)
        at = start + source[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=same[:, None] & inside, other=0.0).to(tl.float32)
        weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
        chunkwise += x * weight[None, :]
    chunkwise += tl.load(chunk_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    edges = _edges(scale_ptr, t % frames, channel, inside, frames, C, K)
    at = start + t[:, None] * C + channel[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + at, grad * (1.0 + edges), mask=inside)
    tl.store(of_edges_ptr + at, grad * chunkwise, mask=inside)


@triton.jit(do_not_specialize=["T", "frames"])
def _chunk_conv_grad_kernel(
    grad_ptr, scaled_ptr, causal_ptr, chunk_ptr, out_ptr, T, frames, C,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, channel, start, has_channel, inside = _tile(T, C, BT, BC)
    chunk = t // frames
    left: tl.constexpr = K // 2
    total = tl.zeros([BT, BC], tl.float32)
    for k in tl.static_range(K):
        target = t + (left - k)
        at = start + target[:, None] * C + channel[None, :]
        there = ((target >= 0) & (target < T))[:, None] & inside
        if k <= left:
            grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
            weight = tl.load(causal_ptr + channel * (left + 1) + k, mask=has_channel, other=0.0)
            total += grad * weight[None, :]
        same = there & ((target >= 0) & (target // frames == chunk))[:, None]
        scaled = tl.load(scaled_ptr + at, mask=same, other=0.0).to(tl.float32)
        weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
        total += scaled * weight[None, :]
    tl.store(out_ptr + start + t[:, None] * C + channel[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["T", "frames", "rows", "rows_each"])
def _chunk_conv_weight_grad_kernel(
    x_ptr, grad_ptr, scaled_ptr, parts_ptr, T, frames, rows, rows_each, C,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A part of the sums over frames for one tap; tap K has the sums for the biases."""
    k = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2).to(tl.int64)
    has_channel = channel < C
    shift = tl.where(k == K, 0, k - K // 2)
    causal = tl.zeros([BC], tl.float32)
    chunkwise = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * rows_each, rows)
    for first in range(part * rows_each, last, BT):
        row = first + tl.arange(0, BT)
        inside = (row < last)[:, None] & has_channel[None, :]
        at = row[:, None] * C + channel[None, :]
        t = (row % T).to(tl.int32)
        source = t + shift
        there = ((source >= 0) & (source < T))[:, None] & inside
        same = there & ((source >= 0) & (source // frames == t // frames))[:, None]
        x = tl.load(x_ptr + at + shift * C, mask=there, other=0.0).to(tl.float32)
        x = tl.where(k == K, 1.0, x)
        grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
        scaled = tl.load(scaled_ptr + at, mask=same, other=0.0).to(tl.float32)
        causal += tl.sum(grad * x, axis=0)
        chunkwise += tl.sum(scaled * x, axis=0)
    own = parts_ptr + ((part * 2) * (K + 1) + k) * C + channel
    tl.store(own, causal, mask=has_channel)
    tl.store(own + (K + 1) * C, chunkwise, mask=has_channel)


def chunk_causal_conv(
    x: Tensor,
    causal: tuple[Tensor, Tensor],
    chunkwise: tuple[Tensor, Tensor],
    scale: Tensor,
    chunk_size: int,
) -> Tensor:
    """`zipformer.ChunkCausalDepthwiseConv` in one kernel.

    Args:
        x: (N, T, C).
        causal: weight (C, 1, K // 2 + 1) and bias (C,) of the causal convolution.
        chunkwise: weight (C, 1, K) and bias (C,) of that within a chunk.
        scale: (2, C, K), of frames near the edges of a chunk.
        chunk_size: frames in a chunk, at most T.

    Returns:
        (N, T, C).
    """
    return _ChunkCausalConv.apply(x, *causal, *chunkwise, scale, chunk_size)


class _ChunkCausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        causal: Tensor,
        causal_bias: Tensor,
        chunkwise: Tensor,
        chunk_bias: Tensor,
        scale: Tensor,
        chunk_size: int,
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, causal, chunkwise, chunk_bias, scale)
        ctx.chunk_size = chunk_size
        out = torch.empty_like(x)
        grid, settings = _conv_grid(x, chunkwise.size(2))
        launch(
            _chunk_conv_kernel, grid, x, causal, causal_bias, chunkwise, chunk_bias, scale, out,
            x.size(1), chunk_size, x.size(2), **settings,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, causal, chunkwise, chunk_bias, scale = ctx.saved_tensors
        frames, kernel = ctx.chunk_size, chunkwise.size(2)
        batch, time, channels = x.shape
        grad, scaled, out = grad.contiguous(), torch.empty_like(x), torch.empty_like(x)
        of_edges = torch.empty_like(x, dtype=torch.float32)
        grid, settings = _conv_grid(x, kernel)
        sizes = (time, frames, channels)
        launch(
            _chunk_conv_edge_grad_kernel, grid, x, grad, chunkwise, chunk_bias, scale, scaled,
            of_edges, *sizes, **settings,
        )  # fmt: skip
        launch(
            _chunk_conv_grad_kernel, grid, grad, scaled, causal, chunkwise, out, *sizes, **settings
        )
        rows = batch * time
        parts = torch.empty(SPLITS, 2, kernel + 1, channels, dtype=torch.float32, device=x.device)
        launch(
            _chunk_conv_weight_grad_kernel, (kernel + 1, grid[1], SPLITS), x, grad, scaled, parts,
            time, frames, rows, triton.cdiv(rows, SPLITS), channels, **settings,
        )  # fmt: skip
        sums = parts.sum(0).transpose(1, 2)  # (2, C, K + 1)
        of_causal = sums[0, :, : kernel // 2 + 1].unsqueeze(1)
        of_chunkwise = sums[1, :, :kernel].unsqueeze(1)
        of_scale = _edge_sums(of_edges, frames, kernel)
        return out, of_causal, sums[0, :, -1], of_chunkwise, sums[1, :, -1], of_scale, None


def _conv_grid(x: Tensor, kernel: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    batch, time, channels = x.shape
    block = _channel_block(channels)
    settings = {"K": kernel, "BT": 32, "BC": block}
    return (triton.cdiv(time, 32), triton.cdiv(channels, block), batch), settings


def _edge_sums(of_edges: Tensor, frames: int, kernel: int) -> Tensor:
    """The gradient (2, C, K) of the edges' scale from that of each frame, (N, T, C)."""
    time, channels = of_edges.shape[1:]
    whole = time // frames * frames
    by_place = of_edges[:, :whole].unflatten(1, (-1, frames)).sum((0, 1))
    if whole < time:
        by_place[: time - whole] += of_edges[:, whole:].sum(0)
    of_scale = of_edges.new_zeros(2, kernel, channels)
    near = min(kernel, frames)
    of_scale[0, :near] = by_place[:near]
    of_scale[1, kernel - near :] = by_place[frames - near :]
    return of_scale.transpose(1, 2)


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
    for k in tl.static_range(K * K):
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
    K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2).to(tl.int64)
    has_channel = channel < C
    dt = k // K - K // 2
    df = k % K - K // 2
    total = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * rows_each, rows)
    for first in range(part * rows_each, last, BM):
        row = first + tl.arange(0, BM)
        f = (row % F).to(tl.int32)
        t = ((row // F) % T).to(tl.int32)
        there = (row < last) & (t + dt >= 0) & (t + dt < T) & (f + df >= 0) & (f + df < F)
        mask = there[:, None] & has_channel[None, :]
        at = row[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at + (dt * F + df) * C, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * grad, axis=0)
    tl.store(parts_ptr + (part * (K * K) + k) * C + channel, total, mask=has_channel)


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
        rows, block = x.numel() // channels, _channel_block(channels)
        parts = torch.empty(SPLITS, kernel * kernel, channels, dtype=torch.float32, device=x.device)
        grid = (kernel * kernel, triton.cdiv(channels, block), SPLITS)
        launch(
            _conv2d_weight_grad_kernel, grid, x, grad, parts, time, bins, rows,
            triton.cdiv(rows, SPLITS), channels, K=kernel, BM=64, BC=block,
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
