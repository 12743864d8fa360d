"""The transducer loss in plain torch, with k2's names, argument order and results.

Sources: A. Graves, "Sequence Transduction with Recurrent Neural Networks" (arXiv:1211.3711) for
the loss (eq. 12-18 and the occupation probabilities of eq. 20); F. Kuang et al., "Pruned RNN-T
for fast, memory-efficient ASR training" (arXiv:2206.13236) for the simple joiner, its smoothing
and the pruning bounds.

Shapes: N batch, T frames, S symbols of the longest transcript, V vocabulary, C any channels,
R pruning range (symbols kept per frame), D steps of the lattice.

Two lattices are known. In the `regular` one a frame may emit any number of symbols: an arc either
emits symbol s and stays in frame t, or emits blank and goes to frame t+1. In the `modified` one
a frame emits blank or one symbol, and both arcs go to frame t+1.

`boundary` is (N, 4) int64, rows [0, 0, S_n, T_n]: the part of the padded lattice that belongs to
sequence n. None means that every sequence fills it. It may lie on the CPU when the rest is on a
GPU; then nothing here waits for that.
"""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icetransfer.model import gpu

RnntType = Literal["regular", "modified"]
Reduction = Literal["none", "mean", "sum"]

NEG_INF = float("-inf")
LEAST_PROB = 1e-30  # its reciprocal, a gradient, can still be summed in float32


def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    return_grad: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss of the simple (additive) joiner, interpolated with am-only and lm-only predictions.

    The log-probability of each arc is (1 - lm_only_scale - am_only_scale) times that of the
    joiner am[t] + lm[s], plus lm_only_scale times that of lm[s] alone, plus am_only_scale times
    that of am[t] with the batch's mean lm distribution (arXiv:2206.13236, section 3.3).

    Args:
        lm: (N, S+1, V) unnormalised log-probabilities of the prediction network.
        am: (N, T, V) unnormalised log-probabilities of the encoder.
        symbols: (N, S) int64 transcripts; what stands beyond S_n is ignored.
        termination_symbol: the blank.
        lm_only_scale: weight of the lm-only prediction.
        am_only_scale: weight of the am-only prediction.
        boundary: (N, 4), see the module's header.
        rnnt_type: "regular" or "modified".
        delay_penalty: added to the log-probability of a symbol at frame t, times
            (T_n - 1) / 2 - t, so that late symbols cost.
        reduction: "none" gives (N,), "mean" and "sum" a scalar over the N sequences.
        return_grad: also return the occupation probabilities.

    Returns:
        The loss; with `return_grad` (loss, (px_grad, py_grad)), where px_grad, (N, S, T+1) in the
        regular lattice and (N, S, T) in the modified one, is the probability of emitting symbol
        s at frame t, and py_grad (N, S+1, T) that of blank after s symbols at frame t: the
        gradient of minus the loss with respect to the log-probability of the arc.

    Raises:
        ValueError: inconsistent shapes, an unknown type or reduction, or a modified lattice with
            more symbols than frames.
    """
    _check_inputs(symbols, termination_symbol, am, lm.shape[1] - 1, rnnt_type)
    boundary = _checked_boundary(boundary, symbols, am.shape[1], rnnt_type)
    px, py = _additive_log_probs(lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale)
    px = _penalise_delay(px, boundary, delay_penalty)
    scores, px_grad, py_grad = _LatticeScore.apply(
        px, py, boundary, rnnt_type == "regular", return_grad
    )
    loss = _reduce(-scores, reduction)
    return (loss, (px_grad, py_grad)) if return_grad else loss


def rnnt_loss_simple(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    return_grad: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Loss of the additive joiner am[t] + lm[s]: `rnnt_loss_smoothed` without smoothing."""
    return rnnt_loss_smoothed(
        lm,
        am,
        symbols,
        termination_symbol,
        lm_only_scale=0.0,
        am_only_scale=0.0,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
        return_grad=return_grad,
    )


def get_rnnt_prune_ranges(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> Tensor:
    """The R consecutive symbol positions to keep in each frame (arXiv:2206.13236, section 3.2).

    A frame is left, by a blank, from one position; the window taken is the one from which it is
    most probably left without having been entered from below (the sum of the window's blanks less
    the symbol that leads into its first position). The windows' starts are then adjusted to begin
    at 0, never decrease and never jump by more than a path can (R - 1 symbols in the regular
    lattice, one in the modified one), so that a path through the pruned lattice exists. Frames
    from the last one on keep the window that ends with the last symbol.

    Args:
        px_grad: (N, S, T+1) or (N, S, T) occupation of the symbols (regular or modified).
        py_grad: (N, S+1, T) occupation of the blanks.
        boundary: (N, 4), see the module's header.
        s_range: R; lowered to S+1 or raised to what a path needs, with a warning.

    Returns:
        (N, T, R) int64, ranges[n, t] = start, start + 1, ...

    Raises:
        ValueError: the regular lattice with R < 2 (no symbol at all in the batch).
    """
    N, S, T_px = px_grad.shape
    T = py_grad.shape[2]
    if T_px not in (T, T + 1) or py_grad.shape != (N, S + 1, T) or boundary.shape != (N, 4):
        raise ValueError(
            f"pruning: px_grad {tuple(px_grad.shape)}, py_grad {tuple(py_grad.shape)} and boundary "
            f"{tuple(boundary.shape)} do not fit: expected (N, S, T+1 or T), (N, S+1, T), (N, 4)"
        )
    s_range = _feasible_range(s_range, S, boundary)
    boundary = boundary.to(px_grad.device, non_blocking=True)
    last_symbol, num_frames = boundary[:, 2:3], boundary[:, 3:4]
    if T_px == T + 1 and s_range < 2:
        raise ValueError(
            f"pruning: the regular transducer needs a range of 2 or more symbols, or no path "
            f"survives; given {s_range} (the batch has {S} symbols at most)"
        )

    below = torch.nn.functional.pad(px_grad[:, : S + 1 - s_range, :T], (0, 0, 1, 0))
    # Summed window by window, not by differences of a cumulative sum: ties are frequent.
    window_mass = py_grad.unfold(1, s_range, 1).sum(dim=-1) - below  # (N, S+2-R, T)
    start = window_mass.argmax(dim=1)  # (N, T)

    jump = s_range - 1 if T_px == T + 1 else 1
    frames = torch.arange(T, device=px_grad.device)
    start = torch.where(frames < num_frames - 1, start, last_symbol - s_range + 1).clamp(min=0)
    # Non-decreasing: no start may exceed a later one.
    start = _minimum_of_the_rest(start)
    # Steps of at most `jump` from 0: jump * t - start must be at least 0 and never decrease.
    ramp = jump * frames
    start = ramp - _minimum_of_the_rest(ramp - start).clamp(min=0)
    return start.unsqueeze(2) + torch.arange(s_range, device=start.device)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers what the joiner needs inside the pruning bounds.

    Args:
        am: (N, T, C) encoder side of the joiner.
        lm: (N, S+1, C) prediction side of the joiner.
        ranges: (N, T, R) from `get_rnnt_prune_ranges`.

    Returns:
        am_pruned and lm_pruned, both (N, T, R, C); am_pruned is a view of `am`.
    """
    N, _, R = ranges.shape
    rows = ranges + torch.arange(N, device=ranges.device).view(N, 1, 1) * lm.shape[1]
    # Embedding rather than gather: its backward adds whole rows.
    lm_pruned = torch.nn.functional.embedding(rows, lm.reshape(-1, lm.shape[2]))
    return am.unsqueeze(2).expand(-1, -1, R, -1), lm_pruned


def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
) -> Tensor:
    """Loss of the full joiner inside the pruning bounds.

    Args:
        logits: (N, T, R, V) joiner output, unnormalised.
        symbols: (N, S) int64 transcripts.
        ranges: (N, T, R) from `get_rnnt_prune_ranges`.
        termination_symbol: the blank.
        boundary: (N, 4), see the module's header.
        rnnt_type: "regular" or "modified".
        delay_penalty: see `rnnt_loss_smoothed`.
        reduction: "none" gives (N,), "mean" and "sum" a scalar over the N sequences.

    Returns:
        The loss; infinite (with zero gradient) where no path fits the bounds.

    Raises:
        ValueError: as `rnnt_loss_smoothed`.
    """
    S = symbols.shape[1]
    _check_inputs(symbols, termination_symbol, logits, S, rnnt_type)
    if logits.ndim != 4 or logits.shape[:3] != ranges.shape:
        raise ValueError(
            f"pruned transducer loss: logits are {tuple(logits.shape)}, expected (N, T, R, V) with "
            f"(N, T, R) = {tuple(ranges.shape)}, the shape of ranges"
        )
    boundary = _checked_boundary(boundary, symbols, logits.shape[1], rnnt_type)
    # Position S has no symbol to emit; the blank stands in and is cut off below.
    padded = torch.nn.functional.pad(symbols, (0, 1), value=termination_symbol)
    targets = padded.unsqueeze(1).expand(-1, logits.shape[1], -1).gather(2, ranges)
    if gpu.takes_kernels(logits):
        symbol, blank = gpu.kernels("training.kernels").pick_log_probs(
            logits, targets, termination_symbol
        )
    else:
        symbol, blank = _PickLogProbs.apply(full_precision(logits), targets, termination_symbol)

    outside = symbol.new_full((*symbol.shape[:2], S + 1), NEG_INF)
    px = outside.scatter(2, ranges, symbol)[:, :, :S].transpose(1, 2)
    py = outside.scatter(2, ranges, blank).transpose(1, 2)
    px = _penalise_delay(px, boundary, delay_penalty)
    scores, _, _ = _LatticeScore.apply(px, py, boundary, rnnt_type == "regular", False)
    return _reduce(-scores, reduction)


def rnnt_loss(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
) -> Tensor:
    """Loss of the full joiner over the whole lattice: logits are (N, T, S+1, V).

    The other arguments and the errors are those of `rnnt_loss_pruned`.
    """
    S = symbols.shape[1]
    if logits.ndim != 4 or logits.shape[2] != S + 1:
        raise ValueError(
            f"transducer loss: logits are {tuple(logits.shape)}, expected (N, T, S+1, V) with "
            f"S = {S}, the width of symbols"
        )
    everything = torch.arange(S + 1, device=logits.device).expand(*logits.shape[:3])
    return rnnt_loss_pruned(
        logits,
        symbols,
        everything,
        termination_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
    )


class _LatticeScore(torch.autograd.Function):
    """Log-probability of all paths, with its gradient from one forward-backward pass.

    Both lattices are walked as one recursion over d: at each step a path keeps its symbol count s
    or adds one. In the modified lattice d is the frame; in the regular one d = s + t, so that
    the anti-diagonal of the (S+1, T) rectangle is one vector (the buffer is sheared by strides).
    """

    @staticmethod
    def forward(
        ctx: Any,
        px: Tensor,
        py: Tensor,
        boundary: Tensor,
        regular: bool,
        return_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores px (N, S, T) and py (N, S+1, T), log-probabilities of symbols and blanks.

        Returns:
            scores (N,), and with `return_grad` the occupation probabilities of the arcs as
            `rnnt_loss_smoothed` returns them, else None.
        """
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if regular and gpu.takes_kernels(px):
            return _score_by_kernels(ctx, px, py, boundary, needs_grad, return_grad)
        N, S, T = px.shape
        emitted, frames = boundary[:, 2], boundary[:, 3]
        # No symbol after the last frame: there the regular lattice has only its end.
        over = torch.arange(T, device=px.device) >= frames.view(N, 1, 1)
        move, move_view = _steps(px.masked_fill(over, NEG_INF), S, 1, regular)
        stay, stay_view = _steps(py, S, 0, regular)
        alpha = _forward_sums(stay, move, N)
        starts = torch.arange(N, device=px.device) * (S + 1)
        end = (frames + emitted if regular else frames, starts + emitted)
        scores = alpha[end].to(px.dtype)
        if not (needs_grad or return_grad):
            return scores, None, None

        _occupations(alpha, stay, move, end)
        px_grad, py_grad = move_view.to(px.dtype), stay_view.to(py.dtype)
        if needs_grad:
            ctx.save_for_backward(px_grad, py_grad)
        if not return_grad:
            return scores, None, None
        px_grad_out = torch.nn.functional.pad(px_grad, (0, 1)) if regular else px_grad.clone()
        py_grad_out = py_grad.clone()
        ctx.mark_non_differentiable(px_grad_out, py_grad_out)
        return scores, px_grad_out, py_grad_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scales the occupation probabilities."""
        px_grad, py_grad = ctx.saved_tensors
        scale = grad_scores.view(-1, 1, 1)
        return px_grad * scale, py_grad * scale, None, None, None


def _score_by_kernels(
    ctx: Any, px: Tensor, py: Tensor, boundary: Tensor, needs_grad: bool, return_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`_LatticeScore.forward` of the regular lattice in two kernels."""
    kernels = gpu.kernels("training.kernels")
    scores, alpha = kernels.lattice_scores(px, py, boundary)
    if not (needs_grad or return_grad):
        return scores.to(px.dtype), None, None
    px_grad, py_grad = kernels.lattice_occupations(px, py, boundary, scores, alpha)
    if needs_grad:
        ctx.save_for_backward(px_grad[:, :, :-1], py_grad)
    if not return_grad:
        return scores.to(px.dtype), None, None
    px_grad, py_grad = px_grad.clone(), py_grad.clone()
    ctx.mark_non_differentiable(px_grad, py_grad)
    return scores.to(px.dtype), px_grad, py_grad


def _steps(arcs: Tensor, S: int, shift: int, regular: bool) -> tuple[Tensor, Tensor]:
    """Lays out arcs (N, S or S+1, T) by step of the recursion, indexed by the arc's target.

    Returns:
        steps (D, N * (S+1)) float64 with -inf where there is no arc, and a view of it in the shape
        of `arcs`: element (n, s, t) of the view is row s + t (regular) or t (modified), position
        s + shift of sequence n. Double precision because a long utterance's score has thousands
        of nats, while its arcs' probabilities come from differences of scores; there is no
        vocabulary axis, so it is cheap.
    """
    N, rows, T = arcs.shape
    width = N * (S + 1)
    steps = arcs.new_full((T + S if regular else T, width), NEG_INF, dtype=torch.float64)
    strides = (S + 1, width + 1 if regular else 1, width)
    view = steps.as_strided((N, rows, T), strides, storage_offset=shift)
    view.copy_(arcs)
    return steps, view


def _forward_sums(stay: Tensor, move: Tensor, N: int) -> Tensor:
    """The forward variables (Graves, eq. 16): alpha (D+1, N * (S+1)) from the steps."""
    depth, width = stay.shape
    alpha = stay.new_full((depth + 1, width), NEG_INF)
    alpha[0, :: width // N] = 0.0
    # The sequences lie end to end; no arc moves into position 0, so none crosses a border.
    here, there = alpha[:, :-1].unbind(0), alpha[:, 1:].unbind(0)
    rows, stays, moves = alpha.unbind(0), stay.unbind(0), move[:, 1:].unbind(0)
    for d in range(depth):
        torch.add(rows[d], stays[d], out=rows[d + 1])
        torch.logaddexp(there[d + 1], here[d] + moves[d], out=there[d + 1])
    return alpha


def _occupations(alpha: Tensor, stay: Tensor, move: Tensor, end: tuple[Tensor, Tensor]) -> None:
    """Turns the steps, in place, into the probabilities that a path takes them (Graves, eq. 20).

    The probability of each arc among those that enter its target is exp(alpha[source] + arc -
    alpha[target]); going back from the end, a node's occupation is shared out accordingly.
    """
    stay.add_(alpha[:-1]).sub_(alpha[1:]).exp_().nan_to_num_(nan=0.0)
    move[:, 1:] += alpha[:-1, :-1]
    move.sub_(alpha[1:]).exp_().nan_to_num_(nan=0.0)
    occupied = torch.zeros_like(alpha)
    occupied[end] = 1.0
    here, rows = occupied[:, :-1].unbind(0), occupied.unbind(0)
    stays, moves, arrivals = stay.unbind(0), move.unbind(0), move[:, 1:].unbind(0)
    for d in reversed(range(len(stays))):
        rows[d].add_(stays[d].mul_(rows[d + 1]))
        moves[d].mul_(rows[d + 1])
        here[d].add_(arrivals[d])


class _PickLogProbs(torch.autograd.Function):
    """log softmax(logits) at one target and at the blank.

    Goes sequence by sequence, so that what is as large as the vocabulary stays in the cache, and
    takes each exponential once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        """Takes logits (N, T, R, V) and targets (N, T, R); returns two (N, T, R)."""
        exps = torch.empty_like(logits, memory_format=torch.contiguous_format)
        largest, sums = logits.new_empty((2, *logits.shape[:-1], 1))
        for n in range(len(logits)):
            torch.amax(logits[n], dim=-1, keepdim=True, out=largest[n])
            torch.sub(logits[n], largest[n], out=exps[n]).exp_()
            torch.sum(exps[n], dim=-1, keepdim=True, out=sums[n])
        ctx.save_for_backward(exps, sums, targets)
        ctx.blank = blank
        normaliser = largest + sums.log()
        picked = logits.gather(-1, targets.unsqueeze(-1)) - normaliser
        blanks = logits[..., blank : blank + 1] - normaliser
        return picked.squeeze(-1), blanks.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_target: Tensor, grad_blank: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of log softmax, the two picks at once."""
        exps, sums, targets = ctx.saved_tensors
        grad = exps * ((grad_target + grad_blank).unsqueeze(-1) / -sums)
        grad.scatter_add_(-1, targets.unsqueeze(-1), grad_target.unsqueeze(-1))
        grad[..., ctx.blank] += grad_blank
        return grad, None, None


def _additive_log_probs(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    blank: int,
    lm_only_scale: float,
    am_only_scale: float,
) -> tuple[Tensor, Tensor]:
    """Smoothed log-probabilities of the arcs, px (N, S, T) and py (N, S+1, T).

    The normaliser of am[t] + lm[s] over V is a matrix product of the two softmaxes
    (arXiv:2206.13236, eq. 9), so that no (N, T, S, V) tensor is built.
    """
    S, T = symbols.shape[1], am.shape[1]
    lm, am = full_precision(lm), full_precision(am)
    lm_max, am_max = (x.detach().amax(dim=-1, keepdim=True) for x in (lm, am))
    lm_probs, am_probs = (lm - lm_max).exp(), (am - am_max).exp()  # up to a factor

    lm_symbol = lm[:, :S].gather(2, symbols.unsqueeze(2))  # (N, S, 1)
    lm_blank = lm[:, :, blank].unsqueeze(2)
    with_blank = torch.nn.functional.pad(symbols, (0, 1), value=blank)
    am_token = am.gather(2, with_blank.unsqueeze(1).expand(-1, T, -1)).transpose(1, 2)
    am_symbol, am_blank = am_token[:, :S], am_token[:, S:]

    both = _safe_log(lm_probs @ am_probs.transpose(1, 2)) + lm_max + am_max.transpose(1, 2)
    both_scale = 1.0 - lm_only_scale - am_only_scale
    px = both_scale * (am_symbol + lm_symbol - both[:, :S])
    py = both_scale * (am_blank + lm_blank - both)
    if lm_only_scale != 0.0:
        normaliser = lm.logsumexp(dim=-1, keepdim=True)  # (N, S+1, 1)
        px = px + lm_only_scale * (lm_symbol - normaliser[:, :S])
        py = py + lm_only_scale * (lm_blank - normaliser)
    if am_only_scale != 0.0:
        unigram = lm.softmax(dim=-1).mean(dim=(0, 1))  # (V,), padding included as in k2
        normaliser = _safe_log(am_probs @ unigram).unsqueeze(1) + am_max.transpose(1, 2)
        log_unigram = _safe_log(unigram)
        px = px + am_only_scale * (am_symbol + log_unigram[symbols].unsqueeze(2) - normaliser)
        py = py + am_only_scale * (am_blank + log_unigram[blank] - normaliser)
    return px, py


def _safe_log(probs: Tensor) -> Tensor:
    """The logarithm, with a floor below which the gradient is zero rather than infinite."""
    return probs.clamp(min=LEAST_PROB).log()


def _penalise_delay(px: Tensor, boundary: Tensor, delay_penalty: float) -> Tensor:
    """Favours early symbols: adds delay_penalty * ((T_n - 1) / 2 - t) to px (N, S, T)."""
    if delay_penalty == 0.0:
        return px
    middle = (boundary[:, 3].view(-1, 1, 1) - 1) / 2
    frames = torch.arange(px.shape[2], device=px.device)
    return px + delay_penalty * (middle - frames).to(px.dtype)


def _feasible_range(s_range: int, S: int, boundary: Tensor) -> int:
    """Raises the range to what the shortest utterance needs, lowers it to the S+1 there are."""
    symbols_per_frame = torch.ceil(boundary[:, 2] / boundary[:, 3]).max()
    needed = int(symbols_per_frame) + 1
    if s_range < needed:
        warnings.warn(
            f"pruning range {s_range} raised to {needed}: the batch has an utterance with "
            f"{needed - 1} symbols per frame",
            stacklevel=3,
        )
        s_range = needed
    if s_range > S:
        if s_range > S + 1:
            warnings.warn(
                f"pruning range {s_range} lowered to {S + 1}: the longest transcript of the batch "
                f"has {S} symbols",
                stacklevel=3,
            )
        s_range = S + 1
    return s_range


def _minimum_of_the_rest(values: Tensor) -> Tensor:
    """(N, T) -> (N, T): out[t] = min of values[t:], the largest non-decreasing lower bound."""
    return values.flip(1).cummin(dim=1).values.flip(1)


def full_precision(x: Tensor) -> Tensor:
    """Losses are summed over hundreds of frames: half precision is widened to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _reduce(loss: Tensor, reduction: str | None) -> Tensor:
    """Reduces losses (N,) over the batch."""
    if reduction is None or reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    raise ValueError(f"transducer loss: reduction is {reduction!r}, expected none, mean or sum")


def _check_inputs(symbols: Tensor, blank: int, scores: Tensor, S: int, rnnt_type: str) -> None:
    """Checks what every loss takes; `scores` is (N, ..., V), S the symbols its lattice holds."""
    if rnnt_type not in ("regular", "modified"):
        raise ValueError(f"transducer loss: type is {rnnt_type!r}, expected regular or modified")
    if symbols.shape != (scores.shape[0], S) or symbols.dtype != torch.int64:
        raise ValueError(
            f"transducer loss: symbols are {tuple(symbols.shape)} {symbols.dtype}, expected "
            f"({scores.shape[0]}, {S}) int64"
        )
    if not 0 <= blank < scores.shape[-1]:
        raise ValueError(
            f"transducer loss: termination symbol {blank} is outside the vocabulary of "
            f"{scores.shape[-1]}"
        )


def _checked_boundary(boundary: Tensor | None, symbols: Tensor, T: int, rnnt_type: str) -> Tensor:
    """Returns the boundary, made up where it is None, after checking it against S and T.

    It is then where the symbols are.
    """
    N, S = symbols.shape
    if boundary is None:
        boundary = torch.tensor([0, 0, S, T]).repeat(N, 1)
    if boundary.shape != (N, 4) or boundary.dtype != torch.int64:
        raise ValueError(
            f"transducer loss: boundary is {tuple(boundary.shape)} {boundary.dtype}, expected "
            f"({N}, 4) int64"
        )
    rows = boundary.tolist()
    for n, (s_begin, t_begin, num_symbols, num_frames) in enumerate(rows):
        where = f"transducer loss: sequence {n} of the batch, boundary {rows[n]}"
        if s_begin != 0 or t_begin != 0:
            raise ValueError(f"{where}: must begin with 0, 0")
        if not (0 <= num_symbols <= S and 1 <= num_frames <= T):
            raise ValueError(f"{where}: expected 0 to {S} symbols and 1 to {T} frames")
        if rnnt_type == "modified" and num_symbols > num_frames:
            raise ValueError(
                f"{where}: the modified transducer needs as many frames as symbols; leave the "
                f"utterance out or use rnnt_type='regular'"
            )
    return boundary.to(symbols.device, non_blocking=True)
