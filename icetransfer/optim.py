"""ScaledAdam and the learning-rate schedules, with icefall's trajectories.

Source: Z. Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition"
(arXiv:2310.11230), section 3.4 and appendix A.1 for ScaledAdam, eq. 8 for Eden. ScaledAdam scales
each tensor's Adam update by the tensor's own root mean square (rms), and learns that scale with a
second, slower Adam update along the tensor's direction.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

# Early estimates of the clipping threshold, in steps, before a whole period has been seen.
EARLY_THRESHOLD_STEPS = (10, 20, 40)


class ScaledAdam(Optimizer):
    """Adam whose step is relative to the size of each parameter tensor.

    Tensors of equal shape are updated as one stack. The state of a stack of B tensors lies under
    the first of them: `step`, `delta` and `exp_avg_sq` (B, *shape), and for tensors with more
    than one element `param_rms` and `scale_exp_avg_sq` (B, 1...), `scale_grads`
    (size_update_period, B, 1...). The first stack of a group also holds what clipping needs:
    `model_norms` (clipping_update_period,), `model_norm_threshold`, `num_clipped`.

    A tensor without a gradient is updated as if its gradient were zero, as one stack has to be.

    Args:
        params: tensors or parameter groups; a group may have its own value of any setting below.
        lr: the relative size of a step: 0.045 moves a tensor by up to 4.5 % of its rms.
        clipping_scale: gradients whose norm (each tensor's weighted by its rms) exceeds this many
            times the recent median are scaled down to it; None for no clipping.
        betas: decay of the momentum and of the squared gradients.
        scalar_lr_scale: factor on lr for one-element tensors and for the scale of the others.
        eps: keeps denominators from zero.
        param_min_rms: a smaller tensor is updated as if it had this rms.
        param_max_rms: the scale of a tensor does not grow beyond this rms.
        scalar_max: one-element tensors are kept within [-scalar_max, scalar_max].
        size_update_period: steps between updates of the scale.
        clipping_update_period: steps between updates of the clipping threshold.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float = 0.03,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"ScaledAdam: lr is {lr}, expected a positive number")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"ScaledAdam: betas are {betas}, expected two numbers in [0, 1)")
        if clipping_scale is not None and not clipping_scale > 0:
            raise ValueError(
                f"ScaledAdam: clipping_scale is {clipping_scale}, expected a number > 0 or None"
            )
        defaults = {
            "lr": lr,
            "clipping_scale": clipping_scale,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "clipping_update_period": clipping_update_period,
        }
        self._stacks: list[list[list[Tensor]]] = []  # by group, made at its first step
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters from their gradients.

        Returns:
            What `closure` returned, else None.

        Raises:
            FloatingPointError: with clipping on, when the gradient norm has not been finite for
                most of a clipping period.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[len(self._stacks) :]:
            self._stacks.append(_stacks(group["params"]))
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            self._step_group(group, stacks)
        return loss

    def _step_group(self, group: dict[str, Any], stacks: list[list[Tensor]]) -> None:
        """Update one group; `torch._foreach_*` runs one operation over all of its stacks."""
        values = [torch.stack(tensors) for tensors in stacks]
        grads = [_stacked_grad(tensors) for tensors in stacks]
        states = [self.state[tensors[0]] for tensors in stacks]
        for state, value in zip(states, values, strict=True):
            if not state:
                _init_state(state, value, group)
        factor = _clipping_factor(group, states, grads)
        if factor == 0.0:  # the gradient holds an inf or a NaN
            torch._foreach_zero_(grads)
        elif factor != 1.0:
            torch._foreach_mul_(grads, factor)

        deltas = [state["delta"] for state in states]
        torch._foreach_mul_(deltas, group["betas"][0])
        for state, value, grad in zip(states, values, grads, strict=True):
            if "param_rms" in state:
                _update_scale(value, grad, state, group)
            else:
                value.clamp_(-group["scalar_max"], group["scalar_max"])
        _add_direction(deltas, grads, states, group)
        torch._foreach_add_(values, deltas)

        for state, tensors, value in zip(states, stacks, values, strict=True):
            state["step"] += 1
            torch._foreach_copy_(tensors, list(value.unbind(0)))


def _stacks(params: list[Tensor]) -> list[list[Tensor]]:
    """Group tensors by type and shape, in the (string) order in which the state is laid out."""
    groups: dict[str, list[Tensor]] = {}
    for param in params:
        key = "_".join([str(param.dtype), *map(str, param.shape)])
        groups.setdefault(key, []).append(param)
    return [groups[key] for key in sorted(groups)]


def _stacked_grad(tensors: list[Tensor]) -> Tensor:
    """The gradients of one stack, (B, *shape), as a copy; zero where there is none."""
    return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in tensors])


def _init_state(state: dict[str, Any], values: Tensor, group: dict[str, Any]) -> None:
    """Fill the state of a stack of tensors `values` (B, *shape)."""
    state["step"] = 0
    state["delta"] = torch.zeros_like(values)
    state["exp_avg_sq"] = torch.zeros_like(values)
    if values[0].numel() > 1:
        state["param_rms"] = _rms(values)
        state["scale_exp_avg_sq"] = torch.zeros_like(state["param_rms"])
        periods = (group["size_update_period"], *state["param_rms"].shape)
        state["scale_grads"] = values.new_zeros(periods)


def _rms(values: Tensor) -> Tensor:
    """Root mean square of each tensor of a stack: (B, *shape) to (B, 1...)."""
    return values.square().mean(dim=tuple(range(1, values.ndim)), keepdim=True).sqrt_()


def _add_direction(
    deltas: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> None:
    """Add Adam's direction, made relative to each tensor's rms, to the deltas (B, *shape)."""
    beta1, beta2 = group["betas"]
    exp_avg_sq = [state["exp_avg_sq"] for state in states]
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)
    # Bias correction divides exp_avg_sq by its square; here it goes to eps and the step size.
    correction = math.sqrt(1 - beta2 ** (states[0]["step"] + 1))
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_add_(denominators, group["eps"] * correction)
    step_size = -(1 - beta1) * group["lr"] * correction
    sizes = [
        state["param_rms"].clamp(min=group["param_min_rms"]).mul_(step_size)
        if "param_rms" in state
        else torch.full_like(delta, group["scalar_lr_scale"] * step_size)
        for state, delta in zip(states, deltas, strict=True)
    ]
    torch._foreach_mul_(grads, sizes)
    torch._foreach_addcdiv_(deltas, grads, denominators)


def _update_scale(
    values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """Collect the gradient of the log scale and, once a period, add its Adam step to the delta."""
    beta1, beta2 = group["betas"]
    step, period = state["step"], group["size_update_period"]
    along = torch.linalg.vecdot(values.flatten(1), grad.flatten(1))
    state["scale_grads"][step % period] = along.view_as(state["param_rms"])
    if step % period != period - 1:
        return
    state["param_rms"] = rms = _rms(values)
    scale_grads, scale_exp_avg_sq = state["scale_grads"], state["scale_exp_avg_sq"]
    # One update stands for `period` steps.
    period_beta = beta2**period
    scale_exp_avg_sq.mul_(period_beta)
    scale_exp_avg_sq.add_(scale_grads.square().mean(dim=0), alpha=1 - period_beta)
    bias_correction = 1 - period_beta ** ((step + 1) // period)
    lr = group["lr"] * group["scalar_lr_scale"]
    scale_step = scale_grads.sum(dim=0).mul_(-lr * math.sqrt(bias_correction))
    scale_step.div_(scale_exp_avg_sq.sqrt().add_(group["eps"]))
    scale_step.masked_fill_(rms < group["param_min_rms"], 0.0)
    # Never beyond the largest rms.
    scale_step = torch.minimum(scale_step, (group["param_max_rms"] - rms) / rms)
    state["delta"].addcmul_(values, scale_step, value=1 - beta1)


def _clipping_factor(
    group: dict[str, Any], states: list[dict[str, Any]], grads: list[Tensor]
) -> float:
    """What to multiply the gradients with; also keeps the record of recent norms.

    Raises:
        FloatingPointError: the median of the recent norms is not finite.
    """
    first = states[0]
    step: int = first["step"]
    if group["clipping_scale"] is None or step == 0:
        return 1.0
    weighted = []
    for state, grad in zip(states, grads, strict=True):
        size = torch.linalg.vector_norm(grad.flatten(1) if grad.ndim > 1 else grad, dim=-1)
        weight = state["param_rms"].flatten() if "param_rms" in state else group["scalar_lr_scale"]
        weighted.append((size * weight).flatten())
    norm = torch.cat(weighted).norm()

    period = group["clipping_update_period"]
    if "model_norms" not in first:
        first["model_norms"] = torch.zeros(period, device=norm.device)
    norms = first["model_norms"]
    norms[step % period] = norm
    early = step in EARLY_THRESHOLD_STEPS and step < period
    if early or step % period == 0:
        recent = norms.sort().values
        if early:
            recent = recent[-step:]
        median = recent[len(recent) // 4 * 2].item()
        if not math.isfinite(median):
            raise FloatingPointError(
                f"ScaledAdam: at step {step} most recent gradient norms are not finite; lower the "
                f"learning rate or look for a bad batch (median {median})"
            )
        # While the norm still changes fast, twice the room.
        first["model_norm_threshold"] = (2.0 if early else 1.0) * group["clipping_scale"] * median
        first["num_clipped"] = 0
    size = norm.item()
    if not math.isfinite(size):
        logger.warning("step %d: gradient of norm %s taken as zero", step, size)
        return 0.0
    if "model_norm_threshold" not in first:
        return 1.0
    factor = min(1.0, first["model_norm_threshold"] / (size + 1e-20))
    if factor < 1.0:
        first["num_clipped"] += 1
    if factor < 0.1:
        logger.warning("step %d: gradient of norm %.3g scaled by %.3g", step, size, factor)
    return float(factor)


class Eden:
    """The Eden learning rate: a power law in batches times one in epochs, after a warm-up.

    lr = base_lr * ((b^2 + B^2) / B^2)^-0.25 * ((e^2 + E^2) / E^2)^-0.25 * warmup(b), where b and e
    are the batches and epochs done, B and E `lr_batches` and `lr_epochs`, and warmup(b) rises
    linearly from `warmup_start` to 1 over `warmup_batches`. The base rate is the one the group had
    when the first schedule was made for it (kept in the group as "base_lr").

    Args:
        optimizer: whose groups' "lr" is set.
        lr_batches: B.
        lr_epochs: E.
        warmup_batches: length of the warm-up; 0 for none.
        warmup_start: factor at batch 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: float = 500.0,
        warmup_start: float = 0.5,
    ) -> None:
        self.optimizer = optimizer
        self.lr_batches = lr_batches
        self.lr_epochs = lr_epochs
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        self.batch = 0
        self.epoch = 0
        _set_rates(optimizer, self.factor())

    def factor(self) -> float:
        """What the base rate is multiplied with at the current batch and epoch."""
        batches, epochs = self.batch / self.lr_batches, self.epoch / self.lr_epochs
        decay: float = ((batches**2 + 1) * (epochs**2 + 1)) ** -0.25
        return decay * _warmup(self.batch, self.warmup_batches, self.warmup_start)

    def step_batch(self, batch: int) -> None:
        """Set the rate for the batch of this number, counted over all epochs."""
        self.batch = batch
        _set_rates(self.optimizer, self.factor())

    def step_epoch(self, epoch: int) -> None:
        """Set the rate after this number of complete epochs."""
        self.epoch = epoch
        _set_rates(self.optimizer, self.factor())

    def state_dict(self) -> dict[str, int]:
        """The position; the settings come from the config."""
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position and set the rate."""
        self.batch, self.epoch = state["batch"], state["epoch"]
        _set_rates(self.optimizer, self.factor())


class Cooldown:
    """A schedule for runs of a known, short length: warm-up, constant, linear cool-down.

    Takes Eden's place (same methods), but is a function of the batch number alone.

    Args:
        optimizer: whose groups' "lr" is set.
        max_steps: batches of the whole run.
        warmup_batches: length of the warm-up; 0 for none.
        warmup_start: factor at batch 0.
        cooldown: the last fraction of the run, over which the rate falls linearly.
        floor: factor at `max_steps` and after.

    Raises:
        ValueError: a run without steps, or a fraction outside [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_steps: int,
        warmup_batches: float = 100.0,
        warmup_start: float = 0.5,
        cooldown: float = 0.5,
        floor: float = 0.05,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"Cooldown: max_steps is {max_steps}, expected 1 or more")
        for name, value in (("cooldown", cooldown), ("floor", floor)):
            if not 0 <= value <= 1:
                raise ValueError(f"Cooldown: {name} is {value}, expected a number in [0, 1]")
        self.optimizer = optimizer
        self.max_steps = max_steps
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        self.cooldown = cooldown
        self.floor = floor
        _set_rates(optimizer, self.factor(0))

    def factor(self, batch: int) -> float:
        """What the base rate is multiplied with at this batch."""
        cooldown_steps = self.cooldown * self.max_steps
        left = max(self.max_steps - batch, 0)
        cooled = 1.0
        if left < cooldown_steps:
            cooled = self.floor + (1 - self.floor) * left / cooldown_steps
        return cooled * _warmup(batch, self.warmup_batches, self.warmup_start)

    def step_batch(self, batch: int) -> None:
        """Set the rate for the batch of this number, counted over all epochs."""
        _set_rates(self.optimizer, self.factor(batch))

    def step_epoch(self, epoch: int) -> None:
        """Nothing: epochs do not count here."""

    def state_dict(self) -> dict[str, int]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to load: the rate is set by the next `step_batch`."""


def _warmup(batch: int, batches: float, start: float) -> float:
    """Rise linearly from `start` at batch 0 to 1 at batch `batches`."""
    return 1.0 if batch >= batches else start + (1 - start) * batch / batches


def _set_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
