"""Kernels of the residual stream, of bypasses and of changes of the frame rate.

The stream is kept twice: in float32, to which modules add, and in the type of the matrix products,
which modules read.  Here `full` is the one and `half` the other, which is float32 too where no
autocast is on.

Shapes: N batch, T frames, C channels, F frames of a stack in one of the next.
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
    cdiv,
    counters,
    finish,
    is_last,
    next_power_of_2,
    rows_from,
    scratch,
    shares,
    split,
    tile,
    tiles,
    total_of,
    turned_inside,
    uniform,
    whole_rows,
)


@triton.jit(do_not_specialize=["rows"])
def _residual_kernel(
    full_ptr, y_ptr, bias_ptr, out_ptr, half_ptr, rows, C, BR: tl.constexpr, BC: tl.constexpr
):
    _, column, inside, at = tile(rows, C, BR, BC)
    x = tl.load(full_ptr + at, mask=inside, other=0.0)
    x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=column < C, other=0.0)[None, :]
    tl.store(out_ptr + at, x, mask=inside)
    tl.store(half_ptr + at, x, mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def _residual_grad_kernel(
    of_full_ptr, of_half_ptr, out_ptr, half_ptr, parts_ptr, counter_ptr, of_bias_ptr, rows, each, C,
    BOTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        _, inside, at = rows_from(first, last, column, C, BR)
        grad = tl.load(of_full_ptr + at, mask=inside, other=0.0)
        if BOTH:
            grad += tl.load(of_half_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, grad, mask=inside)
        tl.store(half_ptr + at, grad, mask=inside)
        sums += tl.sum(grad, axis=0)
    finish(sums, parts_ptr, counter_ptr, of_bias_ptr, column, there, C, BC)


def residual(full: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The next full and half, (N, T, C): full + y + bias."""
    out, half, channels = torch.empty_like(full), torch.empty_like(y), full.size(-1)
    rows = full.numel() // channels
    grid, settings = tiles(rows, channels)
    launch(_residual_kernel, grid, full, y, bias, out, half, rows, channels, **settings)
    return out, half


def residual_grad(
    of_full: Tensor, of_half: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (N, T, C) that met, added up, in float32 and in `dtype`; its sums (C,)."""
    channels = of_full.size(-1)
    rows = of_full.numel() // channels
    share = shares(of_full, rows, channels)
    out = of_full if of_half is None else torch.empty_like(of_full)
    half = torch.empty_like(of_full, dtype=dtype)
    launch(
        _residual_grad_kernel, share.grid, of_full, of_full if of_half is None else of_half, out,
        half, share.parts, share.counters, share.sums, rows, share.each, channels,
        BOTH=of_half is not None, **share.tile,
    )  # fmt: skip
    return out, half, share.sums[0]


@triton.jit(do_not_specialize=["rows", "T", "seed", "skip"])
def _mix_kernel(
    source_ptr, full_ptr, y_ptr, bias_ptr, scale_ptr, out_ptr, half_ptr, change_ptr, rows, T, C,
    seed, skip, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, column, inside, at = tile(rows, C, BR, BC)
    source = tl.load(source_ptr + at, mask=inside, other=0.0)
    x = tl.load(full_ptr + at, mask=inside, other=0.0)
    x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=column < C, other=0.0)[None, :]
    scale = tl.load(scale_ptr + column, mask=column < C, other=0.0)
    scale = tl.where((uniform(seed, row // T) >= skip)[:, None], scale[None, :], 0.0)
    out = source + scale * (x - source)
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(half_ptr + at, out, mask=inside)
    tl.store(change_ptr + at, x - source, mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "seed", "skip", "low", "high"])
def _mix_grad_kernel(
    of_full_ptr, of_half_ptr, change_ptr, scale_ptr, of_source_ptr, of_x_ptr, half_ptr, parts_ptr,
    counter_ptr, sums_ptr, rows, each, T, C, seed, skip, low, high,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    whole = tl.load(scale_ptr + column, mask=there, other=0.0)
    of_scale = tl.zeros([BC], tl.float32)
    of_bias = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row, inside, at = rows_from(first, last, column, C, BR)
        grad = tl.load(of_full_ptr + at, mask=inside, other=0.0)
        grad += tl.load(of_half_ptr + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(change_ptr + at, mask=inside, other=0.0).to(tl.float32)
        kept = (uniform(seed, row // T) >= skip)[:, None]
        of_x = grad * tl.where(kept, whole[None, :], 0.0)
        tl.store(of_source_ptr + at, grad - of_x, mask=inside)
        tl.store(of_x_ptr + at, of_x, mask=inside)
        tl.store(half_ptr + at, of_x, mask=inside)
        of_scale += tl.sum(tl.where(kept, grad * change, 0.0), axis=0)
        of_bias += tl.sum(of_x, axis=0)
    own = parts_ptr + part * 2 * C + column
    tl.store(own, of_scale, mask=there)
    tl.store(own + C, of_bias, mask=there)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        total = total_of(parts_ptr, parts, 2 * C, column, there, BC)
        tl.store(sums_ptr + column, turned_inside(total, whole, low, high), mask=there)
        total = total_of(parts_ptr + C, parts, 2 * C, column, there, BC)
        tl.store(sums_ptr + C + column, total, mask=there)


class Skip(NamedTuple):
    """Which sequences go round a module, and where the scale of a bypass may lie.

    Attributes:
        seed: of the draw.
        share: of the sequences.
        low: least scale.
        high: greatest scale.
    """

    seed: int
    share: float
    low: float
    high: float


def mix(
    source: Tensor, full: Tensor, y: Tensor, bias: Tensor, scale: Tensor, skip: Skip
) -> tuple[Tensor, Tensor, Tensor]:
    """The bypass source + scale * (full + y + bias - source): full, half, what is scaled (half)."""
    out, half, change = torch.empty_like(full), torch.empty_like(y), torch.empty_like(y)
    _, time, channels = full.shape
    rows = full.numel() // channels
    grid, settings = tiles(rows, channels)
    launch(
        _mix_kernel, grid, source, full, y, bias, scale, out, half, change, rows, time, channels,
        skip.seed, skip.share, **settings,
    )  # fmt: skip
    return out, half, change


def mix_grad(
    of_full: Tensor, of_half: Tensor, change: Tensor, scale: Tensor, skip: Skip
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of source and full (float32), of y (half); of scale and bias, stacked (2, C)."""
    _, time, channels = of_full.shape
    rows = of_full.numel() // channels
    share = shares(of_full, rows, channels, number=2)
    of_source, of_x = torch.empty_like(of_full), torch.empty_like(of_full)
    half = torch.empty_like(change)
    launch(
        _mix_grad_kernel, share.grid, of_full, of_half, change, scale, of_source, of_x, half,
        share.parts, share.counters, share.sums, rows, share.each, time, channels, *skip,
        **share.tile,
    )  # fmt: skip
    return of_source, of_x, half, share.sums


@triton.jit(do_not_specialize=["rows", "T", "seed", "skip"])
def _norm_mix_kernel(
    source_ptr, full_ptr, y_ptr, bias_ptr, scale_ptr, centre_ptr, log_scale_ptr, out_ptr, half_ptr,
    x_ptr, change_ptr, norm_ptr, rows, T, C, seed, skip, BR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, B)
    there = channel < C
    row, inside, at = rows_from(tl.program_id(0) * BR, rows, channel, C, BR)
    source = tl.load(source_ptr + at, mask=inside, other=0.0)
    x = tl.load(full_ptr + at, mask=inside, other=0.0)
    x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + channel, mask=there, other=0.0)[None, :]
    tl.store(x_ptr + at, x, mask=inside)
    centre = tl.load(centre_ptr + channel, mask=there, other=0.0)
    centred = tl.where(inside, x - centre[None, :], 0.0)
    mean_square = tl.sum(centred * centred, axis=1) / C
    norm = tl.exp(tl.load(log_scale_ptr)) / tl.sqrt(mean_square)
    tl.store(norm_ptr + row, norm, mask=row < rows)
    change = x * norm[:, None] - source
    scale = tl.load(scale_ptr + channel, mask=there, other=0.0)
    kept = (uniform(seed, row // T) >= skip)[:, None]
    out = source + tl.where(kept, scale[None, :], 0.0) * change
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(half_ptr + at, out, mask=inside)
    tl.store(change_ptr + at, change, mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "seed", "skip", "low", "high", "least", "most"])
def _norm_mix_grad_kernel(
    of_full_ptr, of_half_ptr, x_ptr, change_ptr, norm_ptr, scale_ptr, centre_ptr, log_scale_ptr,
    of_source_ptr, of_x_ptr, half_ptr, parts_ptr, counter_ptr, sums_ptr, rows, each, T, C,
    seed, skip, low, high, least, most, BOTH: tl.constexpr, BR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    channel = tl.arange(0, B)
    there = channel < C
    whole = tl.load(scale_ptr + channel, mask=there, other=0.0)
    centre = tl.load(centre_ptr + channel, mask=there, other=0.0)
    log_scale = tl.load(log_scale_ptr)
    factor = tl.exp(-2.0 * log_scale) / C
    of_scale = tl.zeros([B], tl.float32)
    of_centre = tl.zeros([B], tl.float32)
    of_bias = tl.zeros([B], tl.float32)
    of_log_scale = tl.zeros([BR], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row, inside, at = rows_from(first, last, channel, C, BR)
        grad = tl.load(of_full_ptr + at, mask=inside, other=0.0)
        if BOTH:
            grad += tl.load(of_half_ptr + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(change_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        norm = tl.load(norm_ptr + row, mask=row < last, other=0.0)
        kept = (uniform(seed, row // T) >= skip)[:, None]
        of_scale += tl.sum(tl.where(kept, grad * change, 0.0), axis=0)
        of_norm = grad * tl.where(kept, whole[None, :], 0.0)
        tl.store(of_source_ptr + at, grad - of_norm, mask=inside)
        dot = tl.sum(of_norm * x, axis=1)
        # With r = RMS(x - b) and s = exp(l) / r: ds/d(x - b) = -s^3 exp(-2 l) (x - b) / C.
        pull = -dot * norm * norm * norm * factor
        through_norm = tl.where(inside, (x - centre[None, :]) * pull[:, None], 0.0)
        of_x = through_norm + of_norm * norm[:, None]
        tl.store(of_x_ptr + at, of_x, mask=inside)
        tl.store(half_ptr + at, of_x, mask=inside)
        of_centre -= tl.sum(through_norm, axis=0)
        of_bias += tl.sum(of_x, axis=0)
        of_log_scale += dot * norm
    width = 3 * C + 1
    own = parts_ptr + part * width
    tl.store(own + channel, of_scale, mask=there)
    tl.store(own + C + channel, of_centre, mask=there)
    tl.store(own + 2 * C + channel, of_bias, mask=there)
    tl.store(own + 3 * C, tl.sum(of_log_scale, axis=0))
    parts = tl.num_programs(0)
    if is_last(counter_ptr, parts):
        total = total_of(parts_ptr, parts, width, channel, there, B)
        tl.store(sums_ptr + channel, turned_inside(total, whole, low, high), mask=there)
        total = total_of(parts_ptr + C, parts, width, channel, there, B)
        tl.store(sums_ptr + C + channel, total, mask=there)
        total = total_of(parts_ptr + 2 * C, parts, width, channel, there, B)
        tl.store(sums_ptr + 2 * C + channel, total, mask=there)
        one = tl.arange(0, 16)
        total = tl.sum(total_of(parts_ptr + 3 * C, parts, width, one, one < 1, 16), axis=0)
        tl.store(sums_ptr + 3 * C, turned_inside(total, log_scale, least, most))


def norm_mix(
    source: Tensor, full: Tensor, y: Tensor, bias: Tensor, scale: Tensor, centre: Tensor,
    log_scale: Tensor, skip: Skip,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The bypass source + scale * (BiasNorm(full + y + bias) - source).

    `centre` (C,) and `log_scale` () are BiasNorm's.

    Returns:
        Full, half; full + y + bias, what is scaled (half), and BiasNorm's factor of each frame.
    """
    _, time, channels = full.shape
    rows = full.numel() // channels
    out, x = torch.empty_like(full), torch.empty_like(full)
    half, change = torch.empty_like(y), torch.empty_like(y)
    norm = torch.empty(rows, dtype=torch.float32, device=full.device)
    block, together = whole_rows(channels)
    launch(
        _norm_mix_kernel, (cdiv(rows, together),), source, full, y, bias, scale, centre,
        log_scale, out, half, x, change, norm, rows, time, channels, skip.seed, skip.share,
        BR=together, B=block,
    )  # fmt: skip
    return out, half, x, change, norm


def norm_mix_grad(
    of_full: Tensor, of_half: Tensor | None, saved: tuple[Tensor, ...], skip: Skip,
    limits: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of source and full (float32), of y (half), and of the parameters.

    `of_half` is None where it is in `of_full` already.  Saved are what is scaled, full + y + bias,
    BiasNorm's factors, scale, centre and log_scale; the limits are of log_scale.

    Returns:
        The last is (3C + 1,): of scale, centre, bias and log_scale.
    """
    change, x, norm, scale, centre, log_scale = saved
    _, time, channels = of_full.shape
    rows = of_full.numel() // channels
    block, together = whole_rows(channels)
    programs, each = split(rows, PROGRAMS // 4, together)
    sums = torch.empty(3 * channels + 1, dtype=torch.float32, device=of_full.device)
    of_source, of_x = torch.empty_like(of_full), torch.empty_like(of_full)
    half = torch.empty_like(change)
    launch(
        _norm_mix_grad_kernel, (programs,), of_full, of_full if of_half is None else of_half, x,
        change, norm, scale, centre, log_scale, of_source, of_x, half,
        scratch(programs * len(sums), of_full.device), counters(of_full.device), sums, rows, each,
        time, channels, *skip, *limits,
        BOTH=of_half is not None, BR=together, B=block,
    )  # fmt: skip
    return of_source, of_x, half, sums


@triton.jit
def _share(bias_ptr, FACTOR: tl.constexpr, BF: tl.constexpr):
    """The softmax of a few numbers."""
    at = tl.arange(0, BF)
    e = tl.load(bias_ptr + at, mask=at < FACTOR, other=float("-inf"))
    e = tl.exp(e - tl.max(e, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit(do_not_specialize=["rows", "T", "slow"])
def _downsample_kernel(
    x_ptr, bias_ptr, out_ptr, half_ptr, rows, T, slow, C, FACTOR: tl.constexpr, BF: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row, column, inside, at = tile(rows, C, BR, BC)
    share = _share(bias_ptr, FACTOR, BF)
    step = tl.arange(0, BF)
    begin = row // slow * T
    out = tl.zeros([BR, BC], tl.float32)
    for f in range(FACTOR):
        own = tl.sum(tl.where(step == f, share, 0.0), axis=0)
        source = begin + tl.minimum(row % slow * FACTOR + f, T - 1)
        place = source.to(tl.int64)[:, None] * C + column[None, :]
        out += own * tl.load(x_ptr + place, mask=inside, other=0.0)
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(half_ptr + at, out, mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "slow"])
def _downsample_grad_kernel(
    of_full_ptr, of_half_ptr, x_ptr, bias_ptr, of_x_ptr, parts_ptr, counter_ptr, of_bias_ptr, rows,
    each, T, slow, C, FACTOR: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows are the slow frames; each writes the fast ones that it came from."""
    part = tl.program_id(0)
    channel = tl.arange(0, B)
    share = _share(bias_ptr, FACTOR, BF)
    step = tl.arange(0, BF)
    of_share = tl.zeros([BF], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row, inside, place = rows_from(first, last, channel, C, BR)
        grad = tl.load(of_full_ptr + place, mask=inside, other=0.0)
        grad += tl.load(of_half_ptr + place, mask=inside, other=0.0).to(tl.float32)
        begin = row % slow * FACTOR
        over = tl.zeros([BR, B], tl.float32)
        for f in tl.static_range(FACTOR):
            source = begin + f
            own = tl.sum(tl.where(step == f, share, 0.0), axis=0)
            nearest = (row // slow * T + tl.minimum(source, T - 1)).to(tl.int64)
            x_at = nearest[:, None] * C + channel[None, :]
            x = tl.load(x_ptr + x_at, mask=inside, other=0.0)
            dot = tl.sum(tl.sum(tl.where(inside, grad * x, 0.0), axis=1), axis=0)
            of_share += tl.where(step == f, dot, 0.0)
            # The last frame stands for those that are missing as well.
            over += tl.where((source > T - 1)[:, None], grad * own, 0.0)
        for f in tl.static_range(FACTOR):
            source = begin + f
            own = tl.sum(tl.where(step == f, share, 0.0), axis=0)
            x_at = (row // slow * T + source).to(tl.int64)[:, None] * C + channel[None, :]
            value = grad * own + tl.where((source == T - 1)[:, None], over, 0.0)
            tl.store(of_x_ptr + x_at, value, mask=inside & (source < T)[:, None])
    there = step < FACTOR
    tl.store(parts_ptr + part * FACTOR + step, of_share, mask=there)
    parts = tl.num_programs(0)
    if is_last(counter_ptr, parts):
        total = total_of(parts_ptr, parts, FACTOR, step, there, BF)
        own = share * (total - tl.sum(total * share, axis=0))
        tl.store(of_bias_ptr + step, own, mask=there)


def downsample(x: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weighted means of groups of frames, (N, T, C) to (N, ceil(T / F), C): full and half."""
    batch, time, channels = x.shape
    factor = bias.numel()
    slow = cdiv(time, factor)
    out = x.new_empty(batch, slow, channels)
    half = torch.empty_like(out, dtype=dtype)
    grid, settings = tiles(batch * slow, channels)
    launch(
        _downsample_kernel, grid, x, bias, out, half, batch * slow, time, slow, channels,
        FACTOR=factor, BF=next_power_of_2(factor), **settings,
    )  # fmt: skip
    return out, half


def downsample_grad(
    of_full: Tensor, of_half: Tensor, x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (N, T, C) and of the bias (F,)."""
    batch, time, channels = x.shape
    factor, slow = bias.numel(), of_full.size(1)
    rows = batch * slow
    block, together = whole_rows(channels)
    programs, each = split(rows, PROGRAMS, together)
    of_bias = torch.empty(factor, dtype=torch.float32, device=x.device)
    of_x = torch.empty_like(x)
    launch(
        _downsample_grad_kernel, (programs,), of_full, of_half, x, bias, of_x,
        scratch(programs * factor, x.device), counters(x.device), of_bias, rows, each, time, slow,
        channels, FACTOR=factor, BF=next_power_of_2(factor), BR=together, B=block,
    )  # fmt: skip
    return of_x, of_bias


@triton.jit(do_not_specialize=["rows", "T", "slow", "factor"])
def _combine_kernel(
    x_ptr, slow_ptr, scale_ptr, out_ptr, rows, T, slow, C, factor, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    row, column, inside, at = tile(rows, C, BR, BC)
    own = (row // T * slow + row % T // factor).to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = tl.load(slow_ptr + own, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + column, mask=column < C, other=0.0)[None, :]
    tl.store(out_ptr + at, x + scale * (y - x), mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "slow", "factor", "low", "high"])
def _combine_grad_kernel(
    grad_ptr, x_ptr, slow_ptr, scale_ptr, of_x_ptr, of_slow_ptr, parts_ptr, counter_ptr, sums_ptr,
    rows, each, T, slow, C, factor, low, high, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows are the slow frames; each takes the fast ones that it went into."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    scale = tl.load(scale_ptr + column, mask=there, other=0.0)
    of_scale = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row, inside, slow_at = rows_from(first, last, column, C, BR)
        y = tl.load(slow_ptr + slow_at, mask=inside, other=0.0)
        of_y = tl.zeros([BR, BC], tl.float32)
        for f in range(0, factor):
            frame = row % slow * factor + f
            own = inside & (frame < T)[:, None]
            at = (row // slow * T + frame).to(tl.int64)[:, None] * C + column[None, :]
            grad = tl.load(grad_ptr + at, mask=own, other=0.0)
            x = tl.load(x_ptr + at, mask=own, other=0.0)
            of_y += grad
            tl.store(of_x_ptr + at, grad * (1.0 - scale[None, :]), mask=own)
            of_scale += tl.sum(tl.where(own, grad * (y - x), 0.0), axis=0)
        tl.store(of_slow_ptr + slow_at, of_y * scale[None, :], mask=inside)
    tl.store(parts_ptr + part * C + column, of_scale, mask=there)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        total = total_of(parts_ptr, parts, C, column, there, BC)
        tl.store(sums_ptr + column, turned_inside(total, scale, low, high), mask=there)


def combine(x: Tensor, slow: Tensor, scale: Tensor, factor: int) -> Tensor:
    """The bypass x + scale * (slow, each frame repeated `factor` times, - x), (N, T, C) float32."""
    _, time, channels = x.shape
    out, rows = torch.empty_like(x), x.numel() // channels
    grid, settings = tiles(rows, channels)
    launch(
        _combine_kernel, grid, x, slow, scale, out, rows, time, slow.size(1), channels, factor,
        **settings,
    )  # fmt: skip
    return out


def combine_grad(
    grad: Tensor, x: Tensor, slow: Tensor, scale: Tensor, factor: int, limits: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, of `slow` and of the scale (C,)."""
    _, time, channels = x.shape
    rows = slow.numel() // channels
    share = shares(x, rows, channels, frames=8)
    of_x, of_slow = torch.empty_like(x), torch.empty_like(slow)
    launch(
        _combine_grad_kernel, share.grid, grad, x, slow, scale, of_x, of_slow, share.parts,
        share.counters, share.sums, rows, share.each, time, slow.size(1), channels, factor, *limits,
        **share.tile,
    )  # fmt: skip
    return of_x, of_slow, share.sums[0]
