"""What the kernels share: tiles, sums over all frames, draws, and the swoosh.

What gradients of parameters sum over all frames is summed by a fixed number of programs, each of
which leaves a part; the program that ends last adds the parts up, in their order.  So a sum costs
no launch of its own and is the same in each run.

Shapes: N batch, T frames, C channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from icetransfer.model.gpu import launch
from icetransfer.model.swoosh import SWOOSH_SLOPE

TILE_VALUES = 2048  # of an elementwise program
PROGRAMS = 1024  # about so many share a sum over all frames
CHANNELS = 64  # of a program that sums
ROWS = 32  # frames that it takes at a time
SLOPE = tl.constexpr(SWOOSH_SLOPE)
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


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up; triton.cdiv takes 5 microseconds, thousands of times a step."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; likewise."""
    return 1 << (n - 1).bit_length()


def channel_block(channels: int) -> int:
    """Channels of a program that convolves."""
    return min(64, next_power_of_2(channels))


def whole_rows(channels: int) -> tuple[int, int]:
    """Channels, rounded up to a power of two, and rows of a program that takes whole ones."""
    block = next_power_of_2(channels)
    return block, max(1, TILE_VALUES // block)


def split(rows: int, most: int, together: int) -> tuple[int, int]:
    """Deals rows out to so many programs at most: their number, and the rows of each.

    The rows of each are a multiple of those that it takes together.
    """
    programs = max(1, min(cdiv(rows, together), most))
    each = cdiv(cdiv(rows, programs), together) * together
    return cdiv(rows, each), each


class Shares(NamedTuple):
    """How programs share sums over frames.

    Attributes:
        grid: programs for frames, and for channels.
        each: frames that a program takes, at most.
        parts: memory for what each leaves.
        counters: zeros that programs count up in, and that the last one sets back.
        sums: (number, C) float32, what comes out.
        tile: frames and channels at a time, as settings of the kernel.
    """

    grid: tuple[int, int]
    each: int
    parts: Tensor
    counters: Tensor
    sums: Tensor
    tile: dict[str, int]


def shares(x: Tensor, rows: int, channels: int, number: int = 1, frames: int = ROWS) -> Shares:
    """Shares out so many sums of each channel, over rows, in tiles of so many frames."""
    block = min(CHANNELS, max(16, next_power_of_2(channels)))
    blocks = cdiv(channels, block)
    programs, each = split(rows, PROGRAMS // blocks, frames)
    return Shares(
        (programs, blocks), each, scratch(programs * number * channels, x.device),
        counters(x.device), torch.empty(number, channels, dtype=torch.float32, device=x.device),
        {"BR": frames, "BC": block},
    )  # fmt: skip


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Zeros; kernels that use them run one after the other, and leave them as they were."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


_scratch: dict[torch.device, Tensor] = {}


def scratch(size: int, device: torch.device) -> Tensor:
    """Memory for the parts of a kernel's sums; the next kernel may use it again."""
    if device not in _scratch or _scratch[device].numel() < size:
        _scratch[device] = torch.empty(2 * size, dtype=torch.float32, device=device)
    return _scratch[device]


def tiles(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the settings of a kernel that takes each value once."""
    block = min(128, next_power_of_2(channels))
    frames = max(1, TILE_VALUES // block)
    grid = (cdiv(rows, frames), cdiv(channels, block))
    return grid, {"BR": frames, "BC": block}


@triton.jit
def tile(rows, C, BR: tl.constexpr, BC: tl.constexpr):
    """A program's rows and columns, which of them are there, and their places."""
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row, inside, at = rows_from(tl.program_id(0) * BR, rows, column, C, BR)
    return row, column, inside, at


@triton.jit
def rows_from(first, last, column, C, BR: tl.constexpr):
    """The next rows before the last, which of their values are there, and their places."""
    row = first + tl.arange(0, BR)
    inside = (row < last)[:, None] & (column < C)[None, :]
    return row, inside, row.to(tl.int64)[:, None] * C + column[None, :]


@triton.jit
def dot(a, b):
    """The product of two tiles in float32; the interpreter takes bf16 for integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def is_last(counter_ptr, programs):
    """Whether all other programs that count here have ended, and what they stored can be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def total_of(parts_ptr, parts, stride, column, mask, B: tl.constexpr):
    """The sum of the parts (parts, stride) at the columns."""
    total = tl.zeros([B], tl.float32)
    for first in range(0, parts, PART_ROWS):
        part = first + tl.arange(0, PART_ROWS)
        there = (part < parts)[:, None] & mask[None, :]
        at = part[:, None].to(tl.int64) * stride + column[None, :]
        total += tl.sum(
            tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg"), axis=0
        )
    return total


@triton.jit
def total_of_tiles(parts_ptr, parts, stride, place, mask):
    """The sum of the parts (parts, stride) at a tile of places."""
    total = tl.zeros(place.shape, tl.float32)
    for first in range(0, parts, PART_TILES):
        part = first + tl.arange(0, PART_TILES)
        there = (part < parts)[:, None, None] & mask[None, :, :]
        at = part[:, None, None].to(tl.int64) * stride + place[None, :, :]
        total += tl.sum(
            tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg"), axis=0
        )
    return total


@triton.jit
def uniform(seed, index):
    """A number in [0, 1) for each index, by two rounds of an integer hash."""
    x = index.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    for _ in tl.static_range(2):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        x = x + seed.to(tl.uint32)
    return (x >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def turned_inside(grad, x, low, high):
    """A gradient that never pushes a parameter further outside [low, high]."""
    grad = tl.where(x < low, -tl.abs(grad), grad)
    return tl.where(x > high, tl.abs(grad), grad)


@triton.jit
def swoosh_of(x, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """The swoosh, for values of any size."""
    z = x - SHIFT
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))) - SLOPE * x - OFFSET


@triton.jit
def swoosh_slope(x, SHIFT: tl.constexpr):
    """Its derivative."""
    return 1.0 / (1.0 + tl.exp(SHIFT - x)) - SLOPE


@triton.jit
def finish(sums, parts_ptr, counter_ptr, out_ptr, column, there, C, BC: tl.constexpr):
    """Leaves a program's part of sums over frames; the last program adds all parts up."""
    tl.store(parts_ptr + tl.program_id(0) * C + column, sums, mask=there)
    parts = tl.num_programs(0)
    if is_last(counter_ptr + tl.program_id(1), parts):
        total = total_of(parts_ptr, parts, C, column, there, BC)
        tl.store(out_ptr + column, total, mask=there)


@triton.jit(do_not_specialize=["rows", "each"])
def _column_sums_kernel(
    x_ptr, parts_ptr, counter_ptr, out_ptr, rows, each, C, SQUARE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    there = column < C
    sums = tl.zeros([BC], tl.float32)
    last = tl.minimum((part + 1) * each, rows)
    for first in range(part * each, last, BR):
        _, inside, at = rows_from(first, last, column, C, BR)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(x * x if SQUARE else x, axis=0)
    finish(sums, parts_ptr, counter_ptr, out_ptr, column, there, C, BC)


def column_sums(x: Tensor, square: bool = False) -> Tensor:
    """Sums over all but the last dimension of (..., C), of the values or squares: (C,) float32."""
    x = x.contiguous()
    channels = x.size(-1)
    rows = x.numel() // channels
    share = shares(x, rows, channels)
    launch(
        _column_sums_kernel, share.grid, x, share.parts, share.counters, share.sums, rows,
        share.each, channels, SQUARE=square, **share.tile,
    )  # fmt: skip
    return share.sums[0]
