"""Kernels of attention with relative positions, in chunks.

Keys that no chunk of a query's may see are never touched; of those past the end of an utterance the
scores are capped.

Shapes: N batch, T frames, H heads, D value dim per head, E channels of the non-linear attention,
R = 2T - 1 relative positions, W channels of the projection, H * (2 query + position dims).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from icetransfer.model.attention import MASKED_SCORE
from icetransfer.model.gpu import launch
from icetransfer.model.kernels.common import (
    PROGRAMS,
    Sight,
    cdiv,
    counters,
    dot,
    is_last,
    next_power_of_2,
    scratch,
    total_of_tiles,
)

MASKED = tl.constexpr(MASKED_SCORE)
NEVER = tl.constexpr(float("-inf"))


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
    score = dot(q, tl.load(proj_ptr + at, mask=there, other=0.0))
    seen = _is_seen(query, key, T, chunk, left)
    offset = key[None, :] - query[:, None] + (T - 1)
    for p in tl.static_range(P):
        own = tl.load(
            proj_ptr + query * WIDTH + 2 * H * Q + h * P + p, mask=query < T, other=0.0
        ).to(tl.float32)
        table = tl.load(offsets_ptr + (h * P + p) * (2 * T - 1) + offset, mask=seen, other=0.0).to(
            tl.float32
        )
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
    q = tl.load(proj + (query * WIDTH)[:, None] + (h * Q + channel)[None, :], mask=there, other=0.0)
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


@triton.jit
def _rows(pointer, start, frame, channel, T, D, width):
    """The values (frames, channels) of an array (N, T, width)."""
    there = (frame < T)[:, None] & (channel < D)[None, :]
    return tl.load(
        pointer + (start + frame)[:, None] * width + channel[None, :], mask=there, other=0.0
    )


@triton.jit
def _weights_at(weights, query, key, T, S, chunk, left):
    """What queries (rows) have for keys (columns), zero where a chunk may not see them."""
    seen = _is_seen(query, key, T, chunk, left)
    return tl.load(weights + (query * S)[:, None] + key[None, :], mask=seen, other=0.0)


@triton.jit(do_not_specialize=["N", "T", "chunk", "left"])
def _attend_kernel(
    weights_ptr, value_ptr, gate_ptr, out_ptr, gated_ptr, N, T, S, chunk, left, D, WIDTH,
    GATE_WIDTH, BACK: tl.constexpr, GATED: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """For each query the keys' values, weighted and added; or back, for each key the queries'."""
    h = tl.program_id(1) // N
    n = tl.program_id(1) % N
    first = tl.program_id(0) * B
    own = first + tl.arange(0, B)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    weights = weights_ptr + tl.program_id(1).to(tl.int64) * T * S
    start = n.to(tl.int64) * T
    total = tl.zeros([B, BD], tl.float32)
    last = tl.minimum(first + B, T) - 1
    if BACK:
        low, high = _queries_of(first, last, T, chunk, left)
    else:
        low, high = _keys_of(first, last, T, chunk, left)
    for at in range(low // B * B, high, B):
        other = at + tl.arange(0, B)
        if BACK:
            weight = tl.trans(_weights_at(weights, other, own, T, S, chunk, left))
        else:
            weight = _weights_at(weights, own, other, T, S, chunk, left)
        total += dot(weight, _rows(value_ptr + h * D, start, other, channel, T, D, WIDTH))
    inside = (own < T)[:, None] & (channel < D)[None, :]
    place = (start + own)[:, None] * WIDTH + (h * D + channel)[None, :]
    tl.store(out_ptr + place, total, mask=inside)
    if GATED:
        gate = _rows(gate_ptr, start, own, channel, T, D, GATE_WIDTH).to(tl.float32)
        tl.store(gated_ptr + place, total * gate, mask=inside)


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
        grad = dot(g1, tl.trans(v1))
        grad += dot(g2, tl.trans(v2))
        if h == 0:
            for e in range(0, E, BE):
                g3 = _rows(g3_ptr, start, query, e + wide, T, E, E)
                v3 = _rows(v3_ptr, start, key, e + wide, T, E, E)
                grad += dot(g3, tl.trans(v3))
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
        of_query += dot(of_score.to(k.dtype), k)
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
        of_score = _weights_at(of_scores_ptr + base, query, key, T, S, chunk, left)
        q = tl.load(
            proj_ptr + (start + query)[:, None] * WIDTH + (h * Q + channel)[None, :],
            mask=(query < T)[:, None] & (channel < Q)[None, :],
            other=0.0,
        )
        total += dot(tl.trans(of_score), q)
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
    if chunk > 0:  # no key is seen from further away than this
        if first - (T - 1) >= chunk:
            high = low
        if (left >= 0) & (first + B - T <= -(left + 1) * chunk):
            high = low
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
                proj_ptr + ((start + query) * WIDTH)[None, :] + (2 * H * Q + h * P + p)[:, None],
                mask=(p < P)[:, None] & (query < T)[None, :],
                other=0.0,
            )
            total += dot(own, of_score)
    R = 2 * T - 1
    inside = (p < P)[:, None] & (offset < R)[None, :]
    place = (h * P + p)[:, None] * R + offset[None, :]
    size = H * P * R
    tl.store(parts_ptr + part.to(tl.int64) * size + place, total, mask=inside)
    parts = tl.num_programs(2)
    if is_last(counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), parts):
        tl.store(
            out_ptr + place, total_of_tiles(parts_ptr, parts, size, place, inside), mask=inside
        )


class Heads(NamedTuple):
    """Sizes of the attention's heads: how many, and the dims of queries and of positions."""

    count: int
    query: int
    position: int


TILE = 64  # queries and keys of a program


def attention_weights(proj: Tensor, offsets: Tensor, heads: Heads, sight: Sight) -> Tensor:
    """Softmax of the capped scores of content and position.

    `proj` (N, T, W) has the queries, keys and positions of all heads, `offsets` (H * P, R) is the
    projected encoding of relative positions.

    Returns:
        (H, N, T, S), S being T and what makes rows begin at multiples of 16.  Keys of other chunks
        that a query may not see are left as they were; keys past the end have weight zero.
    """
    batch, time, width = proj.shape
    keys = cdiv(time, 16) * 16
    out = proj.new_empty(heads.count, batch, time, keys)
    grid = (cdiv(time, TILE), heads.count * batch)
    launch(
        _weights_kernel, grid, proj, offsets, sight.lengths, out, batch, time, keys, sight.chunk,
        sight.left, sight.step, width, H=heads.count, Q=heads.query, P=heads.position,
        BQ=_dot_size(heads.query), B=TILE,
    )  # fmt: skip
    return out


def attend(weights: Tensor, value: Tensor, heads: int, sight: Sight) -> Tensor:
    """Values (N, T, heads * D) averaged with the weights of the first heads."""
    return _attend(weights, value, heads, sight)[0]


def attend_grad(weights: Tensor, grad: Tensor, heads: int, sight: Sight) -> Tensor:
    """The gradient of the values from that of `attend`, both (N, T, heads * D)."""
    return _attend(weights, grad, heads, sight, back=True)[0]


def attend_gated(
    weights: Tensor, value: Tensor, gates: Tensor, sight: Sight
) -> tuple[Tensor, Tensor]:
    """Values (N, T, E) averaged with the first head's weights, and that times the gates.

    The gates are the last third of (N, T, 3E).
    """
    return _attend(weights, value, 1, sight, gates)


def _attend(
    weights: Tensor, value: Tensor, heads: int, sight: Sight, gates: Tensor | None = None,
    back: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, time, width = value.shape
    channels = width // heads
    out = torch.empty_like(value)
    gated = out if gates is None else torch.empty_like(value)
    block = min(64, _dot_size(channels))
    grid = (cdiv(time, TILE), heads * batch, cdiv(channels, block))
    launch(
        _attend_kernel, grid, weights, value, value if gates is None else gates[:, :, 2 * width :],
        out, gated, batch, time, weights.size(3), sight.chunk, sight.left, channels, width,
        3 * width, BACK=back, GATED=gates is not None, BD=block, B=TILE,
    )  # fmt: skip
    return out, gated


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

    Two uses of the weights are by all heads, (N, T, H * D), and the last by the first, (N, T, E).
    """
    batch, time, width = proj.shape
    channels, extra = uses[0].value.size(2) // heads.count, uses[2].value.size(2)
    of_scores, of_proj = torch.empty_like(weights), torch.empty_like(proj)
    sizes = (batch, time, weights.size(3), sight.chunk, sight.left)
    tiles = cdiv(time, TILE)
    query, position = _dot_size(heads.query), next_power_of_2(heads.position)
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
    blocks = cdiv(reach, 64)
    programs = max(1, min(batch, 2 * PROGRAMS // (blocks * heads.count)))
    each = cdiv(batch, programs)
    programs = cdiv(batch, each)
    of_offsets = torch.empty(offsets.shape, dtype=torch.float32, device=proj.device)
    launch(
        _offset_grad_kernel, (blocks, heads.count, programs), of_scores, proj,
        scratch(programs * offsets.numel(), proj.device), counters(proj.device), of_offsets,
        *sizes, each, width, H=heads.count, Q=heads.query,
        P=heads.position, BP=_dot_size(heads.position), BI=TILE, B=64,
    )  # fmt: skip
    return of_proj, of_offsets


def _dot_size(channels: int) -> int:
    """Channels of a tile that a matrix product takes."""
    return max(16, next_power_of_2(channels))
