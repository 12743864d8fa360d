"""A run and its checkpoints: what is in one, which of them stay, and where a run goes on from.

A run that was killed and goes on equals the undisturbed one: a checkpoint holds the model, its
running average, optimiser, schedule, place in the data, the counts of bad batches and the states of
the random generators (which each step sets again from the seed and its number).
"""

import functools
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from icetransfer.config import Config
from icetransfer.data.blocks import hold_blocks
from icetransfer.data.loader import (
    Batch,
    Shares,
    TrainLoader,
    dev_batches,
    dev_cuts,
    train_loader,
)
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import Experiment, checkpoint_steps, log
from icetransfer.model.adapters import adapter_state, attach, is_fixed
from icetransfer.model.averaging import StateDict, start_average
from icetransfer.model.checkpoint import Checkpoint, DamagedError, read_checkpoint, save_checkpoint
from icetransfer.model.parts import by_parameter, is_in
from icetransfer.model.transducer import TransducerModel, build_transducer
from icetransfer.stage.atomic import FullDiskError
from icetransfer.training.distributed import GradientSums, World
from icetransfer.training.faults import (
    MAX_RETURNS,
    RATE_FACTOR,
    BadBatches,
    BadRun,
    Return,
    describe_end,
    read_returns,
    write_returns,
)
from icetransfer.training.optim import Cooldown, Eden, ScaledAdam
from icetransfer.training.scheme import Settled, settle, settled_train

DEV_SECONDS = 600  # dev audio at most, the same recordings each time


@dataclass
class Run:
    """What changes from step to step, and what the steps need.

    Attributes:
        experiment: whose config decides.
        model: in training.
        averaged: the running average of its weights.
        optimizer: of its parameters.
        scheduler: of the optimiser's rates.
        loader: of the batches.
        scaler: of the loss, when it is computed in fp16.
        precision: the type of most of the computation, float32 for all of it.
        world: the processes that train together.
        gradient_sums: over them.
        tokenizer: of the model's tokens.
        step: steps done.
        rate: factor on the learning rate; below 1 after returns from bad batches.
        bad: counts of skipped batches.
        dev_scores: dev WER, or without it dev loss, of each step at which it was computed.
    """

    experiment: Experiment
    model: TransducerModel
    averaged: StateDict
    optimizer: ScaledAdam
    scheduler: Cooldown | Eden
    loader: TrainLoader
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    world: World
    gradient_sums: GradientSums
    tokenizer: Tokenizer
    step: int = 0
    rate: float = 1.0
    bad: BadBatches = field(default_factory=BadBatches)
    dev_scores: dict[int, float] = field(default_factory=dict)

    @property
    def settings(self) -> Settled:
        """The config's train section, with nothing open."""
        return settled_train(self.experiment.config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.world.device

    @property
    def seed(self) -> int:
        """The experiment's seed."""
        return self.experiment.config.seed

    @functools.cached_property
    def dev(self) -> list[Batch]:
        """This process's share of the dev batches, the same recordings in each run."""
        cuts = dev_cuts(self.experiment, DEV_SECONDS)
        batches = dev_batches(cuts, self.tokenizer, self.settings.batch_seconds)
        return batches[self.world.rank :: self.world.size]


def average_period(settings: Settled) -> int:
    """Steps between updates of the running average; a very short run still has ten of them."""
    return min(settings.average_period, max(1, settings.max_steps // 10))


def average_start(settings: Settled, steps: int | None = None) -> int:
    """The step after which the final average begins, on an update of the running average.

    Args:
        settings: of the run.
        steps: the length of a branch of it; None for the run itself.
    """
    period = average_period(settings)
    length = settings.max_steps if steps is None else steps
    return int(length * (1 - settings.average_fraction)) // period * period


def branch_point(settings: Settled, steps: int) -> int:
    """The last step that a run of so many steps has in common with a longer one."""
    constant = int(steps * (1 - settings.schedule.cooldown_fraction))
    return min(constant, average_start(settings, steps))


def needed_later(settings: Settled) -> set[int]:
    """The steps whose checkpoints are used when the run is over, besides its last ones."""
    branches = {branch_point(settings, steps) for steps in settings.branches}
    return {average_start(settings)} | branches


def is_regular(settings: Settled, step: int) -> bool:
    """Whether an undisturbed run has a checkpoint of this step."""
    return (
        step % settings.checkpoint_every == 0
        or step == settings.max_steps
        or step in needed_later(settings)
    )


def surplus(steps: Iterable[int], keep: int, start: int, best: Iterable[int] = ()) -> list[int]:
    """The checkpoints to delete: all but the last `keep`, the one nearest `start`, and `best`."""
    ordered = sorted(steps)
    kept = {*ordered[-keep:], min(ordered, key=lambda step: abs(step - start)), *best}
    return [step for step in ordered if step not in kept]


def checkpoint_path(experiment: Experiment, step: int) -> Path:
    """The checkpoint of a step."""
    return experiment.checkpoints_dir / f"checkpoint-{step}.pt"


def returns_path(experiment: Experiment) -> Path:
    """The list of returns from bad batches."""
    return experiment.checkpoints_dir / "returns.json"


def run_again_path(experiment: Experiment) -> Path:
    """Says, while it is there, that a signal has stopped the run: torchrun hides exit codes."""
    return experiment.checkpoints_dir / "run-again"


def saved_steps(experiment: Experiment) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return checkpoint_steps(experiment.checkpoints_dir)


def newest_checkpoint(experiment: Experiment) -> tuple[int, Checkpoint] | None:
    """The last whole checkpoint and its step; a damaged one is put aside with a warning."""
    for partial in experiment.checkpoints_dir.glob(".*.partial.checkpoint-*.pt"):
        partial.unlink()  # of a process that was killed while it wrote
    for step in reversed(saved_steps(experiment)):
        path = checkpoint_path(experiment, step)
        try:
            return step, read_checkpoint(path)
        except DamagedError as error:
            aside = path.rename(path.with_name(f"{path.name}.damaged"))
            log.warning("%s. It is now %s; the run goes on from the one before", error, aside.name)
    return None


def agree_on_newest(experiment: Experiment, world: World) -> tuple[int, Checkpoint] | None:
    """`newest_checkpoint`, the same one in every process."""
    newest: tuple[int, Checkpoint] | None = None

    def find() -> int | None:
        nonlocal newest
        newest = newest_checkpoint(experiment)
        return newest and newest[0]

    step = world.as_writer(find)
    if world.is_writer or step is None:
        return newest
    return step, read_checkpoint(checkpoint_path(experiment, step))


def start_run(
    experiment: Experiment,
    newest: tuple[int, Checkpoint] | None,
    world: World = World(),  # noqa: B008 - it is frozen
) -> Run:
    """The run at its newest checkpoint, or at init.pt when there is none.

    Raises:
        ValueError: init.pt is missing or does not fit the tokens, or the data are others than
            those the run began with.
    """
    experiment = settle(experiment)
    init = experiment.init_checkpoint
    if newest is None and not init.is_file():
        raise ValueError(f"{init} does not exist: run stage 5, which makes it")
    path = checkpoint_path(experiment, newest[0]) if newest else init
    dims, weights, extra = newest[1] if newest else read_checkpoint(init)
    model = build_transducer(dims)
    model.load_state_dict(weights)
    if (adapters := experiment.config.transfer.adapters).rank:
        attach(model, adapters.rank, adapters.parts, experiment.config.seed)
        model.load_state_dict(extra.get("adapters", {}), strict=False)
    model.to(world.device)
    tokenizer = Tokenizer(experiment.lang_dir / "bpe.model")
    if tokenizer.vocab_size != dims.vocab_size:
        raise ValueError(
            f"{path} has {dims.vocab_size} tokens, {experiment.lang_dir / 'bpe.model'} has "
            f"{tokenizer.vocab_size}: remove the experiment's init.pt and run stage 5 again"
        )
    settings = settled_train(experiment.config)
    world.as_writer(lambda: hold_blocks(experiment))
    optimizer = make_optimizer(model, experiment.config)
    precision = choose_precision(settings.precision, world.device)
    run = Run(
        experiment=experiment,
        model=model,
        averaged=start_average(model),
        optimizer=optimizer,
        scheduler=_make_scheduler(optimizer, settings),
        loader=train_loader(
            experiment,
            tokenizer,
            Shares(
                count=world.size * settings.accumulate,
                mine=tuple(i * world.size + world.rank for i in range(settings.accumulate)),
            ),
        ),
        # As icefall: losses are sums, and large.
        scaler=torch.amp.GradScaler(
            world.device.type, init_scale=1.0, enabled=precision == torch.float16
        ),
        precision=precision,
        world=world,
        gradient_sums=GradientSums(world, model.parameters()),
        tokenizer=tokenizer,
        rate=RATE_FACTOR ** len(read_returns(returns_path(experiment))),
    )
    if newest:
        _restore(run, extra)
    return run


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The type for most of the computation: "auto" is bf16 on a GPU that has it, else fp32.

    Raises:
        ValueError: the GPU does not have the type.
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return torch.bfloat16 if bf16 else torch.float32
    if wanted == "bf16" and device.type == "cuda" and not bf16:
        raise ValueError("train.precision=bf16: this GPU does not have it; use fp16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def make_optimizer(model: TransducerModel, config: Config) -> ScaledAdam:
    """ScaledAdam with a group for each learning rate and each time of freezing.

    A group's `freeze_steps` says for how many steps it is frozen, -1 for all; `parts`, which parts
    have its rate. What is said of the parts that a base model gives is for its weights: with
    init=random these parts begin with noise, and train at the full rate from the first step.

    Raises:
        ValueError: a part that matches no parameter, or nothing left to train.
    """
    settings, adapters = config.train, config.transfer.adapters
    names = [name for name, _ in model.named_parameters()]
    scales = by_parameter(settings.lr_scale, names, 1.0, "train.lr_scale")
    frozen = by_parameter(settings.freeze, names, 0, "train.freeze")
    if config.init == "random":
        begun = {name for part in config.transfer.parts for name in names if is_in(name, part)}
        scales |= dict.fromkeys(begun, 1.0)
        frozen |= dict.fromkeys(begun, 0)
    if adapters.rank:
        frozen |= {name: -1 for name in names if is_fixed(name, adapters.parts)}
    if all(frozen.values()):
        raise ValueError(
            "train.freeze leaves nothing to train in the first steps: take a part out of it, such "
            "as the decoder, which starts from scratch"
        )
    groups: dict[tuple[float, int], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((scales[name], frozen[name]), []).append((name, parameter))
    return ScaledAdam(
        [
            {
                "params": parameters,
                "lr": settings.lr * scale,
                "freeze_steps": steps,
                "parts": [part for part, value in settings.lr_scale.items() if value == scale],
            }
            for (scale, steps), parameters in groups.items()
        ],
        lr=settings.lr,
        clipping_scale=settings.clipping_scale,
    )


def set_frozen(optimizer: ScaledAdam, step: int) -> None:
    """Freezes and wakes the groups as a step (from 1) wants it."""
    for group in optimizer.param_groups:
        if until := group.get("freeze_steps", 0):
            for parameter in group["params"]:
                parameter.requires_grad_(0 <= until < step)


def _make_scheduler(optimizer: ScaledAdam, settings: Settled) -> Cooldown | Eden:
    schedule = settings.schedule
    if schedule.kind == "eden":
        return Eden(
            optimizer,
            schedule.eden_batches,
            schedule.eden_epochs,
            warmup_batches=schedule.warmup_steps,
        )
    return Cooldown(
        optimizer,
        settings.max_steps,
        warmup_batches=schedule.warmup_steps,
        cooldown=schedule.cooldown_fraction,
    )


def save_run(run: Run) -> None:
    """Writes the checkpoint of the run's step, then deletes those that are not needed any more.

    On a full disk these go first, but for the newest.  Only the writer of the processes does all
    this; the others wait for it.

    Raises:
        FullDiskError: it could not be written; the earlier ones that are needed are all there.
    """
    run.world.as_writer(lambda: _write_checkpoint(run))


def _write_checkpoint(run: Run) -> None:
    try:
        _write(run)
    except FullDiskError as error:
        newest = saved_steps(run.experiment)[-1:]
        spare = [step for step in _unneeded(run) if step not in newest]
        if not spare:
            raise
        log.warning(
            "%s. The checkpoints of steps %s, which are the next to go, go now", error, spare
        )
        _delete(run, spare)
        _write(run)
    _delete(run, _unneeded(run))


def _write(run: Run) -> None:
    save_checkpoint(
        checkpoint_path(run.experiment, run.step),
        run.model,
        model_avg=run.averaged,
        optimizer=run.optimizer.state_dict(),
        scheduler=run.scheduler.state_dict(),
        scaler=run.scaler.state_dict(),
        sampler=run.loader.state_dict(),
        batch_idx_train=run.step,
        average_period=average_period(run.settings),
        bad_batches=asdict(run.bad),
        dev_scores=run.dev_scores,
        random_states=_random_states(),
        adapters=adapter_state(run.model),
    )


def _delete(run: Run, steps: Iterable[int]) -> None:
    for step in steps:
        checkpoint_path(run.experiment, step).unlink()


def _unneeded(run: Run) -> list[int]:
    """The checkpoints that are not kept once that of the run's step is there."""
    settings = run.settings
    steps = sorted({*saved_steps(run.experiment), run.step})
    # One that a signal asked for has served once the next regular one is there.
    passing = [s for s in steps if not is_regular(settings, s) and s != run.step]
    regular = [s for s in steps if s not in passing]
    scores = run.dev_scores
    measured = sorted(set(regular) & scores.keys(), key=lambda step: (scores[step], step))
    best = measured[: settings.keep_best]
    best += sorted(needed_later(settings) & set(regular))
    if run.bad.in_a_row:  # where training would go back to
        best += [s for s in regular if s < run.bad.since][-1:]
    return passing + surplus(regular, settings.keep_checkpoints, average_start(settings), best)


def _restore(run: Run, extra: Mapping[str, Any]) -> None:
    run.step = extra["batch_idx_train"]
    run.averaged = {name: value.to(run.device) for name, value in extra["model_avg"].items()}
    run.optimizer.load_state_dict(extra["optimizer"])
    run.scheduler.load_state_dict(extra["scheduler"])
    run.loader.load_state_dict(extra["sampler"])
    # What follows is not in the checkpoints of earlier versions.
    run.bad = BadBatches(**extra.get("bad_batches", {}))
    run.dev_scores = dict(extra.get("dev_scores", {}))
    if extra.get("scaler"):
        run.scaler.load_state_dict(extra["scaler"])
    if "random_states" in extra:
        _set_random_states(extra["random_states"])


def _random_states() -> dict[str, Any]:
    """The states of all generators, in types that a safe load takes."""
    _, keys, position, *gauss = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": [keys.tolist(), position, *gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def go_back(experiment: Experiment, bad: BadRun) -> None:
    """After a run of bad batches: back to the last checkpoint before it, with a lower rate.

    Raises:
        ValueError: this has been done `MAX_RETURNS` times; says what was seen at each.
    """
    path = returns_path(experiment)
    returns = read_returns(path)
    if len(returns) == MAX_RETURNS:
        raise ValueError(describe_end(path, returns, bad))
    settings = settled_train(experiment.config)
    steps = saved_steps(experiment)
    target = max((s for s in steps if s < bad.since and is_regular(settings, s)), default=0)
    # First these: a process that is killed between the two will come here once more.
    for step in steps:
        if step > target:
            checkpoint_path(experiment, step).unlink()
    returns.append(Return(bad.since, target, bad.seen))
    write_returns(path, returns)
    log.warning(
        "%s: back to step %d, from now on at %g times the learning rate",
        bad, target, RATE_FACTOR ** len(returns),
    )  # fmt: skip
