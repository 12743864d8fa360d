"""Kernels of the chunk-causal convolution, with the gate before and the swoosh after it.

Shapes: N batch, T frames, C channels, K convolution kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from icetransfer.model.gpu import launch
from icetransfer.model.kernels.common import (
    PROGRAMS,
    ROWS,
    Sight,
    cdiv,
    channel_block,
    counters,
    is_last,
    next_power_of_2,
    scratch,
    split,
    swoosh_of,
    total_of,
    total_of_tiles,
)


@triton.jit
def _edges(scale_ptr, position, channel, inside, frames, C, K: tl.constexpr):
    """The scale of frames near both edges of a chunk, (positions, channels)."""
    before = inside & (position < K)[:, None]
    after = inside & (position + K >= frames)[:, None]
    at = channel[None, :] * K + position[:, None]
    edges = tl.load(scale_ptr + at, mask=before, other=0.0)
    return edges + tl.load(scale_ptr + C * K + at + K - frames, mask=after, other=0.0)


@triton.jit(do_not_specialize=["T", "frames"])
def _conv_kernel(
    x_ptr, causal_ptr, causal_bias_ptr, chunk_ptr, chunk_bias_ptr, scale_ptr, out_ptr, active_ptr,
    T, frames, C, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.program_id(2).to(tl.int64) * T * C
    has_channel = channel < C
    inside = (t < T)[:, None] & has_channel[None, :]
    begin = t // frames * frames
    left: tl.constexpr = K // 2
    causal = tl.zeros([BT, BC], tl.float32)
    chunkwise = tl.zeros([BT, BC], tl.float32)
    for k in range(K):  # not unrolled, which takes seconds to compile
        source = t + (k - left)
        there = ((source >= 0) & (source < T))[:, None] & inside
        x = tl.load(x_ptr + start + source[:, None] * C + channel[None, :], mask=there, other=0.0)
        x = x.to(tl.float32)
        causal_at = causal_ptr + channel * (left + 1) + k
        causal += x * tl.load(causal_at, mask=has_channel & (k <= left), other=0.0)[None, :]
        weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
        same = (source >= begin) & (source < begin + frames)
        chunkwise += tl.where(same[:, None], x, 0.0) * weight[None, :]
    causal += tl.load(causal_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    chunkwise += tl.load(chunk_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    edges = _edges(scale_ptr, t - begin, channel, inside, frames, C, K)
    at = start + t[:, None] * C + channel[None, :]
    out = causal + chunkwise * (1.0 + edges)
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(active_ptr + at, swoosh_of(out, SHIFT, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["rows", "T", "frames"])
def _scaled_kernel(
    grad_ptr, scale_ptr, out_ptr, rows, T, frames, C, K: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """The gradient times the scale of frames near the edges of a chunk."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    position = row % T % frames
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    edges = _edges(scale_ptr, position, channel, inside, frames, C, K)
    tl.store(out_ptr + at, grad * (1.0 + edges), mask=inside)


@triton.jit(do_not_specialize=["T", "frames", "step", "tiles"])
def _conv_grad_kernel(
    grad_ptr, scaled_ptr, causal_ptr, chunk_ptr, x_ptr, lengths_ptr, of_x_ptr, parts_ptr,
    counter_ptr, sums_ptr, T, frames, C, step, tiles,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Through the convolution and the gate before it."""
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    left: tl.constexpr = K // 2
    of_values = tl.zeros([BC], tl.float32)
    of_gates = tl.zeros([BC], tl.float32)
    each = tl.cdiv(T, BT)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n = tile // each
        start = tl.cast(n, tl.int64) * T * C
        t = tile % each * BT + tl.arange(0, BT)
        inside = (t < T)[:, None] & has_channel[None, :]
        begin = t // frames * frames
        total = tl.zeros([BT, BC], tl.float32)
        for k in range(left + 1):
            target = t + (left - k)
            at = start + target[:, None] * C + channel[None, :]
            there = (target < T)[:, None] & inside
            grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
            weight = tl.load(causal_ptr + channel * (left + 1) + k, mask=has_channel, other=0.0)
            total += grad * weight[None, :]
        for k in range(K):
            target = t + (left - k)
            at = start + target[:, None] * C + channel[None, :]
            same = (target >= begin) & (target < tl.minimum(begin + frames, T))
            grad = tl.load(scaled_ptr + at, mask=same[:, None] & inside, other=0.0).to(tl.float32)
            weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
            total += grad * weight[None, :]
        at = 2 * start + t[:, None] * 2 * C + channel[None, :]
        value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x_ptr + at + C, mask=inside, other=0.0).to(tl.float32)
        there = (t * step < tl.load(lengths_ptr + n))[:, None] & inside
        total = tl.where(there, total, 0.0)
        gate = 1.0 / (1.0 + tl.exp(-gate))
        of_value = total * gate
        of_gate = of_value * value * (1.0 - gate)
        tl.store(of_x_ptr + at, of_value, mask=inside)
        tl.store(of_x_ptr + at + C, of_gate, mask=inside)
        of_values += tl.sum(of_value, axis=0)
        of_gates += tl.sum(of_gate, axis=0)
    own = parts_ptr + tl.program_id(0) * 2 * C + channel
    tl.store(own, of_values, mask=has_channel)
    tl.store(own + C, of_gates, mask=has_channel)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        total = total_of(parts_ptr, parts, 2 * C, channel, has_channel, BC)
        tl.store(sums_ptr + channel, total, mask=has_channel)
        total = total_of(parts_ptr + C, parts, 2 * C, channel, has_channel, BC)
        tl.store(sums_ptr + C + channel, total, mask=has_channel)


@triton.jit(do_not_specialize=["N", "T", "frames", "each"])
def _conv_weight_grad_kernel(
    x_ptr, grad_ptr, scaled_ptr, parts_ptr, counter_ptr, causal_ptr, chunk_ptr, biases_ptr, N, T,
    frames, each, C, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Frame by frame, all taps at once; the tap after the last has the sums for the biases.

    Programs go through the sequences; a sequence is shared by a few of them.
    """
    stretches = tl.cdiv(T, each)
    part = tl.program_id(0)
    first = part % stretches * each
    last = tl.minimum(first + each, T)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    k = tl.arange(0, BK)
    left: tl.constexpr = K // 2
    is_bias = (k == K)[:, None] & has_channel[None, :]
    is_tap = (k < K)[:, None] & has_channel[None, :]
    causal = tl.zeros([BK, BC], tl.float32)
    chunkwise = tl.zeros([BK, BC], tl.float32)
    for n in range(part // stretches, N, tl.num_programs(0) // stretches):
        start = tl.cast(n, tl.int64) * T * C
        begin = first // frames * frames
        for t in range(first, last):
            begin = tl.where(t == begin + frames, t, begin)
            source = t + k - left
            there = ((source >= 0) & (source < T))[:, None] & is_tap
            at = start + source[:, None] * C + channel[None, :]
            x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
            x = tl.where(is_bias, 1.0, x)
            own = start + t * C + channel
            grad = tl.load(grad_ptr + own, mask=has_channel, other=0.0).to(tl.float32)
            scaled = tl.load(scaled_ptr + own, mask=has_channel, other=0.0).to(tl.float32)
            same = (k == K) | ((source >= begin) & (source < begin + frames))
            causal += x * grad[None, :]
            chunkwise += tl.where(same[:, None], x, 0.0) * scaled[None, :]
    inside = (k <= K)[:, None] & has_channel[None, :]
    width = 2 * (K + 1) * C
    own = parts_ptr + part.to(tl.int64) * width + k[:, None] * C + channel[None, :]
    tl.store(own, causal, mask=inside)
    tl.store(own + (K + 1) * C, chunkwise, mask=inside)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        of_causal = total_of_tiles(
            parts_ptr, parts, width, k[:, None] * C + channel[None, :], inside
        )
        at = (K + 1) * C + k[:, None] * C + channel[None, :]
        of_chunk = total_of_tiles(parts_ptr, parts, width, at, inside)
        at = channel[None, :] * (left + 1) + k[:, None]
        tl.store(causal_ptr + at, of_causal, mask=inside & (k <= left)[:, None])
        at = channel[None, :] * K + k[:, None]
        tl.store(chunk_ptr + at, of_chunk, mask=inside & (k < K)[:, None])
        bias = (k == K)[:, None] & has_channel[None, :]
        at = channel[None, :] + tl.zeros([BK, BC], tl.int32)
        tl.store(biases_ptr + at, of_causal, mask=bias)
        tl.store(biases_ptr + C + at, of_chunk, mask=bias)


@triton.jit(do_not_specialize=["T", "frames", "rows", "each"])
def _conv_scale_grad_kernel(
    x_ptr, grad_ptr, chunk_ptr, chunk_bias_ptr, parts_ptr, counter_ptr, of_scale_ptr, T, frames,
    rows, each, C, K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """For each place near an edge, the sum over all chunks of the gradient times what is scaled."""
    near = tl.program_id(0)
    places = tl.num_programs(0)
    place = tl.where((frames > 2 * K) & (near >= K), frames - 2 * K + near, near)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2)
    has_channel = channel < C
    left: tl.constexpr = K // 2
    chunks = tl.cdiv(T, frames)
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)  # rows are the chunks of all sequences
    for first in range(part * each, last, BM):
        row = first + tl.arange(0, BM)
        begin = row % chunks * frames
        t = begin + place
        end = tl.minimum(begin + frames, T)
        inside = ((row < last) & (t < T))[:, None] & has_channel[None, :]
        at = (row // chunks * T + t).to(tl.int64)[:, None] * C + channel[None, :]
        scaled = tl.zeros([BM, BC], tl.float32)
        for k in range(K):
            source = t + (k - left)
            there = ((source >= begin) & (source < end))[:, None] & inside
            x = tl.load(x_ptr + at + (k - left) * C, mask=there, other=0.0).to(tl.float32)
            weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
            scaled += x * weight[None, :]
        scaled += tl.load(chunk_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(tl.where(inside, grad * scaled, 0.0), axis=0)
    width = places * C
    tl.store(parts_ptr + part * width + near * C + channel, sums, mask=has_channel)
    parts = tl.num_programs(2)
    if is_last(counter_ptr + tl.program_id(1) * places + near, parts):
        total = total_of(parts_ptr + near * C, parts, width, channel, has_channel, BC)
        before = has_channel & (place < K)
        tl.store(of_scale_ptr + channel * K + place, total, mask=before)
        after = has_channel & (place + K >= frames)
        at = C * K + channel * K + place + K - frames
        tl.store(of_scale_ptr + at, total, mask=after)


class ConvWeights(NamedTuple):
    """Parameters of a chunk-causal convolution.

    Attributes:
        causal: (C, 1, K // 2 + 1).
        causal_bias: (C,).
        chunkwise: (C, 1, K).
        chunk_bias: (C,).
        scale: (2, C, K), of frames near the edges of a chunk.
    """

    causal: Tensor
    causal_bias: Tensor
    chunkwise: Tensor
    chunk_bias: Tensor
    scale: Tensor


def conv(
    x: Tensor, weights: ConvWeights, chunk: int, form: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The chunk-causal convolution of (N, T, C) in chunks of so many frames, and its Swoosh."""
    batch, time, channels = x.shape
    out, active = torch.empty_like(x), torch.empty_like(x)
    block = channel_block(channels)
    grid = (cdiv(time, ROWS), cdiv(channels, block), batch)
    launch(
        _conv_kernel, grid, x, *weights, out, active, time, chunk, channels, *form,
        K=weights.chunkwise.size(2), BT=ROWS, BC=block,
    )  # fmt: skip
    return out, active


def conv_grad(
    grad: Tensor, weights: ConvWeights, chunk: int, x: Tensor, gates: Tensor, sight: Sight,
    for_weights: bool,
) -> tuple[Tensor, Tensor, ConvWeights | None]:  # fmt: skip
    """From the gradient of the convolution (N, T, C) those of all that went into it.

    `x` (N, T, C) is what `conv` took, `gates` (N, T, 2C) what `glu` took.

    Returns:
        The gradient of `gates`, its sums (2C,), and, where asked for, those of the parameters.
    """
    batch, time, channels = grad.shape
    kernel = weights.chunkwise.size(2)
    rows, block = batch * time, channel_block(channels)
    blocks, tiles = cdiv(channels, block), batch * cdiv(time, ROWS)
    scaled = torch.empty_like(grad)
    launch(
        _scaled_kernel, (cdiv(rows, ROWS), blocks), grad, weights.scale, scaled, rows, time,
        chunk, channels, K=kernel, BT=ROWS, BC=block,
    )  # fmt: skip
    programs = max(1, min(tiles, 4 * PROGRAMS // blocks))
    of_gates = torch.empty_like(gates)
    sums = torch.empty(2 * channels, dtype=torch.float32, device=x.device)
    launch(
        _conv_grad_kernel, (programs, blocks), grad, scaled, weights.causal, weights.chunkwise,
        gates, sight.lengths, of_gates, scratch(programs * len(sums), x.device),
        counters(x.device), sums, time, chunk, channels, sight.step, tiles, K=kernel, BT=ROWS,
        BC=block,
    )  # fmt: skip
    of_weights = _conv_weight_grad(grad, scaled, x, weights, chunk) if for_weights else None
    return of_gates, sums, of_weights


def _conv_weight_grad(
    grad: Tensor, scaled: Tensor, x: Tensor, weights: ConvWeights, chunk: int
) -> ConvWeights:
    batch, time, channels = grad.shape
    kernel = weights.chunkwise.size(2)
    block = min(16, next_power_of_2(channels))
    blocks = cdiv(channels, block)
    wanted = PROGRAMS // blocks
    stretches = max(1, min(wanted // batch, cdiv(time, ROWS)))
    each = cdiv(time, stretches)
    stretches = cdiv(time, each)
    programs = stretches * max(1, min(batch, wanted // stretches))
    of = ConvWeights(*(torch.empty_like(weight) for weight in weights))
    biases = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    launch(
        _conv_weight_grad_kernel, (programs, blocks), x, grad, scaled,
        scratch(programs * 2 * (kernel + 1) * channels, x.device), counters(x.device), of.causal,
        of.chunkwise, biases, batch, time, chunk, each, channels, K=kernel,
        BK=next_power_of_2(kernel + 1), BC=block,
    )  # fmt: skip
    # A chunk that is shorter than the kernel leaves some of the scales alone.
    of_scale = of.scale.zero_() if chunk < kernel else of.scale
    rows = batch * cdiv(time, chunk)
    block = min(32, next_power_of_2(channels))
    blocks = cdiv(channels, block)
    places = min(chunk, 2 * kernel)
    programs, each = split(rows, 4 * PROGRAMS // (places * blocks), ROWS)
    launch(
        _conv_scale_grad_kernel, (places, blocks, programs), x, grad, weights.chunkwise,
        weights.chunk_bias, scratch(programs * places * channels, x.device), counters(x.device),
        of_scale, time, chunk, rows, each, channels, K=kernel, BM=ROWS, BC=block,
    )  # fmt: skip
    return of._replace(causal_bias=biases[0], chunk_bias=biases[1])
