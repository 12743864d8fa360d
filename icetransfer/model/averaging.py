"""Averages of weights: the running one of a training, of a range of its steps, of several models.

All functions work on state dicts (name to tensor) in double precision and never in place, so that
tied entries, which share their storage, are averaged once like any other. Entries that are not
floating point are taken from the latest model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icetransfer.model.adapters import plain_state

StateDict = dict[str, Tensor]


def start_average(model: nn.Module) -> StateDict:
    """The running average before the first step: the model's weights in float64."""
    return {name: _wide(value) for name, value in plain_state(model).items()}


def update_averaged_model(
    step: int, average_period: int, model: nn.Module, averaged: StateDict
) -> None:
    """Takes the model into the running average, at each `average_period`-th step.

    The average is the mean of the models seen at steps period, 2 * period, ..., step.

    Args:
        step: training steps done, from 1; at other steps than multiples nothing happens.
        average_period: steps between two models of the average.
        model: the current model.
        averaged: from `start_average`; its entries are replaced.
    """
    if step % average_period != 0:
        return
    weight = average_period / step
    for name, value in plain_state(model).items():
        averaged[name] = _blend([(averaged[name], 1 - weight), (value, weight)])


def average_range(start: Mapping[str, Any], end: Mapping[str, Any]) -> StateDict:
    """The average of the weights between two checkpoints, from their running averages.

    With a_n the running average after n steps, n * a_n is the sum of the models seen until then
    (times the period), so that the difference of two such sums is the sum over the steps between.

    Args:
        start: a checkpoint with `model_avg`, `batch_idx_train` and `average_period`; itself not in
            the range.
        end: a later one of the same run.

    Returns:
        The average in the types of `end`'s model_avg.

    Raises:
        ValueError: a key is absent, the models differ, or no model was seen between the two.
    """
    for which, checkpoint in (("first", start), ("last", end)):
        for key in ("model_avg", "batch_idx_train", "average_period"):
            if checkpoint.get(key) is None:
                raise ValueError(
                    f"averaging over a range: the {which} checkpoint has no {key}; take files "
                    f"written while training, or average several `model`s instead"
                )
    period = end["average_period"]
    # The running average changes every `period` steps only.
    start_step, end_step = (c["batch_idx_train"] // period * period for c in (start, end))
    if not end_step > start_step:
        raise ValueError(
            f"averaging over a range: no model was averaged between step "
            f"{start['batch_idx_train']} of the first checkpoint and {end['batch_idx_train']} of "
            f"the last (one in {period} steps is); expected a later last checkpoint"
        )
    weight = end_step / (end_step - start_step)
    return _average([(start["model_avg"], 1 - weight), (end["model_avg"], weight)])


def average_models(models: Sequence[Mapping[str, Tensor]]) -> StateDict:
    """The plain mean of several state dicts, in the types of the last.

    Raises:
        ValueError: no model, or models of different names or shapes.
    """
    return _average([(model, 1 / len(models)) for model in models])


def _average(terms: Sequence[tuple[Mapping[str, Tensor], float]]) -> StateDict:
    """The weighted sum of state dicts, in the types of the last.

    Raises:
        ValueError: nothing to average, or names or shapes differ.
    """
    if not terms:
        raise ValueError("averaging: no model given, expected at least one")
    latest = terms[-1][0]
    for number, (model, _) in enumerate(terms, start=1):
        different = sorted(
            name
            for name in latest.keys() | model.keys()
            if name not in latest or name not in model or latest[name].shape != model[name].shape
        )
        if different:
            raise ValueError(
                f"averaging: model {number} of {len(terms)} does not have the same parameters as "
                f"the last one: {different[:3]} differ ({len(different)} in all); expected "
                f"checkpoints of one run"
            )
    return {
        name: _blend([(model[name], weight) for model, weight in terms]).to(value.dtype)
        for name, value in latest.items()
    }


def _blend(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The weighted sum in float64; of tensors that are not floating point, the last."""
    latest = terms[-1][0]
    if not latest.is_floating_point():
        return latest.clone()
    total = torch.zeros_like(latest, dtype=torch.float64)
    for value, weight in terms:
        total.add_(_wide(value), alpha=weight)
    return total


def _wide(value: Tensor) -> Tensor:
    """A copy, in float64 where it is floating point."""
    dtype = torch.float64 if value.is_floating_point() else value.dtype
    return value.detach().to(dtype, copy=True)
