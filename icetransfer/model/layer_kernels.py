"""Kernels of a Zipformer layer in Triton, each with the function of torch tensors that runs it.

Imported only where Triton is; `layer.py` puts them together and says what each is for.

What gradients of parameters sum over all frames is summed by a fixed number of programs, each of
which leaves a part; the program that ends last adds the parts up, in their order.  So a sum costs
no launch of its own and is the same in each run.

The residual stream is kept twice: in float32, to which modules add, and in the type of the matrix
products, which modules read.  In what follows `full` is the one and `half` the other, which is
float32 too where no autocast is on.

Shapes: N batch, T frames, C channels, K convolution kernel, H heads, Q query dim per head, P
position dim per head, D value dim per head, R = 2T - 1 relative positions, W channels of the
attention's projection, H * (2Q + P).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from icetransfer.model.gpu import launch
from icetransfer.model.swoosh import SWOOSH_SLOPE

BLOCK = 1024  # values of an elementwise program
PROGRAMS = 1024  # about so many share a sum over all frames
CHANNELS = 64  # of a program that sums
ROWS = 32  # frames that it takes at a time
SLOPE = tl.constexpr(SWOOSH_SLOPE)
MASKED = tl.constexpr(-1000.0)
NEVER = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PART_ROWS = tl.constexpr(32)
PART_TILES = tl.constexpr(8)


class Sight(NamedTuple):
    """Which frames there are, and which keys a query may see, at the rate of a stack.

    Attributes:
        lengths: (N,) int64, at 50 Hz.
        step: 50 Hz frames in one of the stack's.
        chunk: frames of the stack in a chunk, 0 for no limit.
        left: chunks of left context, below zero for no limit.
    """

    lengths: Tensor
    step: int
    chunk: int
    left: int


def mm32(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, of any precision, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that programs of one kernel count up in, and that the last one sets back."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def _parts(x: Tensor, rows: int, columns: int, tile: int) -> tuple[int, int, int, Tensor]:
    """How a sum over rows is shared.

    Returns:
        The programs, the rows that each takes, its channels at a time, and the counters.
    """
    block = min(CHANNELS, max(16, triton.next_power_of_2(columns)))
    programs = max(1, min(triton.cdiv(rows, tile), PROGRAMS // triton.cdiv(columns, block)))
    each = triton.cdiv(triton.cdiv(rows, programs), tile) * tile
    return triton.cdiv(rows, each), each, block, _counters(x.device)


@triton.jit
def _dot(a, b):
    """The product of two tiles in float32; the interpreter takes bf16 for integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _is_last(counter_ptr, programs):
    """Whether all other programs that count here have ended, and what they stored can be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _total(parts_ptr, parts, stride, column, mask, B: tl.constexpr):
    """The sum of the parts (parts, stride) at the columns."""
    total = tl.zeros([B], tl.float32)
    for first in range(0, parts, PART_ROWS):
        part = first + tl.arange(0, PART_ROWS)
        there = (part < parts)[:, None] & mask[None, :]
        at = part[:, None].to(tl.int64) * stride + column[None, :]
        total += tl.sum(tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    return total


@triton.jit
def _total_tiles(parts_ptr, parts, stride, place, mask):
    """The sum of the parts (parts, stride) at a tile of places."""
    total = tl.zeros(place.shape, tl.float32)
    for first in range(0, parts, PART_TILES):
        part = first + tl.arange(0, PART_TILES)
        there = (part < parts)[:, None, None] & mask[None, :, :]
        at = part[:, None, None].to(tl.int64) * stride + place[None, :, :]
        total += tl.sum(tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    return total


@triton.jit
def _uniform(seed, index):
    """A number in [0, 1) for each index, by two rounds of an integer hash."""
    x = index.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    for _ in tl.static_range(2):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        x = x + seed.to(tl.uint32)
    return (x >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _turned_inside(grad, x, low, high):
    """A gradient that never pushes a parameter further outside [low, high]."""
    grad = tl.where(x < low, -tl.abs(grad), grad)
    return tl.where(x > high, tl.abs(grad), grad)


@triton.jit
def _swoosh_of(x, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    z = x - SHIFT
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))) - SLOPE * x - OFFSET


@triton.jit
def _swoosh_slope(x, SHIFT: tl.constexpr):
    return 1.0 / (1.0 + tl.exp(SHIFT - x)) - SLOPE


# ------------------------------------------------------------------------------------ column sums


@triton.jit(do_not_specialize=["rows", "each"])
def _column_sums_kernel(
    x_ptr, parts_ptr, counter_ptr, out_ptr, rows, each, C, SQUARE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & (column < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * C + column[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        sums += tl.sum(x * x if SQUARE else x, axis=0)
    tl.store(parts_ptr + part * C + column, sums, mask=column < C)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        total = _total(parts_ptr, parts, C, column, column < C, BC)
        tl.store(out_ptr + column, total, mask=column < C)


def column_sums(x: Tensor, square: bool = False) -> Tensor:
    """Sums over all but the last dimension of (..., C), of the values or squares: (C,) float32."""
    x = x.contiguous()
    columns = x.size(-1)
    rows = x.numel() // columns
    programs, each, block, counters = _parts(x, rows, columns, ROWS)
    parts, out = _sums(x, programs, columns)
    launch(
        _column_sums_kernel, (programs, triton.cdiv(columns, block)), x, parts, counters, out,
        rows, each, columns, SQUARE=square, BR=ROWS, BC=block,
    )  # fmt: skip
    return out


def _sums(x: Tensor, programs: int, columns: int) -> tuple[Tensor, Tensor]:
    parts = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    return parts, torch.empty(columns, dtype=torch.float32, device=x.device)


# ----------------------------------------------------------------------------- the residual stream


@triton.jit(do_not_specialize=["size"])
def _residual_kernel(full_ptr, y_ptr, bias_ptr, out_ptr, half_ptr, size, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    x = tl.load(full_ptr + at, mask=inside, other=0.0)
    x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + at % C, mask=inside, other=0.0)
    tl.store(out_ptr + at, x, mask=inside)
    tl.store(half_ptr + at, x, mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def _residual_grad_kernel(
    of_full_ptr, of_half_ptr, out_ptr, half_ptr, parts_ptr, counter_ptr, of_bias_ptr, rows, each, C,
    BOTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        grad = tl.load(of_full_ptr + at, mask=inside, other=0.0)
        if BOTH:
            grad += tl.load(of_half_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, grad, mask=inside)
        tl.store(half_ptr + at, grad, mask=inside)
        sums += tl.sum(grad, axis=0)
    tl.store(parts_ptr + part * C + column, sums, mask=column < C)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        total = _total(parts_ptr, parts, C, column, column < C, BC)
        tl.store(of_bias_ptr + column, total, mask=column < C)


def residual(full: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """full + y + bias: the next full and half, (N, T, C)."""
    out, half, size = torch.empty_like(full), torch.empty_like(y), full.numel()
    grid = (triton.cdiv(size, BLOCK),)
    launch(_residual_kernel, grid, full, y, bias, out, half, size, full.size(-1), BLOCK)
    return out, half


def residual_grad(
    of_full: Tensor, of_half: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (N, T, C) that met, added up, in float32 and in `dtype`; its sums (C,)."""
    channels = of_full.size(-1)
    rows = of_full.numel() // channels
    programs, each, block, counters = _parts(of_full, rows, channels, ROWS)
    parts, of_bias = _sums(of_full, programs, channels)
    out = of_full if of_half is None else torch.empty_like(of_full)
    half = torch.empty_like(of_full, dtype=dtype)
    launch(
        _residual_grad_kernel, (programs, triton.cdiv(channels, block)), of_full,
        of_full if of_half is None else of_half, out, half, parts, counters, of_bias, rows, each,
        channels, BOTH=of_half is not None, BR=ROWS, BC=block,
    )  # fmt: skip
    return out, half, of_bias


@triton.jit(do_not_specialize=["size", "T", "seed", "skip"])
def _mix_kernel(
    source_ptr, full_ptr, y_ptr, bias_ptr, scale_ptr, out_ptr, half_ptr, change_ptr, size, T, C,
    seed, skip, B: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    channel = at % C
    source = tl.load(source_ptr + at, mask=inside, other=0.0)
    x = tl.load(full_ptr + at, mask=inside, other=0.0)
    x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + channel, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
    scale = tl.where(_uniform(seed, at // (T * C)) >= skip, scale, 0.0)
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
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    whole = tl.load(scale_ptr + column, mask=there, other=0.0)
    of_scale = tl.zeros([BC], tl.float32)
    of_bias = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & there[None, :]
        at = row[:, None] * C + column[None, :]
        grad = tl.load(of_full_ptr + at, mask=inside, other=0.0)
        grad += tl.load(of_half_ptr + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(change_ptr + at, mask=inside, other=0.0).to(tl.float32)
        kept = (_uniform(seed, row // T) >= skip)[:, None]
        scale = tl.where(kept, whole[None, :], 0.0)
        of_x = grad * scale
        tl.store(of_source_ptr + at, grad - of_x, mask=inside)
        tl.store(of_x_ptr + at, of_x, mask=inside)
        tl.store(half_ptr + at, of_x, mask=inside)
        of_scale += tl.sum(tl.where(kept, grad * change, 0.0), axis=0)
        of_bias += tl.sum(of_x, axis=0)
    own = parts_ptr + part * 2 * C + column
    tl.store(own, of_scale, mask=there)
    tl.store(own + C, of_bias, mask=there)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        total = _total(parts_ptr, parts, 2 * C, column, there, BC)
        tl.store(sums_ptr + column, _turned_inside(total, whole, low, high), mask=there)
        total = _total(parts_ptr + C, parts, 2 * C, column, there, BC)
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
    """source + scale * (full + y + bias - source): full, half, and what is scaled, in half."""
    out, half, change = torch.empty_like(full), torch.empty_like(y), torch.empty_like(y)
    size = full.numel()
    launch(
        _mix_kernel, (triton.cdiv(size, BLOCK),), source, full, y, bias, scale, out, half, change,
        size, full.size(1), full.size(2), skip.seed, skip.share, BLOCK,
    )  # fmt: skip
    return out, half, change


def mix_grad(
    of_full: Tensor, of_half: Tensor, change: Tensor, scale: Tensor, skip: Skip
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of source and full (float32), of y (half); of scale and bias, stacked (2, C)."""
    _, time, channels = of_full.shape
    rows = of_full.numel() // channels
    programs, each, block, counters = _parts(of_full, rows, channels, ROWS)
    parts, sums = _sums(of_full, programs, 2 * channels)
    of_source, of_x, half = (
        torch.empty_like(of_full), torch.empty_like(of_full), torch.empty_like(change)
    )  # fmt: skip
    launch(
        _mix_grad_kernel, (programs, triton.cdiv(channels, block)), of_full, of_half, change, scale,
        of_source, of_x, half, parts, counters, sums, rows, each, time, channels, *skip,
        BR=ROWS, BC=block,
    )  # fmt: skip
    return of_source, of_x, half, sums.view(2, channels)


@triton.jit(do_not_specialize=["rows", "T", "seed", "skip"])
def _norm_mix_kernel(
    source_ptr, full_ptr, y_ptr, bias_ptr, scale_ptr, centre_ptr, log_scale_ptr, out_ptr, half_ptr,
    x_ptr, change_ptr, norm_ptr, rows, T, C, seed, skip, BR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    channel = tl.arange(0, B)
    there = channel < C
    inside = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * C + channel[None, :]
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
    kept = (_uniform(seed, row // T) >= skip)[:, None]
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
    part = tl.program_id(0).to(tl.int64)
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
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & there[None, :]
        at = row[:, None] * C + channel[None, :]
        grad = tl.load(of_full_ptr + at, mask=inside, other=0.0)
        if BOTH:
            grad += tl.load(of_half_ptr + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(change_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        norm = tl.load(norm_ptr + row, mask=row < last, other=0.0)
        kept = (_uniform(seed, row // T) >= skip)[:, None]
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
    if _is_last(counter_ptr, parts):
        total = _total(parts_ptr, parts, width, channel, there, B)
        tl.store(sums_ptr + channel, _turned_inside(total, whole, low, high), mask=there)
        total = _total(parts_ptr + C, parts, width, channel, there, B)
        tl.store(sums_ptr + C + channel, total, mask=there)
        total = _total(parts_ptr + 2 * C, parts, width, channel, there, B)
        tl.store(sums_ptr + 2 * C + channel, total, mask=there)
        one = tl.arange(0, 16)
        total = tl.sum(_total(parts_ptr + 3 * C, parts, width, one, one < 1, 16), axis=0)
        tl.store(sums_ptr + 3 * C, _turned_inside(total, log_scale, least, most))


def norm_mix(
    source: Tensor, full: Tensor, y: Tensor, bias: Tensor, scale: Tensor, centre: Tensor,
    log_scale: Tensor, skip: Skip,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """source + scale * (BiasNorm(full + y + bias) - source).

    Args:
        centre: BiasNorm's bias (C,).
        log_scale: BiasNorm's, ().

    Returns:
        Full, half; full + y + bias, what is scaled (half), and BiasNorm's factor of each frame.
    """
    _, time, channels = full.shape
    rows = full.numel() // channels
    out, x = torch.empty_like(full), torch.empty_like(full)
    half, change = torch.empty_like(y), torch.empty_like(y)
    norm = torch.empty(rows, dtype=torch.float32, device=full.device)
    block, together = _whole_rows(channels)
    launch(
        _norm_mix_kernel, (triton.cdiv(rows, together),), source, full, y, bias, scale, centre,
        log_scale, out, half, x, change, norm, rows, time, channels, skip.seed, skip.share,
        BR=together, B=block,
    )  # fmt: skip
    return out, half, x, change, norm


def norm_mix_grad(
    of_full: Tensor, of_half: Tensor | None, saved: tuple[Tensor, ...], skip: Skip,
    limits: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of source and full (float32), of y (half), and of the parameters.

    Args:
        of_half: None where it is in `of_full` already.
        saved: what is scaled, full + y + bias, BiasNorm's factors; scale, centre and log_scale.
        limits: of the log scale.

    Returns:
        The last is (3C + 1,): of scale, centre, bias and log_scale.
    """
    change, x, norm, scale, centre, log_scale = saved
    _, time, channels = of_full.shape
    rows = of_full.numel() // channels
    block, together = _whole_rows(channels)
    programs = max(1, min(triton.cdiv(rows, together), PROGRAMS // 4))
    each = triton.cdiv(triton.cdiv(rows, programs), together) * together
    programs = triton.cdiv(rows, each)
    parts, sums = _sums(of_full, programs, 3 * channels + 1)
    of_source, of_x = torch.empty_like(of_full), torch.empty_like(of_full)
    half = torch.empty_like(change)
    launch(
        _norm_mix_grad_kernel, (programs,), of_full, of_full if of_half is None else of_half, x,
        change, norm, scale, centre, log_scale, of_source, of_x, half, parts,
        _counters(of_full.device), sums, rows, each, time, channels, *skip, *limits,
        BOTH=of_half is not None, BR=together, B=block,
    )  # fmt: skip
    return of_source, of_x, half, sums


def _whole_rows(channels: int) -> tuple[int, int]:
    """Channels, rounded up to a power of two, and rows that a program takes at a time."""
    block = triton.next_power_of_2(channels)
    return block, max(1, 2048 // block)


# ---------------------------------------------------------------------------------- feed forward


@triton.jit(do_not_specialize=["size", "T", "seed", "rate"])
def _swoosh_dropout_kernel(
    x_ptr, out_ptr, size, T, C, seed, rate, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    drawn = _uniform(seed, at // (T * C) * C + at % C)
    kept = tl.where(drawn >= rate, 1.0 / (1.0 - rate), 0.0)
    tl.store(out_ptr + at, _swoosh_of(x, SHIFT, OFFSET) * kept, mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "seed", "rate"])
def _swoosh_dropout_grad_kernel(
    x_ptr, grad_ptr, out_ptr, of_x_ptr, parts_ptr, counter_ptr, sums_ptr, rows, each, T, C, seed,
    rate, SHIFT: tl.constexpr, OFFSET: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & there[None, :]
        at = row[:, None] * C + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        drawn = _uniform(seed, (row // T)[:, None] * C + column[None, :])
        kept = tl.where(drawn >= rate, 1.0 / (1.0 - rate), 0.0)
        tl.store(out_ptr + at, _swoosh_of(x, SHIFT, OFFSET) * kept, mask=inside)
        of_x = grad * kept * _swoosh_slope(x, SHIFT)
        tl.store(of_x_ptr + at, of_x, mask=inside)
        sums += tl.sum(tl.where(inside, of_x, 0.0), axis=0)
    tl.store(parts_ptr + part * C + column, sums, mask=there)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        total = _total(parts_ptr, parts, C, column, there, BC)
        tl.store(sums_ptr + column, total, mask=there)


def swoosh_dropout(
    x: Tensor, form: tuple[float, float], rate: float = 0.0, seed: int = 0
) -> Tensor:
    """Swoosh of (N, T, C), then whole channels of a sequence dropped with probability `rate`."""
    out, size = torch.empty_like(x), x.numel()
    launch(
        _swoosh_dropout_kernel, (triton.cdiv(size, BLOCK),), x, out, size, x.size(1), x.size(2),
        seed, rate, *form, BLOCK,
    )  # fmt: skip
    return out


def swoosh_dropout_grad(
    x: Tensor, grad: Tensor, form: tuple[float, float], rate: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of `swoosh_dropout` once more, the gradient of `x` and its sums (C,)."""
    _, time, channels = x.shape
    rows = x.numel() // channels
    programs, each, block, counters = _parts(x, rows, channels, ROWS)
    parts, sums = _sums(x, programs, channels)
    out, of_x = torch.empty_like(x), torch.empty_like(x)
    launch(
        _swoosh_dropout_grad_kernel, (programs, triton.cdiv(channels, block)), x, grad, out, of_x,
        parts, counters, sums, rows, each, time, channels, seed, rate, *form, BR=ROWS, BC=block,
    )  # fmt: skip
    return out, of_x, sums


# ------------------------------------------------------------------------------- convolution module


@triton.jit(do_not_specialize=["size", "T", "step"])
def _glu_kernel(x_ptr, lengths_ptr, out_ptr, size, T, C, step, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    frame = at // C
    value_at = frame * 2 * C + at % C
    value = tl.load(x_ptr + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + value_at + C, mask=inside, other=0.0).to(tl.float32)
    there = frame % T * step < tl.load(lengths_ptr + frame // T, mask=inside, other=0)
    tl.store(out_ptr + at, tl.where(there, value / (1.0 + tl.exp(-gate)), 0.0), mask=inside)


def glu(x: Tensor, sight: Sight) -> Tensor:
    """First half of the channels of (N, T, 2C) times the sigmoid of the second; zero past the end."""
    batch, time, width = x.shape
    out = x.new_empty(batch, time, width // 2)
    size = out.numel()
    launch(
        _glu_kernel, (triton.cdiv(size, BLOCK),), x, sight.lengths, out, size, time, width // 2,
        sight.step, BLOCK,
    )  # fmt: skip
    return out


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
    chunk = t // frames
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
        same = (source >= 0) & (source // frames == chunk)
        chunkwise += tl.where(same[:, None], x, 0.0) * weight[None, :]
    causal += tl.load(causal_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    chunkwise += tl.load(chunk_bias_ptr + channel, mask=has_channel, other=0.0)[None, :]
    edges = _edges(scale_ptr, t % frames, channel, inside, frames, C, K)
    at = start + t[:, None] * C + channel[None, :]
    out = causal + chunkwise * (1.0 + edges)
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(active_ptr + at, _swoosh_of(out, SHIFT, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["rows", "T", "frames"])
def _scaled_kernel(
    grad_ptr, scale_ptr, out_ptr, rows, T, frames, C, K: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """The gradient times the scale of frames near the edges of a chunk."""
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    position = (row % T % frames).to(tl.int32)
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
        n = (tile // each).to(tl.int64)
        t = tile % each * BT + tl.arange(0, BT)
        inside = (t < T)[:, None] & has_channel[None, :]
        chunk = t // frames
        total = tl.zeros([BT, BC], tl.float32)
        for k in range(left + 1):
            target = t + (left - k)
            at = (n * T + target)[:, None] * C + channel[None, :]
            there = (target < T)[:, None] & inside
            grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
            weight = tl.load(causal_ptr + channel * (left + 1) + k, mask=has_channel, other=0.0)
            total += grad * weight[None, :]
        for k in range(K):
            target = t + (left - k)
            at = (n * T + target)[:, None] * C + channel[None, :]
            same = (target >= 0) & (target < T) & (target // frames == chunk)
            grad = tl.load(scaled_ptr + at, mask=same[:, None] & inside, other=0.0).to(tl.float32)
            weight = tl.load(chunk_ptr + channel * K + k, mask=has_channel, other=0.0)
            total += grad * weight[None, :]
        at = (n * T + t)[:, None] * 2 * C + channel[None, :]
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
    if _is_last(counter_ptr + tl.program_id(1), parts):
        total = _total(parts_ptr, parts, 2 * C, channel, has_channel, BC)
        tl.store(sums_ptr + channel, total, mask=has_channel)
        total = _total(parts_ptr + C, parts, 2 * C, channel, has_channel, BC)
        tl.store(sums_ptr + C + channel, total, mask=has_channel)


@triton.jit(do_not_specialize=["T", "frames", "rows", "each"])
def _conv_weight_grad_kernel(
    x_ptr, grad_ptr, scaled_ptr, parts_ptr, counter_ptr, causal_ptr, chunk_ptr, biases_ptr, T,
    frames, rows, each, C, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Frame by frame, all taps at once; the tap after the last has the sums for the biases."""
    part = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    has_channel = channel < C
    k = tl.arange(0, BK)
    left: tl.constexpr = K // 2
    causal = tl.zeros([BK, BC], tl.float32)
    chunkwise = tl.zeros([BK, BC], tl.float32)
    for row in range(part * each, tl.minimum((part + 1) * each, rows)):
        t = (row % T).to(tl.int32)
        source = t + k - left
        there = (k < K) & (source >= 0) & (source < T)
        at = (row + k - left)[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=there[:, None] & has_channel[None, :], other=0.0)
        x = tl.where((k == K)[:, None], 1.0, x.to(tl.float32))
        grad = tl.load(grad_ptr + row * C + channel, mask=has_channel, other=0.0).to(tl.float32)
        scaled = tl.load(scaled_ptr + row * C + channel, mask=has_channel, other=0.0)
        same = (k == K) | ((source >= 0) & (source // frames == t // frames))
        causal += x * grad[None, :]
        chunkwise += tl.where(same[:, None], x, 0.0) * scaled.to(tl.float32)[None, :]
    inside = (k <= K)[:, None] & has_channel[None, :]
    width = 2 * (K + 1) * C
    own = parts_ptr + part * width + k[:, None] * C + channel[None, :]
    tl.store(own, causal, mask=inside)
    tl.store(own + (K + 1) * C, chunkwise, mask=inside)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        of_causal = _total_tiles(parts_ptr, parts, width, k[:, None] * C + channel[None, :], inside)
        at = (K + 1) * C + k[:, None] * C + channel[None, :]
        of_chunk = _total_tiles(parts_ptr, parts, width, at, inside)
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
    part = tl.program_id(2).to(tl.int64)
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
        at = (row // chunks * T + t)[:, None] * C + channel[None, :]
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
    if _is_last(counter_ptr + tl.program_id(1) * places + near, parts):
        total = _total(parts_ptr + near * C, parts, width, channel, has_channel, BC)
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
    block = _channel_block(channels)
    grid = (triton.cdiv(time, ROWS), triton.cdiv(channels, block), batch)
    launch(
        _conv_kernel, grid, x, *weights, out, active, time, chunk, channels, *form,
        K=weights.chunkwise.size(2), BT=ROWS, BC=block,
    )  # fmt: skip
    return out, active


def conv_grad(
    grad: Tensor, weights: ConvWeights, chunk: int, x: Tensor, gates: Tensor, sight: Sight
) -> tuple[Tensor, Tensor, ConvWeights]:
    """From the gradient of the convolution (N, T, C) those of all that went into it.

    Args:
        x: (N, T, C), what `conv` took.
        gates: (N, T, 2C), what `glu` took.

    Returns:
        The gradient of `gates`, its sums (2C,), and those of the parameters.
    """
    batch, time, channels = grad.shape
    kernel = weights.chunkwise.size(2)
    rows, block = batch * time, _channel_block(channels)
    blocks, tiles = triton.cdiv(channels, block), batch * triton.cdiv(time, ROWS)
    scaled = torch.empty_like(grad)
    launch(
        _scaled_kernel, (triton.cdiv(rows, ROWS), blocks), grad, weights.scale, scaled, rows, time,
        chunk, channels, K=kernel, BT=ROWS, BC=block,
    )  # fmt: skip
    programs = max(1, min(tiles, 4 * PROGRAMS // blocks))
    of_gates = torch.empty_like(gates)
    parts, sums = _sums(x, programs, 2 * channels)
    launch(
        _conv_grad_kernel, (programs, blocks), grad, scaled, weights.causal, weights.chunkwise,
        gates, sight.lengths, of_gates, parts, _counters(x.device), sums, time, chunk, channels,
        sight.step, tiles, K=kernel, BT=ROWS, BC=block,
    )  # fmt: skip
    return of_gates, sums, _conv_weight_grad(grad, scaled, x, weights, chunk)


def _conv_weight_grad(
    grad: Tensor, scaled: Tensor, x: Tensor, weights: ConvWeights, chunk: int
) -> ConvWeights:
    batch, time, channels = grad.shape
    kernel = weights.chunkwise.size(2)
    rows = batch * time
    block = min(16, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    programs = max(1, min(triton.cdiv(rows, ROWS), PROGRAMS // blocks))
    each = triton.cdiv(rows, programs)
    programs = triton.cdiv(rows, each)
    parts = torch.empty(
        programs, 2 * (kernel + 1) * channels, dtype=torch.float32, device=x.device
    )
    counters = _counters(x.device)
    of = ConvWeights(*(torch.empty_like(weight) for weight in weights))
    biases = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    launch(
        _conv_weight_grad_kernel, (programs, blocks), x, grad, scaled, parts, counters,
        of.causal, of.chunkwise, biases, time, chunk, rows, each, channels, K=kernel,
        BK=triton.next_power_of_2(kernel + 1), BC=block,
    )  # fmt: skip
    # A chunk that is shorter than the kernel leaves some of the scales alone.
    of_scale = of.scale.zero_() if chunk < kernel else of.scale
    rows = batch * triton.cdiv(time, chunk)
    block = min(32, triton.next_power_of_2(channels))
    places = min(chunk, 2 * kernel)
    programs = max(
        1, min(triton.cdiv(rows, ROWS), 4 * PROGRAMS // (places * triton.cdiv(channels, block)))
    )
    each = triton.cdiv(triton.cdiv(rows, programs), ROWS) * ROWS
    programs = triton.cdiv(rows, each)
    parts = torch.empty(programs, places * channels, dtype=torch.float32, device=x.device)
    launch(
        _conv_scale_grad_kernel, (places, triton.cdiv(channels, block), programs), x, grad,
        weights.chunkwise, weights.chunk_bias, parts, counters, of_scale, time, chunk, rows, each,
        channels, K=kernel, BM=ROWS, BC=block,
    )  # fmt: skip
    return of._replace(causal_bias=biases[0], chunk_bias=biases[1])


def _channel_block(channels: int) -> int:
    return min(64, triton.next_power_of_2(channels))


# ------------------------------------------------------------------------------------- attention


@triton.jit
def _keys_of(first, last, T, chunk, left):
    """The range of keys that some query in [first, last] may see."""
    low = 0
    high = T
    if chunk > 0:
        high = tl.minimum((last // chunk + 1) * chunk, T)
        if left >= 0:
            low = tl.maximum((first // chunk - left) * chunk, 0)
    return low, high


@triton.jit
def _queries_of(first, last, T, chunk, left):
    """The range of queries that may see some key in [first, last]."""
    low = 0
    high = T
    if chunk > 0:
        low = first // chunk * chunk
        if left >= 0:
            high = tl.minimum((last // chunk + left + 1) * chunk, T)
    return low, high


@triton.jit
def _is_seen(query, key, T, chunk, left):
    """Whether each query (rows) may see each key (columns), whatever their lengths."""
    seen = (query < T)[:, None] & (key < T)[None, :]
    if chunk > 0:
        ahead = (key // chunk)[None, :] - (query // chunk)[:, None]
        seen = seen & (ahead <= 0)
        if left >= 0:
            seen = seen & (ahead >= -left)
    return seen


@triton.jit
def _scores(
    q, proj_ptr, offsets_ptr, query, key, h, T, chunk, left, missing, WIDTH,
    H: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Scores of queries (rows) for keys (columns): of content, of position, and capped."""
    channel = tl.arange(0, BQ)
    at = (key * WIDTH)[None, :] + (H * Q + h * Q + channel)[:, None]
    there = (key < T)[None, :] & (channel < Q)[:, None]
    score = _dot(q, tl.load(proj_ptr + at, mask=there, other=0.0))
    seen = _is_seen(query, key, T, chunk, left)
    offset = key[None, :] - query[:, None] + (T - 1)
    for p in tl.static_range(P):
        own = tl.load(
            proj_ptr + query * WIDTH + 2 * H * Q + h * P + p, mask=query < T, other=0.0
        ).to(tl.float32)
        table = tl.load(
            offsets_ptr + (h * P + p) * (2 * T - 1) + offset, mask=seen, other=0.0
        ).to(tl.float32)
        score += own[:, None] * table
    score = tl.where(missing[None, :], tl.minimum(score, MASKED), score)
    return tl.where(seen, score, NEVER)


@triton.jit(do_not_specialize=["N", "T", "chunk", "left", "step"])
def _weights_kernel(
    proj_ptr, offsets_ptr, lengths_ptr, out_ptr, N, T, S, chunk, left, step, WIDTH,
    H: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1) // N
    n = tl.program_id(1) % N
    first = tl.program_id(0) * B
    query = first + tl.arange(0, B)
    proj = proj_ptr + n.to(tl.int64) * T * WIDTH
    length = tl.load(lengths_ptr + n)
    channel = tl.arange(0, BQ)
    there = (query < T)[:, None] & (channel < Q)[None, :]
    q = tl.load(
        proj + (query * WIDTH)[:, None] + (h * Q + channel)[None, :], mask=there, other=0.0
    )
    low, high = _keys_of(first, tl.minimum(first + B, T) - 1, T, chunk, left)
    low = low // B * B
    most = tl.full([B], -1e30, tl.float32)
    total = tl.zeros([B], tl.float32)
    for at in range(low, high, B):
        key = at + tl.arange(0, B)
        score = _scores(
            q, proj, offsets_ptr, query, key, h, T, chunk, left, key * step >= length,
            WIDTH, H, Q, P, BQ,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(score, axis=1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(score - higher[:, None]), axis=1)
        most = higher
    out = out_ptr + tl.program_id(1).to(tl.int64) * T * S
    for at in range(low, high, B):
        key = at + tl.arange(0, B)
        score = _scores(
            q, proj, offsets_ptr, query, key, h, T, chunk, left, key * step >= length,
            WIDTH, H, Q, P, BQ,
        )  # fmt: skip
        weight = tl.exp(score - most[:, None]) / total[:, None]
        inside = (query < T)[:, None] & (key < T)[None, :]
        tl.store(out + (query * S)[:, None] + key[None, :], weight, mask=inside)


@triton.jit(do_not_specialize=["N", "T", "chunk", "left"])
def _attend_kernel(
    weights_ptr, value_ptr, gate_ptr, out_ptr, gated_ptr, N, T, S, chunk, left, D, WIDTH,
    GATE_WIDTH, GATED: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1) // N
    n = tl.program_id(1) % N
    first = tl.program_id(0) * B
    query = first + tl.arange(0, B)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    weights = weights_ptr + tl.program_id(1).to(tl.int64) * T * S
    start = n.to(tl.int64) * T
    total = tl.zeros([B, BD], tl.float32)
    low, high = _keys_of(first, tl.minimum(first + B, T) - 1, T, chunk, left)
    for at in range(low // B * B, high, B):
        key = at + tl.arange(0, B)
        seen = _is_seen(query, key, T, chunk, left)
        weight = tl.load(weights + (query * S)[:, None] + key[None, :], mask=seen, other=0.0)
        there = (key < T)[:, None] & (channel < D)[None, :]
        value = tl.load(
            value_ptr + (start + key)[:, None] * WIDTH + (h * D + channel)[None, :],
            mask=there,
            other=0.0,
        )
        total += _dot(weight, value)
    inside = (query < T)[:, None] & (channel < D)[None, :]
    own = (start + query)[:, None] * WIDTH + (h * D + channel)[None, :]
    tl.store(out_ptr + own, total, mask=inside)
    if GATED:
        gate = (start + query)[:, None] * GATE_WIDTH + channel[None, :]
        gate = tl.load(gate_ptr + gate, mask=inside, other=0.0).to(tl.float32)
        tl.store(gated_ptr + own, total * gate, mask=inside)


@triton.jit(do_not_specialize=["N", "T", "chunk", "left"])
def _attend_grad_kernel(
    weights_ptr, grad_ptr, out_ptr, N, T, S, chunk, left, D, WIDTH,
    BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1) // N
    n = tl.program_id(1) % N
    first = tl.program_id(0) * B
    key = first + tl.arange(0, B)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    weights = weights_ptr + tl.program_id(1).to(tl.int64) * T * S
    start = n.to(tl.int64) * T
    total = tl.zeros([B, BD], tl.float32)
    low, high = _queries_of(first, tl.minimum(first + B, T) - 1, T, chunk, left)
    for at in range(low // B * B, high, B):
        query = at + tl.arange(0, B)
        seen = _is_seen(query, key, T, chunk, left)
        weight = tl.load(weights + (query * S)[:, None] + key[None, :], mask=seen, other=0.0)
        there = (query < T)[:, None] & (channel < D)[None, :]
        grad = tl.load(
            grad_ptr + (start + query)[:, None] * WIDTH + (h * D + channel)[None, :],
            mask=there,
            other=0.0,
        )
        total += _dot(tl.trans(weight), grad)
    inside = (key < T)[:, None] & (channel < D)[None, :]
    own = (start + key)[:, None] * WIDTH + (h * D + channel)[None, :]
    tl.store(out_ptr + own, total, mask=inside)


@triton.jit
def _rows(pointer, start, frame, channel, T, D, width):
    """The values (frames, channels) of an array (N, T, width)."""
    there = (frame < T)[:, None] & (channel < D)[None, :]
    return tl.load(
        pointer + (start + frame)[:, None] * width + channel[None, :], mask=there, other=0.0
    )


@triton.jit
def _products(a, b):
    """Sums over the channels of a times b, (frames,)."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["N", "T", "chunk", "left", "step"])
def _weights_grad_kernel(
    weights_ptr, proj_ptr, offsets_ptr, lengths_ptr, v1_ptr, o1_ptr, g1_ptr, v2_ptr, o2_ptr, g2_ptr,
    v3_ptr, o3_ptr, g3_ptr, of_scores_ptr, of_proj_ptr, N, T, S, chunk, left, step, D, E, WIDTH,
    H: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores, and of queries and positions.

    The weights were used three times: o1 and o2 (H * D channels) by all heads, o3 (E) by the first.
    """
    h = tl.program_id(1) // N
    n = tl.program_id(1) % N
    start = n.to(tl.int64) * T
    first = tl.program_id(0) * B
    query = first + tl.arange(0, B)
    own = tl.arange(0, BD)
    wide = tl.arange(0, BE)
    width = H * D
    g1 = _rows(g1_ptr + h * D, start, query, own, T, D, width)
    g2 = _rows(g2_ptr + h * D, start, query, own, T, D, width)
    # The mean of a query's gradients over the keys, by the weights.
    mean = _products(g1, _rows(o1_ptr + h * D, start, query, own, T, D, width))
    mean += _products(g2, _rows(o2_ptr + h * D, start, query, own, T, D, width))
    if h == 0:
        for e in range(0, E, BE):
            g3 = _rows(g3_ptr, start, query, e + wide, T, E, E)
            mean += _products(g3, _rows(o3_ptr, start, query, e + wide, T, E, E))
    length = tl.load(lengths_ptr + n)
    channel = tl.arange(0, BQ)
    of_query = tl.zeros([B, BQ], tl.float32)
    of_position = tl.zeros([B, BP], tl.float32)
    base = tl.program_id(1).to(tl.int64) * T * S
    low, high = _keys_of(first, tl.minimum(first + B, T) - 1, T, chunk, left)
    for at in range(low // B * B, high, B):
        key = at + tl.arange(0, B)
        seen = _is_seen(query, key, T, chunk, left)
        v1 = _rows(v1_ptr + h * D, start, key, own, T, D, width)
        v2 = _rows(v2_ptr + h * D, start, key, own, T, D, width)
        grad = _dot(g1, tl.trans(v1))
        grad += _dot(g2, tl.trans(v2))
        if h == 0:
            for e in range(0, E, BE):
                g3 = _rows(g3_ptr, start, query, e + wide, T, E, E)
                v3 = _rows(v3_ptr, start, key, e + wide, T, E, E)
                grad += _dot(g3, tl.trans(v3))
        place = base + (query * S)[:, None] + key[None, :]
        weight = tl.load(weights_ptr + place, mask=seen, other=0.0).to(tl.float32)
        free = seen & (key * step < length)[None, :]  # what is capped has no gradient
        of_score = tl.where(free, weight * (grad - mean[:, None]), 0.0)
        tl.store(of_scores_ptr + place, of_score, mask=(query < T)[:, None] & (key < T)[None, :])
        k = tl.load(
            proj_ptr + (start + key)[:, None] * WIDTH + (H * Q + h * Q + channel)[None, :],
            mask=(key < T)[:, None] & (channel < Q)[None, :],
            other=0.0,
        )
        of_query += _dot(of_score.to(k.dtype), k)
        offset = key[None, :] - query[:, None] + (T - 1)
        for p in tl.static_range(P):
            table = tl.load(
                offsets_ptr + (h * P + p) * (2 * T - 1) + offset, mask=seen, other=0.0
            ).to(tl.float32)
            part = tl.sum(of_score * table, axis=1)
            of_position += tl.where((tl.arange(0, BP) == p)[None, :], part[:, None], 0.0)
    row = of_proj_ptr + (start + query)[:, None] * WIDTH
    tl.store(
        row + (h * Q + channel)[None, :],
        of_query,
        mask=(query < T)[:, None] & (channel < Q)[None, :],
    )
    p = tl.arange(0, BP)
    tl.store(
        row + (2 * H * Q + h * P + p)[None, :],
        of_position,
        mask=(query < T)[:, None] & (p < P)[None, :],
    )


@triton.jit(do_not_specialize=["N", "T", "chunk", "left"])
def _key_grad_kernel(
    of_scores_ptr, proj_ptr, of_proj_ptr, N, T, S, chunk, left, WIDTH,
    H: tl.constexpr, Q: tl.constexpr, BQ: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1) // N
    start = (tl.program_id(1) % N).to(tl.int64) * T
    first = tl.program_id(0) * B
    key = first + tl.arange(0, B)
    channel = tl.arange(0, BQ)
    base = tl.program_id(1).to(tl.int64) * T * S
    total = tl.zeros([B, BQ], tl.float32)
    low, high = _queries_of(first, tl.minimum(first + B, T) - 1, T, chunk, left)
    for at in range(low // B * B, high, B):
        query = at + tl.arange(0, B)
        seen = _is_seen(query, key, T, chunk, left)
        of_score = tl.load(
            of_scores_ptr + base + (query * S)[:, None] + key[None, :], mask=seen, other=0.0
        )
        q = tl.load(
            proj_ptr + (start + query)[:, None] * WIDTH + (h * Q + channel)[None, :],
            mask=(query < T)[:, None] & (channel < Q)[None, :],
            other=0.0,
        )
        total += _dot(tl.trans(of_score), q)
    tl.store(
        of_proj_ptr + (start + key)[:, None] * WIDTH + (H * Q + h * Q + channel)[None, :],
        total,
        mask=(key < T)[:, None] & (channel < Q)[None, :],
    )


@triton.jit(do_not_specialize=["N", "T", "chunk", "left", "each"])
def _offset_grad_kernel(
    of_scores_ptr, proj_ptr, parts_ptr, counter_ptr, out_ptr, N, T, S, chunk, left, each, WIDTH,
    H: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BI: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """The gradient of the offsets' table (H * P, R): sums along the diagonals of the scores'."""
    h = tl.program_id(1)
    first = tl.program_id(0) * B
    offset = first + tl.arange(0, B)
    part = tl.program_id(2)
    p = tl.arange(0, BP)
    total = tl.zeros([BP, B], tl.float32)
    # Queries whose key at one of these offsets is there: 0 <= offset - (T - 1) + query < T.
    low = tl.maximum(T - first - B, 0)
    high = tl.minimum(2 * T - 1 - first, T)
    for n in range(part * each, tl.minimum((part + 1) * each, N)):
        base = (h * N + n).to(tl.int64) * T * S
        start = (n + tl.zeros([1], tl.int64)) * T
        for at in range(low, high, BI):
            query = at + tl.arange(0, BI)
            key = offset[None, :] - (T - 1) + query[:, None]
            seen = (query < T)[:, None] & (key >= 0) & (key < T)
            if chunk > 0:
                ahead = key // chunk - (query // chunk)[:, None]
                seen = seen & (ahead <= 0)
                if left >= 0:
                    seen = seen & (ahead >= -left)
            of_score = tl.load(
                of_scores_ptr + base + (query * S)[:, None] + key, mask=seen, other=0.0
            )
            own = tl.load(
                proj_ptr
                + ((start + query) * WIDTH)[None, :]
                + (2 * H * Q + h * P + p)[:, None],
                mask=(p < P)[:, None] & (query < T)[None, :],
                other=0.0,
            )
            total += _dot(own, of_score)
    R = 2 * T - 1
    inside = (p < P)[:, None] & (offset < R)[None, :]
    place = (h * P + p)[:, None] * R + offset[None, :]
    size = H * P * R
    tl.store(parts_ptr + part.to(tl.int64) * size + place, total, mask=inside)
    parts = tl.num_programs(2)
    if _is_last(counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), parts):
        tl.store(out_ptr + place, _total_tiles(parts_ptr, parts, size, place, inside), mask=inside)


class Heads(NamedTuple):
    """Sizes of the attention's heads: how many, and the dims of queries and of positions."""

    count: int
    query: int
    position: int


TILE = 64  # queries and keys of a program


def attention_weights(proj: Tensor, offsets: Tensor, heads: Heads, sight: Sight) -> Tensor:
    """Softmax of the capped scores of content and position.

    Args:
        proj: (N, T, W): queries, keys, and positions of all heads.
        offsets: (H * P, R), the projected encoding of relative positions.

    Returns:
        (H, N, T, S), S being T and what makes rows begin at multiples of 16.  Keys of other chunks
        that a query may not see are left as they were; keys past the end have weight zero.
    """
    batch, time, width = proj.shape
    keys = triton.cdiv(time, 16) * 16
    out = proj.new_empty(heads.count, batch, time, keys)
    grid = (triton.cdiv(time, TILE), heads.count * batch)
    launch(
        _weights_kernel, grid, proj, offsets, sight.lengths, out, batch, time, keys, sight.chunk,
        sight.left, sight.step, width, H=heads.count, Q=heads.query, P=heads.position,
        BQ=_dot_size(heads.query), B=TILE,
    )  # fmt: skip
    return out


def attend(weights: Tensor, value: Tensor, heads: int, sight: Sight) -> Tensor:
    """Values (N, T, heads * D) averaged with the weights of the first heads."""
    return _attend(weights, value, heads, sight, None)[0]


def attend_gated(
    weights: Tensor, value: Tensor, gates: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """Values (N, T, E) averaged with the first head's weights, and that times the gates.

    Args:
        gates: (N, T, 3E); the last third is taken.
    """
    return _attend(weights, value, 1, sight, gates)


def _attend(
    weights: Tensor, value: Tensor, heads: int, sight: Sight, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time, width = value.shape
    channels = width // heads
    out = torch.empty_like(value)
    gated = out if gates is None else torch.empty_like(value)
    block = min(64, _dot_size(channels))
    grid = (triton.cdiv(time, TILE), heads * batch, triton.cdiv(channels, block))
    launch(
        _attend_kernel, grid, weights, value, value if gates is None else gates[:, :, 2 * width :],
        out, gated, batch, time, weights.size(3), sight.chunk, sight.left, channels, width,
        3 * width, GATED=gates is not None, BD=block, B=TILE,
    )  # fmt: skip
    return out, gated


def attend_grad(weights: Tensor, grad: Tensor, heads: int, sight: Sight) -> Tensor:
    """The gradient of the values from that of `attend`, both (N, T, heads * D)."""
    batch, time, width = grad.shape
    channels = width // heads
    out = torch.empty_like(grad)
    block = min(64, _dot_size(channels))
    grid = (triton.cdiv(time, TILE), heads * batch, triton.cdiv(channels, block))
    launch(
        _attend_grad_kernel, grid, weights, grad, out, batch, time, weights.size(3), sight.chunk,
        sight.left, channels, width, BD=block, B=TILE,
    )  # fmt: skip
    return out


class Use(NamedTuple):
    """One use of the weights: the values, their averages, and the gradient of these."""

    value: Tensor
    out: Tensor
    grad: Tensor


def attention_weights_grad(
    weights: Tensor, proj: Tensor, offsets: Tensor, uses: tuple[Use, Use, Use], heads: Heads,
    sight: Sight,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the projection (N, T, W) and of the offsets (H * P, R, float32).

    Args:
        uses: two by all heads, (N, T, H * D), and one by the first head, (N, T, E).
    """
    batch, time, width = proj.shape
    channels, extra = uses[0].value.size(2) // heads.count, uses[2].value.size(2)
    of_scores, of_proj = torch.empty_like(weights), torch.empty_like(proj)
    sizes = (batch, time, weights.size(3), sight.chunk, sight.left)
    tiles = triton.cdiv(time, TILE)
    query, position = _dot_size(heads.query), triton.next_power_of_2(heads.position)
    launch(
        _weights_grad_kernel, (tiles, heads.count * batch), weights, proj, offsets, sight.lengths,
        *uses[0], *uses[1], *uses[2], of_scores, of_proj, *sizes, sight.step, channels, extra,
        width, H=heads.count, Q=heads.query, P=heads.position, BP=position, BQ=query,
        BD=_dot_size(channels), BE=min(64, _dot_size(extra)), B=TILE,
    )  # fmt: skip
    launch(
        _key_grad_kernel, (tiles, heads.count * batch), of_scores, proj, of_proj, *sizes, width,
        H=heads.count, Q=heads.query, BQ=query, B=TILE,
    )  # fmt: skip
    reach = 2 * time - 1
    blocks = triton.cdiv(reach, 64)
    programs = max(1, min(batch, 2 * PROGRAMS // (blocks * heads.count)))
    each = triton.cdiv(batch, programs)
    programs = triton.cdiv(batch, each)
    of_offsets = torch.empty(offsets.shape, dtype=torch.float32, device=proj.device)
    parts = torch.empty(programs, *offsets.shape, dtype=torch.float32, device=proj.device)
    launch(
        _offset_grad_kernel, (blocks, heads.count, programs), of_scores, proj, parts,
        _counters(proj.device), of_offsets, *sizes, each, width, H=heads.count, Q=heads.query,
        P=heads.position, BP=_dot_size(heads.position), BI=TILE, B=64,
    )  # fmt: skip
    return of_proj, of_offsets


def _dot_size(channels: int) -> int:
    """Channels of a tile that a matrix product takes."""
    return max(16, triton.next_power_of_2(channels))


# --------------------------------------------------------------------------- non-linear attention


@triton.jit(do_not_specialize=["size"])
def _tanh_gate_kernel(x_ptr, out_ptr, size, E, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    own = at // E * 3 * E + at % E
    inner = tl.load(x_ptr + own, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + own + E, mask=inside, other=0.0).to(tl.float32)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    tl.store(out_ptr + at, value * tanh, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _outer_gate_grad_kernel(x_ptr, out_ptr, grad_ptr, of_out_ptr, of_x_ptr, gated_ptr, size, E, B: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    own = at // E * 3 * E + at % E + 2 * E
    gate = tl.load(x_ptr + own, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_out_ptr + at, grad * gate, mask=inside)
    tl.store(of_x_ptr + own, grad * out, mask=inside)
    tl.store(gated_ptr + at, out * gate, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _tanh_gate_grad_kernel(x_ptr, grad_ptr, of_x_ptr, size, E, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    own = at // E * 3 * E + at % E
    inner = tl.load(x_ptr + own, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + own + E, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    tl.store(of_x_ptr + own, grad * value * (1.0 - tanh * tanh), mask=inside)
    tl.store(of_x_ptr + own + E, grad * tanh, mask=inside)


def tanh_gate(x: Tensor) -> Tensor:
    """The second third of (N, T, 3E) times tanh of the first."""
    out = x.new_empty(*x.shape[:2], x.size(2) // 3)
    size = out.numel()
    launch(_tanh_gate_kernel, (triton.cdiv(size, BLOCK),), x, out, size, out.size(2), BLOCK)
    return out


def outer_gate_grad(
    x: Tensor, out: Tensor, grad: Tensor, of_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Back through out * gate, the gate being the last third of `x` (N, T, 3E).

    Args:
        out: (N, T, E).
        grad: of the product.
        of_x: (N, T, 3E); takes the gate's gradient.

    Returns:
        The gradient of `out`, and the product once more.
    """
    of_out, gated, size = torch.empty_like(out), torch.empty_like(out), out.numel()
    launch(
        _outer_gate_grad_kernel, (triton.cdiv(size, BLOCK),), x, out, grad, of_out, of_x, gated,
        size, out.size(2), BLOCK,
    )  # fmt: skip
    return of_out, gated


def tanh_gate_grad(x: Tensor, grad: Tensor, of_x: Tensor) -> None:
    """Back through `tanh_gate`: fills the first two thirds of `of_x`."""
    size = grad.numel()
    launch(
        _tanh_gate_grad_kernel, (triton.cdiv(size, BLOCK),), x, grad, of_x, size, grad.size(2),
        BLOCK,
    )  # fmt: skip


# -------------------------------------------------------------------------- between two frame rates


@triton.jit
def _share(bias_ptr, FACTOR: tl.constexpr, BF: tl.constexpr):
    """The softmax of a few numbers."""
    at = tl.arange(0, BF)
    e = tl.load(bias_ptr + at, mask=at < FACTOR, other=float("-inf"))
    e = tl.exp(e - tl.max(e, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit(do_not_specialize=["size", "T", "slow"])
def _downsample_kernel(
    x_ptr, bias_ptr, out_ptr, half_ptr, size, T, slow, C, FACTOR: tl.constexpr, BF: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    frame = at // C
    n = frame // slow
    share = _share(bias_ptr, FACTOR, BF)
    step = tl.arange(0, BF)
    source = tl.minimum((frame % slow * FACTOR)[:, None] + step[None, :], T - 1)
    place = ((n * T)[:, None] + source) * C + (at % C)[:, None]
    x = tl.load(x_ptr + place, mask=inside[:, None], other=0.0)
    out = tl.sum(x * share[None, :], axis=1)
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(half_ptr + at, out, mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "slow"])
def _downsample_grad_kernel(
    of_full_ptr, of_half_ptr, x_ptr, bias_ptr, of_x_ptr, parts_ptr, counter_ptr, of_bias_ptr, rows,
    each, T, slow, C, FACTOR: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows are the slow frames; each writes the fast ones that it came from."""
    part = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, B)
    share = _share(bias_ptr, FACTOR, BF)
    step = tl.arange(0, BF)
    of_share = tl.zeros([BF], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & (channel < C)[None, :]
        place = row[:, None] * C + channel[None, :]
        grad = tl.load(of_full_ptr + place, mask=inside, other=0.0)
        grad += tl.load(of_half_ptr + place, mask=inside, other=0.0).to(tl.float32)
        begin = row % slow * FACTOR
        over = tl.zeros([BR, B], tl.float32)
        for f in tl.static_range(FACTOR):
            source = begin + f
            own = tl.sum(tl.where(step == f, share, 0.0), axis=0)
            x_at = (row // slow * T + tl.minimum(source, T - 1))[:, None] * C + channel[None, :]
            x = tl.load(x_ptr + x_at, mask=inside, other=0.0)
            dot = tl.sum(tl.sum(tl.where(inside, grad * x, 0.0), axis=1), axis=0)
            of_share += tl.where(step == f, dot, 0.0)
            # The last frame stands for those that are missing as well.
            over += tl.where((source > T - 1)[:, None], grad * own, 0.0)
        for f in tl.static_range(FACTOR):
            source = begin + f
            own = tl.sum(tl.where(step == f, share, 0.0), axis=0)
            x_at = (row // slow * T + source)[:, None] * C + channel[None, :]
            value = grad * own + tl.where((source == T - 1)[:, None], over, 0.0)
            tl.store(of_x_ptr + x_at, value, mask=inside & (source < T)[:, None])
    there = step < FACTOR
    tl.store(parts_ptr + part * FACTOR + step, of_share, mask=there)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr, parts):
        total = _total(parts_ptr, parts, FACTOR, step, there, BF)
        own = share * (total - tl.sum(total * share, axis=0))
        tl.store(of_bias_ptr + step, own, mask=there)


def downsample(x: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weighted means of groups of frames, (N, T, C) to (N, ceil(T / F), C): full and half."""
    batch, time, channels = x.shape
    factor = bias.numel()
    slow = triton.cdiv(time, factor)
    out = x.new_empty(batch, slow, channels)
    half = torch.empty_like(out, dtype=dtype)
    size, wide = out.numel(), triton.next_power_of_2(factor)
    block = BLOCK // wide
    launch(
        _downsample_kernel, (triton.cdiv(size, block),), x, bias, out, half, size, time, slow,
        channels, FACTOR=factor, BF=wide, B=block,
    )  # fmt: skip
    return out, half


def downsample_grad(
    of_full: Tensor, of_half: Tensor, x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (N, T, C) and of the bias (F,)."""
    batch, time, channels = x.shape
    factor, slow = bias.numel(), of_full.size(1)
    rows = batch * slow
    block, together = _whole_rows(channels)
    programs = max(1, min(triton.cdiv(rows, together), PROGRAMS))
    each = triton.cdiv(triton.cdiv(rows, programs), together) * together
    programs = triton.cdiv(rows, each)
    parts, of_bias = _sums(x, programs, factor)
    of_x = torch.empty_like(x)
    launch(
        _downsample_grad_kernel, (programs,), of_full, of_half, x, bias, of_x, parts,
        _counters(x.device), of_bias, rows, each, time, slow, channels, FACTOR=factor,
        BF=triton.next_power_of_2(factor), BR=together, B=block,
    )  # fmt: skip
    return of_x, of_bias


@triton.jit(do_not_specialize=["size", "T", "slow", "factor"])
def _combine_kernel(
    x_ptr, slow_ptr, scale_ptr, out_ptr, size, T, slow, C, factor, B: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    frame = at // C
    own = (frame // T * slow + frame % T // factor) * C + at % C
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = tl.load(slow_ptr + own, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + at % C, mask=inside, other=0.0)
    tl.store(out_ptr + at, x + scale * (y - x), mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "T", "slow", "factor", "low", "high"])
def _combine_grad_kernel(
    grad_ptr, x_ptr, slow_ptr, scale_ptr, of_x_ptr, of_slow_ptr, parts_ptr, counter_ptr, sums_ptr,
    rows, each, T, slow, C, factor, low, high, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows are the slow frames; each takes the fast ones that it went into."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    scale = tl.load(scale_ptr + column, mask=there, other=0.0)
    of_scale = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & there[None, :]
        slow_at = row[:, None] * C + column[None, :]
        y = tl.load(slow_ptr + slow_at, mask=inside, other=0.0)
        of_y = tl.zeros([BR, BC], tl.float32)
        for f in range(0, factor):
            frame = row % slow * factor + f
            own = inside & (frame < T)[:, None]
            at = (row // slow * T + frame)[:, None] * C + column[None, :]
            grad = tl.load(grad_ptr + at, mask=own, other=0.0)
            x = tl.load(x_ptr + at, mask=own, other=0.0)
            of_y += grad
            tl.store(of_x_ptr + at, grad * (1.0 - scale[None, :]), mask=own)
            of_scale += tl.sum(tl.where(own, grad * (y - x), 0.0), axis=0)
        tl.store(of_slow_ptr + slow_at, of_y * scale[None, :], mask=inside)
    tl.store(parts_ptr + part * C + column, of_scale, mask=there)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        total = _total(parts_ptr, parts, C, column, there, BC)
        tl.store(sums_ptr + column, _turned_inside(total, scale, low, high), mask=there)


def combine(x: Tensor, slow: Tensor, scale: Tensor, factor: int) -> Tensor:
    """x + scale * (slow, each frame repeated `factor` times, - x), (N, T, C) float32."""
    out, size = torch.empty_like(x), x.numel()
    launch(
        _combine_kernel, (triton.cdiv(size, BLOCK),), x, slow, scale, out, size, x.size(1),
        slow.size(1), x.size(2), factor, BLOCK,
    )  # fmt: skip
    return out


def combine_grad(
    grad: Tensor, x: Tensor, slow: Tensor, scale: Tensor, factor: int, limits: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, of `slow` and of the scale (C,)."""
    _, time, channels = x.shape
    rows = slow.numel() // channels
    programs, each, block, counters = _parts(x, rows, channels, 8)
    parts, of_scale = _sums(x, programs, channels)
    of_x, of_slow = torch.empty_like(x), torch.empty_like(slow)
    launch(
        _combine_grad_kernel, (programs, triton.cdiv(channels, block)), grad, x, slow, scale, of_x,
        of_slow, parts, counters, of_scale, rows, each, time, slow.size(1), channels, factor,
        *limits, BR=8, BC=block,
    )  # fmt: skip
    return of_x, of_slow, of_scale


# -------------------------------------------------------------------------------------- regularisers


@triton.jit
def _beyond(x, low, high):
    """1 where `x` is below `low`, -1 where it is above `high`, else 0."""
    return tl.where(x < low, 1.0, 0.0) - tl.where(x > high, 1.0, 0.0)


@triton.jit(do_not_specialize=["rows", "each", "every", "least", "most", "small", "large", "share"])
def _balance_kernel(
    x_ptr, grad_ptr, parts_ptr, counter_ptr, push_ptr, rows, each, every, C, X_ROW, GRAD_ROW,
    least, most, small, large, share, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    positive = tl.zeros([BC], tl.float32)
    size = tl.zeros([BC], tl.float32)
    of_grad = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        row = first + tl.arange(0, BR)
        inside = (row < last)[:, None] & there[None, :]
        x_at = (row * every)[:, None] * X_ROW + column[None, :]
        x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
        grad_at = (row * every)[:, None] * GRAD_ROW + column[None, :]
        grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0).to(tl.float32)
        positive += tl.sum(tl.where(x > 0.0, 1.0, 0.0), axis=0)
        size += tl.sum(tl.abs(x), axis=0)
        of_grad += tl.sum(tl.abs(grad), axis=0)
    own = parts_ptr + part * 3 * C + column
    tl.store(own, positive, mask=there)
    tl.store(own + C, size, mask=there)
    tl.store(own + 2 * C, of_grad, mask=there)
    parts = tl.num_programs(0)
    if _is_last(counter_ptr + tl.program_id(1), parts):
        positive = _total(parts_ptr, parts, 3 * C, column, there, BC) / rows
        size = _total(parts_ptr + C, parts, 3 * C, column, there, BC) / rows
        push = share * _total(parts_ptr + 2 * C, parts, 3 * C, column, there, BC) / rows
        tl.store(push_ptr + column, push * _beyond(positive, least, most), mask=there)
        tl.store(push_ptr + C + column, push * _beyond(size, small, large), mask=there)


@triton.jit(do_not_specialize=["size"])
def _push_kernel(x_ptr, grad_ptr, push_ptr, size, C, X_ROW, GRAD_ROW, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    row, column = at // C, at % C
    x = tl.load(x_ptr + row * X_ROW + column, mask=inside, other=0.0).to(tl.float32)
    own = grad_ptr + row * GRAD_ROW + column
    grad = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(push_ptr + column, mask=inside, other=0.0)
    grow = tl.load(push_ptr + C + column, mask=inside, other=0.0)
    sign = tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)
    tl.store(own, grad - sign * grow - shift, mask=inside)


def balance(
    x: Tensor, grad: Tensor, limits: tuple[float, float, float, float], share: float, every: int
) -> None:
    """Adds a balancer's pushes for `x` (N, T, C) to `grad`, in place.

    Args:
        x: rows of channels, which may be some of a wider tensor's; `grad` likewise.
        limits: of the fraction of positive values, and of the mean magnitude.
        share: size of a push, relative to the mean magnitude of the channel's gradient.
        every: the statistics are those of one frame in so many.
    """
    channels = x.size(-1)
    frames = x.numel() // channels
    rows = triton.cdiv(frames, every)
    programs, each, block, counters = _parts(x, rows, channels, ROWS)
    parts = torch.empty(programs, 3 * channels, dtype=torch.float32, device=x.device)
    push = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    launch(
        _balance_kernel, (programs, triton.cdiv(channels, block)), x, grad, parts, counters, push,
        rows, each, every, channels, x.stride(-2), grad.stride(-2), *limits, share,
        BR=ROWS, BC=block,
    )  # fmt: skip
    launch(
        _push_kernel, (triton.cdiv(x.numel(), BLOCK),), x, grad, push, x.numel(), channels,
        x.stride(-2), grad.stride(-2), BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["limit", "share"])
def _whiten_kernel(
    cov_ptr, square_ptr, of_squares_ptr, out_ptr, C, limit, share, BR: tl.constexpr, B: tl.constexpr
):
    column = tl.arange(0, B)
    of_squares = tl.load(of_squares_ptr + column, mask=column < C, other=0.0)
    size = tl.sqrt(tl.sum(of_squares, axis=0))
    trace = tl.zeros([B], tl.float32)
    squares = tl.zeros([B], tl.float32)
    cubes = tl.zeros([B], tl.float32)
    for first in range(0, C, BR):
        row = first + tl.arange(0, BR)
        inside = (row < C)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        cov = tl.load(cov_ptr + at, mask=inside, other=0.0)
        trace += tl.sum(tl.where(row[:, None] == column[None, :], cov, 0.0), axis=0)
        squares += tl.sum(cov * cov, axis=0)
        cubes += tl.sum(cov * tl.load(square_ptr + at, mask=inside, other=0.0), axis=0)
    t = tl.sum(trace, axis=0)
    s = tl.sum(squares, axis=0)
    centre = s / (t + 1e-20)
    norm = tl.sqrt(tl.maximum(tl.sum(cubes, axis=0) - 2 * centre * s + centre * centre * t, 0.0))
    too_high = s * C > limit * (t * t + 1e-20)
    factor = tl.where(too_high, share * size / (norm + 1e-20), 0.0)
    for first in range(0, C, BR):
        row = first + tl.arange(0, BR)
        inside = (row < C)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        cov = tl.load(cov_ptr + at, mask=inside, other=0.0)
        own = cov - tl.where(row[:, None] == column[None, :], centre, 0.0)
        tl.store(out_ptr + at, factor * own, mask=inside)


def whiten(x: Tensor, grad: Tensor, limit: float, share: float) -> Tensor:
    """`grad` and the gradient of the whitening measure of `x`, both (N, T, C), if it is too high.

    With S the covariance of the centred X, the measure is m = C tr(S^2) / tr(S)^2 and its gradient
    along X (S - tr(S^2) / tr(S) I), whose norm follows from the traces of S, S^2 and S^3.
    """
    channels = x.size(-1)
    rows = x.reshape(-1, channels)
    centred = rows - (column_sums(rows) / len(rows)).to(x.dtype)
    covariance = mm32(centred.t(), centred)
    matrix = torch.empty(channels, channels, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(channels)
    launch(
        _whiten_kernel, (1,), covariance, covariance @ covariance, column_sums(grad, square=True),
        matrix, channels, limit, share, BR=max(1, 8192 // block), B=block,
    )  # fmt: skip
    flat = grad.reshape(-1, channels)
    if grad.dtype == x.dtype:
        return torch.addmm(flat, centred, matrix).view_as(grad)
    return flat.add(centred @ matrix).view_as(grad)
