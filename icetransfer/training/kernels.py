"""Kernels of loss, optimiser and SpecAugment in Triton, each with the function that runs it.

Imported only where Triton is; see `model/gpu.py`.  The transducer's lattice is walked by a program
for each sequence, frame by frame; within a frame, where a symbol's place depends on the one before
it, by a scan of log2(S) steps.  Forward variables are float64, as in the plain form: a long
utterance's score has thousands of nats, while its arcs' probabilities come from differences of
scores.  Exponentials and logarithms, of differences, are float32.

Shapes: N batch, T frames, S symbols, R pruning range, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from icetransfer.model.gpu import launch
from icetransfer.model.kernels.common import cdiv, next_power_of_2

NEVER = tl.constexpr(-1.0e30)  # the log-probability of what cannot be; sums of it stay finite
UNREACHABLE = tl.constexpr(-1.0e29)


@triton.jit
def _log_step(move1, node1, move2, node2):
    """Joins two stretches of the recurrence node[s] = log(e^node[s] + e^(node[s-1] + move))."""
    through = node1 + move2
    high = tl.maximum(through, node2)
    low = tl.minimum(through, node2)
    return move1 + move2, high + tl.log(1.0 + tl.exp((low - high).to(tl.float32))).to(tl.float64)


@triton.jit
def _step(factor1, value1, factor2, value2):
    """Joins two stretches of the recurrence value[s] += factor[s] value[s-1]."""
    return factor1 * factor2, value1 * factor2 + value2


@triton.jit(do_not_specialize=["T", "S", "px0", "px1", "px2", "py0", "py1", "py2"])
def _forward_kernel(
    px_ptr, py_ptr, boundary_ptr, alpha_ptr, score_ptr, T, S, px0, px1, px2, py0, py1, py2,
    B: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    symbols = tl.load(boundary_ptr + 4 * n + 2)
    frames = tl.load(boundary_ptr + 4 * n + 3)
    s = tl.arange(0, B)
    arrives = (s >= 1) & (s <= S)
    px = px_ptr + n * px0 + (s - 1) * px1
    py = py_ptr + n * py0 + s * py1
    alpha = alpha_ptr + n * T * (S + 1) + s
    entered = tl.where(s == 0, 0.0, NEVER).to(tl.float64)
    for t in range(0, frames):
        move = tl.load(px + t * px2, mask=arrives, other=NEVER)
        move = tl.maximum(move, NEVER).to(tl.float64)
        _, node = tl.associative_scan((move, entered), 0, _log_step)
        tl.store(alpha + t * (S + 1), node, mask=s <= S)
        stay = tl.load(py + t * py2, mask=s <= S, other=NEVER)
        entered = node + tl.maximum(stay, NEVER).to(tl.float64)
    score = tl.sum(tl.where(s == symbols, entered, 0.0), axis=0)
    tl.store(score_ptr + n, tl.where(score > UNREACHABLE, score, float("-inf")))


@triton.jit(do_not_specialize=["T", "S", "px0", "px1", "px2", "py0", "py1", "py2"])
def _occupation_kernel(
    px_ptr, py_ptr, boundary_ptr, alpha_ptr, score_ptr, px_grad_ptr, py_grad_ptr, T, S,
    px0, px1, px2, py0, py1, py2, B: tl.constexpr,
):  # fmt: skip
    """Probabilities that a path takes each arc: px_grad (N, T + 1, S), py_grad (N, T, S + 1)."""
    n = tl.program_id(0).to(tl.int64)
    symbols = tl.load(boundary_ptr + 4 * n + 2)
    frames = tl.load(boundary_ptr + 4 * n + 3)
    possible = tl.load(score_ptr + n) > UNREACHABLE
    s = tl.arange(0, B)
    leaves = s < symbols
    arrives = (s >= 1) & (s <= symbols)
    px = px_ptr + n * px0 + s * px1
    py = py_ptr + n * py0 + s * py1
    alpha = alpha_ptr + n * T * (S + 1) + s
    px_grad = px_grad_ptr + n * (T + 1) * S + s - 1
    py_grad = py_grad_ptr + n * T * (S + 1) + s
    zeros = tl.zeros([B], tl.float32)
    for t in range(frames, T + 1):
        tl.store(px_grad + t * S, zeros, mask=(s >= 1) & (s <= S))
        tl.store(py_grad + t * (S + 1), zeros, mask=s <= tl.where(t < T, S, -1))
    after = tl.where(
        s == symbols, tl.where(possible, 1.0, 0.0), 0.0
    )  # the occupation of the frame after
    later = tl.zeros([B], tl.float64)  # its forward variables
    for back in range(0, frames):
        t = frames - 1 - back
        row = alpha + t * (S + 1)
        node = tl.load(row, mask=s <= S, other=NEVER)
        stay = tl.load(py + t * py2, mask=s <= S, other=NEVER)
        stay = tl.maximum(stay, NEVER).to(tl.float64)
        # The only arc into the end of the lattice is the last blank.
        stay = tl.where(back == 0, 0.0, node + stay - later).to(tl.float32)
        stayed = after * tl.exp(tl.minimum(stay, 0.0))
        tl.store(py_grad + t * (S + 1), stayed, mask=s <= S)
        move = tl.maximum(tl.load(px + t * px2, mask=leaves, other=NEVER), NEVER).to(tl.float64)
        to = tl.load(row + 1, mask=leaves, other=0.0)
        leaving = tl.exp(tl.minimum((node + move - to).to(tl.float32), 0.0))
        leaving = tl.where(leaves, leaving, 0.0)
        _, after = tl.associative_scan((leaving, stayed), 0, _step, reverse=True)
        # The arc into each place, once more: it lies where its source is.
        source = tl.load(row - 1, mask=arrives, other=0.0)
        move = tl.load(px + t * px2 - px1, mask=arrives, other=NEVER)
        move = tl.maximum(move, NEVER).to(tl.float64)
        entering = tl.exp(tl.minimum((source + move - node).to(tl.float32), 0.0))
        moved = tl.where(arrives, entering * after, 0.0)
        tl.store(px_grad + t * S, moved, mask=(s >= 1) & (s <= S))
        later = node


def lattice_scores(px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of all paths through the regular lattice.

    Args:
        px: (N, S, T) float32 log-probabilities of the symbols.
        py: (N, S+1, T) of the blanks.
        boundary: (N, 4), see `rnnt`.

    Returns:
        Scores (N,) float64, and the forward variables (N, T, S+1) for `lattice_occupations`.
    """
    N, S, T = px.shape
    alpha = torch.empty(N, T, S + 1, dtype=torch.float64, device=px.device)
    scores = torch.empty(N, dtype=torch.float64, device=px.device)
    launch(
        _forward_kernel, (N,), px, py, boundary.contiguous(), alpha, scores, T, S,
        *px.stride(), *py.stride(), **_settings(S),
    )  # fmt: skip
    return scores, alpha


def lattice_occupations(
    px: Tensor, py: Tensor, boundary: Tensor, scores: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """The probabilities that a path takes each arc, from what `lattice_scores` has given.

    Returns:
        (N, S, T+1) and (N, S+1, T) float32.
    """
    N, S, T = px.shape
    px_grad = torch.empty(N, T + 1, S, dtype=torch.float32, device=px.device)
    py_grad = torch.empty(N, T, S + 1, dtype=torch.float32, device=px.device)
    launch(
        _occupation_kernel, (N,), px, py, boundary.contiguous(), alpha, scores, px_grad, py_grad,
        T, S, *px.stride(), *py.stride(), **_settings(S),
    )  # fmt: skip
    return px_grad.transpose(1, 2), py_grad.transpose(1, 2)


def _settings(S: int) -> dict[str, int]:
    block = next_power_of_2(S + 1)
    return {"B": block, "num_warps": 1 if block <= 128 else 4}


@triton.jit
def _pick_kernel(
    logits_ptr, targets_ptr, picked_ptr, blanks_ptr, normaliser_ptr, V, BLANK: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, B)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, axis=0)
    normaliser = largest + tl.log(tl.sum(tl.exp(logits - largest), axis=0))
    target = tl.load(targets_ptr + row)
    picked = tl.load(logits_ptr + row * V + target).to(tl.float32)
    blank = tl.load(logits_ptr + row * V + BLANK).to(tl.float32)
    tl.store(picked_ptr + row, picked - normaliser)
    tl.store(blanks_ptr + row, blank - normaliser)
    tl.store(normaliser_ptr + row, normaliser)


@triton.jit
def _pick_grad_kernel(
    logits_ptr, targets_ptr, normaliser_ptr, of_picked_ptr, of_blanks_ptr, out_ptr, V,
    BLANK: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, B)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    target = tl.load(targets_ptr + row)
    of_picked = tl.load(of_picked_ptr + row)
    of_blank = tl.load(of_blanks_ptr + row)
    grad = -(of_picked + of_blank) * tl.exp(logits - tl.load(normaliser_ptr + row))
    grad += tl.where(v == target, of_picked, 0.0) + tl.where(v == BLANK, of_blank, 0.0)
    tl.store(out_ptr + row * V + v, grad, mask=v < V)


def pick_log_probs(logits: Tensor, targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Log softmax of logits at one target and at the blank.

    Args:
        logits: (N, T, R, V), of any precision.
        targets: (N, T, R).
        blank: its number.

    Returns:
        Two (N, T, R) float32.
    """
    return _PickLogProbs.apply(logits, targets, blank)


class _PickLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        logits, targets = logits.contiguous(), targets.contiguous()
        picked, blanks, normaliser = torch.empty(
            3, *targets.shape, dtype=torch.float32, device=logits.device
        ).unbind(0)
        ctx.settings = {"BLANK": blank, "B": next_power_of_2(logits.size(-1))}
        launch(
            _pick_kernel, (targets.numel(),), logits, targets, picked, blanks, normaliser,
            logits.size(-1), **ctx.settings,
        )  # fmt: skip
        ctx.save_for_backward(logits, targets, normaliser)
        return picked, blanks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_picked: Tensor, of_blanks: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normaliser = ctx.saved_tensors
        out = torch.empty_like(logits)
        launch(
            _pick_grad_kernel, (targets.numel(),), logits, targets, normaliser,
            of_picked.contiguous(), of_blanks.contiguous(), out, logits.size(-1), **ctx.settings,
        )  # fmt: skip
        return out, None, None


@triton.jit
def _segment_dot_kernel(a_ptr, b_ptr, bounds_ptr, parts_ptr, B: tl.constexpr):
    block = tl.program_id(0)
    start = tl.load(bounds_ptr + 3 * block + 1)
    at = start + tl.arange(0, B)
    inside = at < tl.load(bounds_ptr + 3 * block + 2)
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    b = tl.load(b_ptr + at, mask=inside, other=0.0)
    tl.store(parts_ptr + block, tl.sum(a * b, axis=0))


@triton.jit
def _segment_total_kernel(parts_ptr, blocks_ptr, out_ptr, B: tl.constexpr):
    segment = tl.program_id(0)
    last = tl.load(blocks_ptr + segment + 1)
    total = tl.zeros([B], tl.float32)
    for first in range(tl.load(blocks_ptr + segment), last, B):
        block = first + tl.arange(0, B)
        total += tl.load(parts_ptr + block, mask=block < last, other=0.0)
    tl.store(out_ptr + segment, tl.sum(total, axis=0))


@triton.jit
def _segment_spread_kernel(values_ptr, bounds_ptr, out_ptr, B: tl.constexpr):
    block = tl.program_id(0)
    at = tl.load(bounds_ptr + 3 * block + 1) + tl.arange(0, B)
    value = tl.load(values_ptr + tl.load(bounds_ptr + 3 * block))
    tl.store(out_ptr + at, value, mask=at < tl.load(bounds_ptr + 3 * block + 2))


class Segments:
    """Sums over the segments of a flat tensor, and values for all of a segment's elements.

    Args:
        sizes: elements of each segment, one after the other.
        device: of the tensors.
    """

    BLOCK = 4096

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        rows, blocks, start = [], [0], 0
        for segment, size in enumerate(sizes):
            stop = start + size
            starts = range(start, stop, self.BLOCK)
            rows += [(segment, first, min(first + self.BLOCK, stop)) for first in starts]
            blocks.append(len(rows))
            start = stop
        self._bounds = torch.tensor(rows, device=device)
        self._blocks = torch.tensor(blocks, device=device)
        self._total, self._count, self._parts = start, len(sizes), len(rows)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """The sums of a * b over each segment, (segments,) float32."""
        parts, out = a.new_empty(self._parts), a.new_empty(self._count)
        launch(_segment_dot_kernel, (self._parts,), a, b, self._bounds, parts, self.BLOCK)
        launch(_segment_total_kernel, (self._count,), parts, self._blocks, out, 64)
        return out

    def spread(self, values: Tensor) -> Tensor:
        """Repeats each segment's value over its elements."""
        out = values.new_empty(self._total)
        launch(_segment_spread_kernel, (self._parts,), values, self._bounds, out, self.BLOCK)
        return out


@triton.jit
def _cubic(x, NEAR: tl.constexpr):
    """Weight of a sample at distance x, in cubic interpolation with a = -0.75."""
    if NEAR:
        return (1.25 * x - 2.25) * x * x + 1.0
    return ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0


@triton.jit(do_not_specialize=["T", "WIDTH"])
def _warp_kernel(x_ptr, plan_ptr, out_ptr, T, F, WIDTH, BT: tl.constexpr, BF: tl.constexpr):
    n = tl.program_id(1)
    length = tl.load(plan_ptr + n * WIDTH)
    centre = tl.load(plan_ptr + n * WIDTH + 1)
    warped = tl.load(plan_ptr + n * WIDTH + 2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    bin = tl.arange(0, BF)
    inside = (t < T)[:, None] & (bin < F)[None, :]
    x = x_ptr + n.to(tl.int64) * T * F + bin[None, :]
    right = t >= warped
    begin = tl.where(right, centre, 0)  # of the part that the frame comes from
    size = tl.where(right, length - centre, centre)
    step = size.to(tl.float32) / tl.maximum(tl.where(right, length - warped, warped), 1)
    place = step * (t - tl.where(right, warped, 0) + 0.5) - 0.5
    low = tl.floor(place)
    over = place - low
    low = low.to(tl.int32)
    out = tl.zeros([BT, BF], tl.float32)
    for k in tl.static_range(4):
        source = begin + tl.minimum(tl.maximum(low + k - 1, 0), size - 1)
        source = tl.where(t < length, source, t)  # past the end nothing is warped
        distance = tl.abs(over - (k - 1))
        weight = _cubic(distance, k == 1 or k == 2)
        weight = tl.where(t < length, weight, 1.0 if k == 1 else 0.0)
        value = tl.load(x + source[:, None] * F, mask=inside, other=0.0)
        out += weight[:, None] * value
    tl.store(out_ptr + (n.to(tl.int64) * T + t)[:, None] * F + bin[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["T", "WIDTH", "BANDS", "STRETCHES"])
def _mask_kernel(
    x_ptr, plan_ptr, mean_ptr, T, F, WIDTH, BANDS, STRETCHES, BT: tl.constexpr, BF: tl.constexpr
):
    n = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    bin = tl.arange(0, BF)
    masked_bin = bin >= F
    masked_frame = t >= T
    plan = plan_ptr + n * WIDTH + 3
    for band in range(BANDS):
        first, last = tl.load(plan + 2 * band), tl.load(plan + 2 * band + 1)
        masked_bin = masked_bin | ((bin >= first) & (bin < last))
    for stretch in range(BANDS, BANDS + STRETCHES):
        first, last = tl.load(plan + 2 * stretch), tl.load(plan + 2 * stretch + 1)
        masked_frame = masked_frame | ((t >= first) & (t < last))
    inside = (t < T)[:, None] & (bin < F)[None, :]
    masked = masked_frame[:, None] | masked_bin[None, :]
    own = x_ptr + (n.to(tl.int64) * T + t)[:, None] * F + bin[None, :]
    mean = tl.load(mean_ptr + n) + tl.zeros([BT, BF], tl.float32)
    tl.store(own, mean, mask=inside & masked)


def spec_augment(features: Tensor, plan: Tensor, bands: int) -> Tensor:
    """Warps and masks features (N, T, F), as `data.augment.draw_plan` has drawn it.

    Args:
        features: float32.
        plan: (N, 3 + 2 * (bands + stretches)) int32, on the device.
        bands: masked bins come in so many, the masked frames in the rest.

    Returns:
        (N, T, F), a new tensor.
    """
    batch, time, bins = features.shape
    features, out = features.contiguous(), torch.empty_like(features)
    grid = (cdiv(time, 32), batch)
    sizes = (time, bins, plan.size(1))
    block = next_power_of_2(bins)
    launch(_warp_kernel, grid, features, plan, out, *sizes, BT=32, BF=block)
    stretches = (plan.size(1) - 3) // 2 - bands
    mean = out.mean(dim=(1, 2))
    launch(_mask_kernel, grid, out, plan, mean, *sizes, bands, stretches, BT=32, BF=block)
    return out
