"""Activations, normalisation and the training-only regularisers of the Zipformer.

Shapes: N batch, T frames, C channels; `(..., C)` means any leading dimensions.

The maths is that of the Zipformer paper (arXiv:2310.11230): SwooshR and SwooshL (eq. 4 and 5),
BiasNorm (eq. 3), and the Balancer and Whitener of its appendix. Balancers and whiteners are the
identity in the forward pass; they only nudge gradients, in training mode, on the fraction of steps
on which they fire.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from icetransfer.model import cpu, gpu
from icetransfer.model.exporting import is_exporting
from icetransfer.model.swoosh import SWOOSH_L, SWOOSH_R, swoosh_to_export
from icetransfer.model.swoosh import swoosh_and_slope as plain_swoosh_and_slope


class ScheduledFloat(nn.Module):
    """A number that follows the count of training batches along straight lines.

    Args:
        points: (batch count, value) pairs in rising order; flat beyond both ends.
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        super().__init__()
        self.points = points
        self.value = points[0][1]

    def set_batch_count(self, count: float) -> None:
        """Moves to the value that belongs to `count` batches of training."""
        points = self.points
        if count <= points[0][0]:
            self.value = points[0][1]
            return
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if count < x1:
                self.value = y0 + (y1 - y0) * (count - x0) / (x1 - x0)
                return
        self.value = points[-1][1]

    def extra_repr(self) -> str:
        """Shows the schedule when the module is printed."""
        return ", ".join(f"{x:g}: {y:g}" for x, y in self.points)


def set_batch_count(model: nn.Module, count: float) -> None:
    """Tells every scheduled regulariser in `model` how many batches have been trained on.

    A fine-tuning run that starts from trained weights passes a large count (say, 50000) to begin
    with the mild values at the schedules' ends.
    """
    for module in model.modules():
        if isinstance(module, ScheduledFloat):
            module.set_batch_count(count)


def swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    """Swoosh activation, log(1 + exp(x - shift)) - 0.08 x - offset (paper, eq. 4 and 5)."""
    if is_exporting():
        return swoosh_to_export(x, shift, offset)
    if gpu.takes_kernels(x):
        return gpu.kernels("model.kernels.front_end").swoosh(x, shift, offset)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Swoosh.apply(x, shift, offset)
    return swoosh_and_slope(x, shift, offset, with_slope=False)[0]


class _Swoosh(torch.autograd.Function):
    """Swoosh that keeps its derivative, so that the backward pass is one multiplication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        out, slope = swoosh_and_slope(x, shift, offset, with_slope=True)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def swoosh_and_slope(
    x: Tensor, shift: float, offset: float, with_slope: bool
) -> tuple[Tensor, Tensor]:
    """`swoosh.swoosh_and_slope`, by the form that suits the device."""
    by_blocks = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    form = cpu.swoosh_and_slope if by_blocks else plain_swoosh_and_slope
    return form(x, shift, offset, with_slope)


class SwooshR(nn.Module):
    """SwooshR: zero at zero; for modules whose input may rest at zero (convolution, front end)."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies elementwise."""
        return swoosh(x, *SWOOSH_R)


class SwooshL(nn.Module):
    """SwooshL: flat around zero, for "normally off" modules (feed-forward, ConvNeXt)."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies elementwise."""
        return swoosh(x, *SWOOSH_L)


class _KeepInside(torch.autograd.Function):
    """Identity whose gradient never pushes a parameter further outside [low, high]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = (low, high)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        # Descent lowers x where grad > 0. Below the range only falling gradients are turned round.
        grad = torch.where(x < low, -grad.abs(), grad)
        return torch.where(x > high, grad.abs(), grad), None, None


def keep_inside(x: Tensor, low: float, high: float) -> Tensor:
    """Returns `x`; in the backward pass sends values outside [low, high] back towards it."""
    return _KeepInside.apply(x, low, high)


class BiasNorm(nn.Module):
    """BiasNorm (paper, eq. 3): x / RMS(x - bias) * exp(log_scale) over the channel dimension.

    Args:
        channels: C.
    """

    LOG_SCALE_LIMITS = (-1.5, 1.5)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.full((channels,), 1.0e-4))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` (..., C)."""
        log_scale = self.log_scale
        if self.training:
            log_scale = keep_inside(log_scale, *self.LOG_SCALE_LIMITS)
        if is_exporting():
            mean_square = (x - self.bias).square().mean(dim=-1, keepdim=True)
            return x * (mean_square.rsqrt() * log_scale.exp())
        if gpu.takes_kernels(x):
            return gpu.kernels("model.kernels.front_end").bias_norm(x, self.bias, log_scale)
        return _BiasNorm.apply(x, self.bias, log_scale)


class _BiasNorm(torch.autograd.Function):
    """BiasNorm that keeps its input and one number a frame."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x - bias, dim=-1, keepdim=True)
        scale = norm.reciprocal_().mul_(x.size(-1) ** 0.5 * log_scale.exp())
        ctx.save_for_backward(x, bias, log_scale, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias, log_scale, scale = ctx.saved_tensors
        # With r = RMS(x - b) and s = exp(l) / r: ds/d(x - b) = -s^3 exp(-2 l) (x - b) / C.
        dot = (grad * x).sum(dim=-1, keepdim=True)
        pull = dot * scale.pow(3) * (-torch.exp(-2 * log_scale) / x.size(-1))
        through_norm = (x - bias).mul_(pull)
        grad_bias = -through_norm.sum(dim=tuple(range(x.dim() - 1)))
        grad_log_scale = (dot * scale).sum()
        return through_norm.addcmul_(grad, scale), grad_bias, grad_log_scale


class _BalancerGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, balancer: Balancer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.balancer = balancer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dim = ctx.balancer.channel_dim
        adjusted = ctx.balancer.adjust(x.movedim(dim, -1), grad.movedim(dim, -1))
        return adjusted.movedim(-1, dim), None


class Balancer(nn.Module):
    """Keeps channel statistics in a healthy range by small changes of the gradient.

    A channel that is positive too rarely or too often, or too small or too large in mean absolute
    value, gets a push in the right direction, proportional to the size of its gradient (the idea of
    the paper's appendix on the Balancer, in a simple form).

    Args:
        min_positive: least fraction of positive values.
        max_positive: greatest fraction of positive values.
        min_abs: least mean absolute value.
        max_abs: greatest mean absolute value.
        channel_dim: the dimension that holds the channels.
        prob: fraction of the training steps on which it acts, on average.
    """

    GRAD_SHARE = 0.04  # size of the push, relative to the mean absolute gradient of the channel
    SAMPLED_FRAMES = 4096

    def __init__(
        self,
        min_positive: float = 0.05,
        max_positive: float = 0.95,
        min_abs: float = 0.2,
        max_abs: float = 100.0,
        channel_dim: int = -1,
        prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.min_positive, self.max_positive = min_positive, max_positive
        self.min_abs, self.max_abs = min_abs, max_abs
        self.channel_dim = channel_dim
        self.prob = ScheduledFloat((0.0, 2.5 * prob), (8000.0, prob))

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` itself; sometimes with a gradient hook in training."""
        return _BalancerGrad.apply(x, self) if self.acts_on(x) else x

    def acts_on(self, x: Tensor) -> bool:
        """Draws whether the gradient of `x` is to be changed."""
        return x.requires_grad and self.drawn()

    def drawn(self) -> bool:
        """Draws whether it acts at this step."""
        return self.training and fires(self.prob.value)

    def adjust(self, x: Tensor, grad: Tensor) -> Tensor:
        """Adds the pushes for `x` (..., C) to `grad` of the same shape."""
        if gpu.takes_kernels(x):
            return self.adjust_in_place(
                x.contiguous(), grad.clone(memory_format=torch.contiguous_format)
            )
        rows = x.reshape(-1, x.size(-1)), grad.reshape(-1, x.size(-1))
        return self.push(x, grad, *self.pushes(*(self.sample(matrix) for matrix in rows)))

    def adjust_in_place(self, x: Tensor, grad: Tensor) -> Tensor:
        """`adjust` by kernels; both are (..., C), or some of the channels of such."""
        limits = (self.min_positive, self.max_positive, self.min_abs, self.max_abs)
        every = self._every(x.numel() // x.size(-1))
        gpu.kernels("model.kernels.regularisers").balance(x, grad, limits, self.GRAD_SHARE, every)
        return grad

    def sample(self, rows: Tensor) -> Tensor:
        """Some of (frames, C): they tell enough about a channel."""
        return rows[:: self._every(rows.size(0))]

    def _every(self, frames: int) -> int:
        return max(1, frames // self.SAMPLED_FRAMES)

    def pushes(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Pushes (C,) of values and of magnitudes, from samples (frames, C) of `x` and `grad`."""
        positive = (x > 0).to(x.dtype).mean(dim=0)
        mean_abs = x.abs().mean(dim=0)
        size = self.GRAD_SHARE * grad.abs().mean(dim=0)
        # +1 asks for larger values, -1 for smaller ones (descent moves against the gradient).
        shift = _beyond(positive, self.min_positive, self.max_positive)
        grow = _beyond(mean_abs, self.min_abs, self.max_abs)
        return size * shift, size * grow

    @staticmethod
    def push(x: Tensor, grad: Tensor, shift: Tensor, grow: Tensor) -> Tensor:
        """Adds the pushes (C,) of values and of magnitudes to the gradient of `x` (..., C)."""
        if _maybe_any(grow):
            grad = torch.addcmul(grad, x.sign(), grow, value=-1.0)
        return grad - shift if _maybe_any(shift) else grad


def _maybe_any(x: Tensor) -> bool:
    """Whether not all is zero; yes on a GPU, for whose answer one would have to wait."""
    return x.device.type != "cpu" or bool(x.any())


def _beyond(x: Tensor, low: float, high: float) -> Tensor:
    """1 where `x` is below `low`, -1 where it is above `high`, else 0."""
    return (x < low).to(x.dtype) - (x > high).to(x.dtype)


class _WhitenGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, whiten: Whiten) -> Tensor:
        ctx.save_for_backward(x)
        ctx.whiten = whiten
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.whiten.adjust(x, grad), None


class Whiten(nn.Module):
    """Discourages a covariance with few large eigenvalues (the paper's appendix on the Whitener).

    The measure is C tr(S^2) / tr(S)^2 for the covariance S of the channels: 1 for a multiple of the
    identity, C when one direction holds everything. Beyond `limit` its gradient is added, scaled to
    a small share of the size of the incoming one.

    Args:
        limit: the measure above which it acts.
        prob: fraction of the training steps on which it looks, on average.
    """

    GRAD_SHARE = 0.02

    def __init__(self, limit: float, prob: float = 0.1) -> None:
        super().__init__()
        self.limit = limit
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` (..., C) itself; sometimes with a gradient hook in training."""
        return _WhitenGrad.apply(x, self) if x.requires_grad and self.drawn() else x

    def drawn(self) -> bool:
        """Draws whether it looks at this step."""
        return self.training and fires(self.prob)

    def adjust(self, x: Tensor, grad: Tensor) -> Tensor:
        """Adds the gradient of the measure of `x` (..., C) to `grad` if it is too high."""
        if gpu.takes_kernels(x):
            return gpu.kernels("model.kernels.regularisers").whiten(
                x, grad, self.limit, self.GRAD_SHARE
            )
        with torch.enable_grad():
            flat = x.detach().reshape(-1, x.size(-1)).requires_grad_()
            measure = whitening_measure(flat)
            too_high = measure.detach() > self.limit
            if not _maybe_any(too_high):
                return grad
            (penalty,) = torch.autograd.grad(measure, flat)
        scale = self.GRAD_SHARE * grad.norm() / (penalty.norm() + 1.0e-20) * too_high
        return grad + (penalty * scale).view_as(grad)


def whitening_measure(x: Tensor) -> Tensor:
    """C tr(S^2) / tr(S)^2 for the covariance S of `x` (frames, C); 1 is perfectly white."""
    x = x - x.mean(dim=0)
    covariance = x.t() @ x
    return covariance.square().sum() * x.size(1) / (covariance.trace().square() + 1.0e-20)


def fires(prob: float) -> bool:
    """Draws from torch's generator whether an event of probability `prob` happens."""
    return prob > 0.0 and torch.rand(()).item() < prob


def time_shared_dropout(x: Tensor, rate: float) -> Tensor:
    """Drops whole channels of a sequence: `x` (N, T, C) times a scaled 0/1 mask (N, 1, C)."""
    if rate <= 0.0:
        return x
    keep = (torch.rand(x.size(0), 1, x.size(2), device=x.device) >= rate).to(x.dtype)
    return x * keep.mul_(1.0 / (1.0 - rate))
