"""What a training does where its config does not say: batch, length, rates, freezing.

Few numbers decide all of it; docs/decisions.md says which of them were measured, and where.  What
was loaded from the base model stays as it is while what is new learns to use it, then learns at a
part of the rate.  A short run gives what is new a faster rate, because ScaledAdam moves a weight by
its rate at each step, so that rate times steps is how far it gets.  And a run goes on until it has
seen enough audio.  Whatever the config sets is kept.

The decisions and their reasons are printed when a run begins and saved in `scheme.json`, so that a
run goes on as it began.  This module imports no torch: the plan of a sweep asks it too.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from icetransfer.config import SUBMODULES, Config, Schedule, Train, hours_label
from icetransfer.data.subset import subset_path
from icetransfer.experiment import Experiment
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json

BATCH_SECONDS = 16.0, 400.0  # at least, at most
BATCH_SHARE = 500  # a batch is this part of the data, within these bounds

LEAST_STEPS = 1500
PASSES = 20  # over the data, up to MANY_HOURS of it
MANY_HOURS = 100.0  # beyond, passes fall with the root of the hours

LOADED = 0.3  # of the learning rate, for what the base model gives
FROZEN = 0.2  # of the steps, of up to NEW_STEPS of them, in which that stays as it was
NEW_STEPS = 2500  # steps in which what is new learns enough at the full rate
FASTEST = 6.0  # of the learning rate, for what is new in a short run, or on little text
MANY_PASSES = 40  # over the data: then the decoder learns its sentences by heart, and is slowed
SLOW_DECODER = 0.1  # of the learning rate

WARMUP_STEPS = 500
WARMUP_SHARE = 0.04  # of the steps, at most
EVALUATIONS = 10  # dev losses and checkpoints in a run, at least
EVALUATE_EVERY = 1000  # steps, at most


@dataclass(frozen=True)
class Scheme:
    """Decisions, and why.

    Attributes:
        values: of the keys of `train` that the config leaves open, as it would set them.
        reasons: by key.
    """

    values: dict[str, Any]
    reasons: dict[str, str]


def decide(config: Config, seconds: float, processes: int = 1) -> Scheme:
    """Decides what the config leaves open.

    Args:
        config: an experiment's.
        seconds: of training audio, at its own speed.
        processes: that train together, each with batches of its own.
    """
    train = config.train
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def set_to(key: str, value: Any, reason: str) -> None:
        values[key], reasons[key] = value, reason

    audio = hours_label(seconds / 3600)
    batch = train.batch_seconds
    if batch is None:
        batch = round(min(max(seconds / BATCH_SHARE, BATCH_SECONDS[0]), BATCH_SECONDS[1]))
        set_to(
            "batch_seconds", batch,
            f"a {BATCH_SHARE}th of the {audio}, between {BATCH_SECONDS[0]:g} and "
            f"{BATCH_SECONDS[1]:g}",
        )  # fmt: skip
    step_seconds = batch * train.accumulate * processes
    steps = train.max_steps
    if steps is None:
        steps, why = _length(config, seconds, step_seconds)
        set_to("max_steps", steps, why)
    if config.init != "random":
        scales, why = _rates(config, steps, passes=steps * step_seconds / seconds)
        set_to("lr_scale", scales | dict(train.lr_scale), why)
        if not config.transfer.adapters.rank:
            frozen = round(FROZEN * min(steps, NEW_STEPS))
            set_to(
                "freeze", dict.fromkeys(config.transfer.parts, frozen) | dict(train.freeze),
                "what the base model gives waits until what is new has begun to use it",
            )  # fmt: skip
    warmup = min(WARMUP_STEPS, round(WARMUP_SHARE * steps))
    share = f"{100 * WARMUP_SHARE:g} % of the steps, {WARMUP_STEPS} at most"
    if train.schedule.warmup_steps is None:
        set_to("schedule.warmup_steps", warmup, share)
    if train.loss_warmup_steps is None:
        set_to("loss_warmup_steps", warmup, share)
    every = min(EVALUATE_EVERY, max(1, steps // EVALUATIONS))
    for key in ("valid_every", "checkpoint_every"):
        if getattr(train, key) is None:
            set_to(key, every, f"{EVALUATIONS} in a run, or every {EVALUATE_EVERY} steps")
    return Scheme(values, reasons)


def _length(config: Config, seconds: float, step_seconds: float) -> tuple[int, str]:
    """Steps of a run, and why so many."""
    train, hours = config.train, seconds / 3600
    if train.epochs is not None:
        copies = sum(1 / speed for speed in config.data.features.speeds)
        steps = max(1, round(train.epochs * copies * seconds / step_seconds))
        return steps, f"{train.epochs:g} epochs at all speeds, {step_seconds:g} s a step"
    passes = PASSES * min(1.0, math.sqrt(MANY_HOURS / hours))
    wanted = round(passes * seconds / step_seconds)
    if wanted < LEAST_STEPS:
        return LEAST_STEPS, f"the smallest useful number, {step_seconds:g} s each"
    return wanted, f"{passes:.3g} passes over the {hours_label(hours)}, {step_seconds:g} s a step"


def _rates(config: Config, steps: int, passes: float) -> tuple[dict[str, float], str]:
    """Factors on the learning rate by part of the model, and why."""
    transfer = config.transfer
    is_little = passes > MANY_PASSES
    fast = FASTEST if is_little else round(min(max(NEW_STEPS / steps, 1.0), FASTEST), 2)
    scales = {part: fast for part in SUBMODULES if part != "ctc_output" or transfer.ctc}
    scales["decoder"] = SLOW_DECODER if is_little else 1.0
    # Of what the base model gives, adapters are all that is trained: they begin at nothing.
    scales |= dict.fromkeys(transfer.parts, 1.0 if transfer.adapters.rank else LOADED)
    loaded = f"{LOADED:g} for what the base model gives"
    if is_little:
        return scales, (
            f"{loaded}; as the text is seen {passes:.3g} times, {fast:g} for new projections and "
            f"{SLOW_DECODER:g} for the decoder"
        )
    return scales, (
        f"{loaded}; {fast:g} for new projections, which need {NEW_STEPS} steps at the full rate; "
        f"the text is seen {passes:.3g} times"
    )


class SettledSchedule(Schedule):
    """A schedule in which nothing is open."""

    warmup_steps: int


class Settled(Train):
    """Settings of a training in which nothing is open."""

    max_steps: int
    batch_seconds: float
    loss_warmup_steps: int
    valid_every: int
    checkpoint_every: int
    schedule: SettledSchedule


def merge(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with the decisions in it; its `train` is `Settled`."""
    tree = config.train.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section[part]
        if key in ("lr_scale", "freeze"):
            section[name] = value | section[name]
        elif section[name] is None:
            section[name] = value
    if "max_steps" in values:
        tree["epochs"] = None  # it is said in steps now
    return config.model_copy(update={"train": Settled.model_validate(tree)})


def settled_train(config: Config) -> Settled:
    """The training's settings in a config that `merge` made."""
    assert isinstance(config.train, Settled)
    return config.train


def settle(experiment: Experiment) -> Experiment:
    """The experiment with every setting of its training: as `scheme.json` has them, or as decided.

    Raises:
        ValueError: its hours are not chosen yet.
    """
    path = experiment.scheme_path
    if path.is_file():
        values = read_json(path, ["values"])["values"]
    else:
        values = decide(experiment.config, training_seconds(experiment)).values
    return replace(experiment, config=merge(experiment.config, values))


def save(experiment: Experiment, scheme: Scheme) -> None:
    """Writes `scheme.json`, which decides from then on."""
    tree = {"values": scheme.values, "reasons": scheme.reasons}
    atomic.write_text(experiment.scheme_path, json.dumps(tree, indent=1) + "\n")


def lines(scheme: Scheme) -> list[str]:
    """The decisions for people, a line each."""
    return [
        f"train.{key}={_text(value)}: {scheme.reasons[key]}" for key, value in scheme.values.items()
    ]


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return "{" + ", ".join(f"{key}: {number:g}" for key, number in value.items()) + "}"


def training_seconds(experiment: Experiment) -> float:
    """The audio of the experiment's hours, at its own speed.

    Raises:
        ValueError: they are not chosen yet.
    """
    path = subset_path(experiment).with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run stage 3, which makes it")
    corpora = read_json(path, ["corpora"])["corpora"]
    return 3600 * math.fsum(corpus["hours"] for corpus in corpora.values())
