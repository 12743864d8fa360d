"""ScaledAdam and the learning-rate schedules, with icefall's trajectories.

Source: Z. Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition"
(arXiv:2310.11230), section 3.4 and appendix A.1 for ScaledAdam, eq. 8 for Eden. ScaledAdam scales
each tensor's Adam update by the tensor's own root mean square (rms), and learns that scale with a
second, slower Adam update along the tensor's direction.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from icetransfer.model import gpu

# Early estimates of the clipping threshold, in steps, before a whole period has been seen.
EARLY_THRESHOLD_STEPS = (10, 20, 40)


class ScaledAdam(Optimizer):
    """Adam whose step is relative to the size of each parameter tensor.

    The state of the B tensors of one shape lies, stacked, under the first of them: `step`, `delta`
    and `exp_avg_sq` (B, *shape), and for tensors with more than one element `param_rms` and
    `scale_exp_avg_sq` (B, 1...), `scale_grads` (size_update_period, B, 1...). The first such stack
    of a group also holds what clipping needs: `model_norms` (clipping_update_period,),
    `model_norm_threshold`, `num_clipped`.

    A tensor without a gradient is updated as if its gradient were zero; a group none of whose
    tensors requires a gradient is frozen, and its state with it.

    A step whose gradient is not finite changes neither parameters nor moments.  It is skipped on
    the device: a step never waits for it, but when the clipping threshold is renewed.

    Attributes:
        grad_norm: of the last step's gradient, each tensor's weighted by its rms; on the device.

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

    # To torch's GradScaler: do not wait for the device, but tell `step` by `self.found_inf`.
    _step_supports_amp_scaling = True

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
        self._flat: list[_FlatGroup] = []  # by group, made at its first step
        self.grad_norm = torch.zeros(())
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a loaded or unpickled state; the flat tensors are made from it at the next step."""
        super().__setstate__(state)
        self._flat = []

    def state_dict(self) -> dict[str, Any]:
        """The state, with the counts that a run keeps on the device."""
        for flat in self._flat:
            flat.store_counts()
        return super().state_dict()

    @overload
    def step(self, closure: None = None, *, skip: Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, skip: Tensor | None = None) -> float: ...

    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, skip: Tensor | None = None
    ) -> float | None:
        """Updates all parameters from their gradients.

        Args:
            closure: computes the gradients and returns the loss.
            skip: a truth value on the device: when true, the step is skipped as one whose gradient
                is not finite.

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
        for group in self.param_groups[len(self._flat) :]:
            self._flat.append(_FlatGroup(group, self.state))
        trained = [flat for flat in self._flat if not flat.is_frozen()]
        norms = [flat.gather() for flat in trained]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        usable = self.grad_norm.isfinite()
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            usable = usable & (found_inf == 0)
        if skip is not None:
            usable = usable & ~skip
        for flat, norm in zip(trained, norms, strict=True):
            flat.step(norm, usable, is_scaled=found_inf is not None)
        return loss


class _FlatGroup:
    """One parameter group as flat tensors, so that a step is a few large operations.

    E elements in all, n tensors; the optimiser's state holds views of what is kept here. A
    one-element tensor has no rms of its own: `scalar_lr_scale` stands in its place.

    Raises:
        ValueError: parameters of several types or devices in the group.
    """

    def __init__(self, group: dict[str, Any], states: dict[Tensor, dict[str, Any]]) -> None:
        self.group = group
        stacks = _stacks(group["params"])
        self.params = [param for tensors in stacks for param in tensors]
        first = self.params[0]
        kinds = {(param.dtype, param.device) for param in self.params}
        if len(kinds) > 1:
            raise ValueError(
                f"ScaledAdam: the parameters of one group are of {sorted(map(str, kinds))}; "
                f"expected one type and device, so make a group of each"
            )
        self.states = [states[tensors[0]] for tensors in stacks]
        sizes = [param.numel() for param in self.params]
        self.sizes = torch.tensor(sizes, device=first.device)
        self.is_scalar = self.sizes == 1
        kernels = gpu.kernels("training.kernels") if gpu.takes_kernels(first) else None
        self.segments = kernels.Segments(sizes, first.device) if kernels else None
        total, count = sum(sizes), len(sizes)

        # Copies of parameters and gradients, and their views: by parameter, by stack (B, numel).
        self.values, self.grads = first.detach().new_zeros(2, total).unbind(0)
        views = zip(self.params, torch.split_with_sizes(self.values, sizes), strict=True)
        self.param_values = [view.view_as(param) for param, view in views]
        shapes = [(len(tensors), tensors[0].numel()) for tensors in stacks]
        lengths = [rows * columns for rows, columns in shapes]
        self.value_stacks, self.grad_stacks = (
            [
                part.view(shape)
                for part, shape in zip(torch.split_with_sizes(flat, lengths), shapes, strict=True)
            ]
            for flat in (self.values, self.grads)
        )
        self.zeros = first.detach().new_zeros(max(sizes))  # in place of gradients that are missing
        self._gather()

        self.delta, self.exp_avg_sq = (torch.zeros_like(self.values) for _ in range(2))
        self.rms = self._stack_rms()
        self.scale_exp_avg_sq = torch.zeros_like(self.rms)
        self.scale_grads = self.rms.new_zeros(group["size_update_period"], count)
        self._share_state(stacks)
        self._spread_rms()
        self.num_clipped = self.rms.new_tensor(self.states[0].get("num_clipped", 0))

    def is_frozen(self) -> bool:
        """Whether none of the parameters is to be changed."""
        return not any(param.requires_grad for param in self.params)

    def store_counts(self) -> None:
        """Puts what is counted on the device into the optimiser's state."""
        if "num_clipped" in self.states[0]:
            self.states[0]["num_clipped"] = int(self.num_clipped)

    def gather(self) -> Tensor:
        """Takes the parameters and gradients in; returns the norm of the latter, rms by rms."""
        self._gather()
        norm: Tensor = torch.linalg.vector_norm(self.grads * self.spread_rms)
        return norm

    def _share_state(self, stacks: list[list[Tensor]]) -> None:
        """Makes the optimiser's state views of the flat tensors, which take over what it held."""
        element = row = 0
        for tensors, state in zip(stacks, self.states, strict=True):
            B, shape = len(tensors), tensors[0].shape
            numel = tensors[0].numel()
            elements, rows = slice(element, element + B * numel), slice(row, row + B)
            element, row = elements.stop, rows.stop
            views = {
                "delta": self.delta[elements].view(B, *shape),
                "exp_avg_sq": self.exp_avg_sq[elements].view(B, *shape),
            }
            if numel > 1:
                ones = [1] * len(shape)
                views["param_rms"] = self.rms[rows].view(B, *ones)
                views["scale_exp_avg_sq"] = self.scale_exp_avg_sq[rows].view(B, *ones)
                views["scale_grads"] = self.scale_grads[:, rows].view(-1, B, *ones)
            state.setdefault("step", 0)
            for name, view in views.items():
                if name in state:
                    view.copy_(state[name])
                state[name] = view

    def step(self, norm: Tensor, usable: Tensor, is_scaled: bool) -> None:
        """Updates the parameters from the gradients that were gathered.

        Args:
            norm: what `gather` returned.
            usable: whether to; when false, the gradients count as zero and nothing decays.
            is_scaled: whether a GradScaler looks for a scale at which gradients are finite.
        """
        group, step = self.group, self.states[0]["step"]
        beta1, beta2 = group["betas"]
        factor = self._clipping_factor(step, norm, usable, is_scaled)
        if factor is not None:
            self.grads.mul_(factor.to(self.grads.dtype))
        self.grads.masked_fill_(~usable, 0.0)
        one = torch.ones_like(norm)
        self.delta.mul_(torch.where(usable, beta1, one))
        self._update_scale(step)

        # Adam's direction, relative to each tensor's rms. The bias correction of exp_avg_sq goes
        # to eps and the step size.
        self.exp_avg_sq.mul_(torch.where(usable, beta2, one))
        self.exp_avg_sq.addcmul_(self.grads, self.grads, value=1 - beta2)
        correction = math.sqrt(1 - beta2 ** (step + 1))
        denominator = self.exp_avg_sq.sqrt().add_(group["eps"] * correction)
        step_size = -(1 - beta1) * group["lr"] * correction
        self.delta.addcdiv_(self.grads.mul_(self.spread_rms), denominator, value=step_size)
        for stack in self.value_stacks:
            if stack.shape[1] == 1:
                stack.clamp_(-group["scalar_max"], group["scalar_max"])
        self.values.addcmul_(self.delta, usable.to(self.delta))
        torch._foreach_copy_(self.params, self.param_values)
        for state in self.states:
            state["step"] = step + 1

    def _gather(self) -> None:
        """Copies the parameters and gradients in."""
        torch.cat([param.reshape(-1) for param in self.params], out=self.values)
        parts = [
            self.zeros[: param.numel()] if param.grad is None else param.grad.reshape(-1)
            for param in self.params
        ]
        torch.cat(parts, out=self.grads)

    def _stack_rms(self) -> Tensor:
        """The rms of each tensor, (n,)."""
        if self.segments:
            norms = self.segments.dot(self.values, self.values).sqrt_()
        else:
            norms = torch.cat([torch.linalg.vector_norm(s, dim=1) for s in self.value_stacks])
        rms: Tensor = norms.div_(self.sizes.sqrt())
        return rms.masked_fill_(self.is_scalar, self.group["scalar_lr_scale"])

    def _spread_rms(self) -> None:
        """Repeats each tensor's rms over its elements, (E,)."""
        self.spread_rms = self._spread(self.rms.clamp(min=self.group["param_min_rms"]))

    def _spread(self, of_tensors: Tensor) -> Tensor:
        """(n,) to (E,)."""
        if self.segments:
            return cast(Tensor, self.segments.spread(of_tensors))
        spread = torch.empty_like(self.values)
        parts = torch.split_with_sizes(spread, [s.numel() for s in self.value_stacks])
        rows = torch.split_with_sizes(of_tensors, [len(s) for s in self.value_stacks])
        for stack, part, row in zip(self.value_stacks, parts, rows, strict=True):
            part.view_as(stack).copy_(row.unsqueeze(1))
        return spread

    def _update_scale(self, step: int) -> None:
        """Collects the gradients of the log scales; once a period adds their Adam step to delta."""
        group = self.group
        beta1, beta2 = group["betas"]
        period = len(self.scale_grads)
        if self.segments:
            self.scale_grads[step % period] = self.segments.dot(self.values, self.grads)
        else:
            along = map(torch.linalg.vecdot, self.value_stacks, self.grad_stacks)
            torch.cat(list(along), out=self.scale_grads[step % period])
        if step % period != period - 1:
            return
        self.rms.copy_(self._stack_rms())
        self._spread_rms()
        # One update stands for `period` steps.
        period_beta = beta2**period
        self.scale_exp_avg_sq.mul_(period_beta)
        self.scale_exp_avg_sq.add_(self.scale_grads.square().mean(dim=0), alpha=1 - period_beta)
        bias_correction = 1 - period_beta ** ((step + 1) // period)
        size_lr = group["lr"] * group["scalar_lr_scale"]
        scale_step = self.scale_grads.sum(dim=0).mul_(-size_lr * math.sqrt(bias_correction))
        scale_step.div_(self.scale_exp_avg_sq.sqrt().add_(group["eps"]))
        # Do not shrink what is too small already, nor let anything grow beyond the largest rms.
        scale_step.masked_fill_(self.rms < group["param_min_rms"], 0.0)
        scale_step = torch.minimum(scale_step, (group["param_max_rms"] - self.rms) / self.rms)
        scale_step.masked_fill_(self.is_scalar, 0.0)
        self.delta.addcmul_(self.values, self._spread(scale_step), value=1 - beta1)

    def _clipping_factor(
        self, step: int, norm: Tensor, usable: Tensor, is_scaled: bool
    ) -> Tensor | None:
        """What to multiply the gradients with; also keeps the record of recent norms.

        Raises:
            FloatingPointError: the median of the recent norms is not finite.
        """
        clipping_scale, period = self.group["clipping_scale"], self.group["clipping_update_period"]
        if clipping_scale is None or step == 0:
            return None
        first = self.states[0]
        if "model_norms" not in first:
            first["model_norms"] = torch.zeros(period, device=norm.device)
        norms = first["model_norms"]
        norms[step % period] = norm
        early = step in EARLY_THRESHOLD_STEPS and step < period
        if early or step % period == 0:
            recent = norms.sort().values
            if early:
                recent = recent[-step:]
            median = recent[len(recent) // 4 * 2].item()  # waits for the device
            if not math.isfinite(median):
                if early and is_scaled:  # the scale was too large for most of the first steps
                    return None
                raise FloatingPointError(
                    f"ScaledAdam: at step {step} most recent gradient norms are not finite; lower "
                    f"the learning rate or look for a bad batch (median {median})"
                )
            # While the norm still changes fast, twice the room.
            first["model_norm_threshold"] = (2.0 if early else 1.0) * clipping_scale * median
            first["num_clipped"] = 0
            self.num_clipped.zero_()
        if "model_norm_threshold" not in first:
            return None
        threshold: float = first["model_norm_threshold"]
        factor = (threshold / (norm.double() + 1e-20)).clamp(max=1.0)
        self.num_clipped += (factor < 1.0) & usable
        return factor


def _stacks(params: list[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by type and shape, in the (string) order in which the state is laid out."""
    groups: dict[str, list[Tensor]] = {}
    for param in params:
        key = "_".join([str(param.dtype), *map(str, param.shape)])
        groups.setdefault(key, []).append(param)
    return [groups[key] for key in sorted(groups)]


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
        """Sets the rate for the batch of this number, counted over all epochs."""
        self.batch = batch
        _set_rates(self.optimizer, self.factor())

    def step_epoch(self, epoch: int) -> None:
        """Sets the rate after this number of complete epochs."""
        self.epoch = epoch
        _set_rates(self.optimizer, self.factor())

    def state_dict(self) -> dict[str, int]:
        """The position; the settings come from the config."""
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved position and sets the rate."""
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
        """Sets the rate for the batch of this number, counted over all epochs."""
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
    """Sets every group's rate to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
