"""Stage 7: the average of the weights over the end of a run -> exp/averaged.pt.

    python -m icetransfer.average --exp DIR
    python -m icetransfer.average checkpoints=epoch-28.pt,epoch-29.pt,epoch-30.pt out=averaged.pt
    python -m icetransfer.average checkpoints=DIR last=3 out=averaged.pt
    python -m icetransfer.average checkpoints=epoch-20.pt,epoch-30.pt method=range out=averaged.pt

A running average is kept while training; what is decoded is the average between two checkpoints.
The other forms average any icefall or icetransfer checkpoints: the plain mean of several, or with
`method=range` all steps from the first to the last, by their running averages (`model_avg`).  More
key=value words go to `load_transducer`, such as num_heads or trusted=true.

All functions work on state dicts (name to tensor) in double precision and never in place, so that
tied entries, which share their storage, are averaged once like any other. Entries that are not
floating point are taken from the latest model.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icetransfer.adapters import plain_state
from icetransfer.checkpoint import load_weights, read_checkpoint, save_checkpoint
from icetransfer.experiment import Experiment, log, main, run_stage, sha256, write_provenance
from icetransfer.model.transducer import TransducerModel

StateDict = dict[str, Tensor]


def start_average(model: nn.Module) -> StateDict:
    """The running average before the first step: the model's weights in float64."""
    return {name: _wide(value) for name, value in plain_state(model).items()}


def update_averaged_model(
    step: int, average_period: int, model: nn.Module, averaged: StateDict
) -> None:
    """Take the model into the running average, at each `average_period`-th step.

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


def final_step(experiment: Experiment) -> int:
    """The step at which training ends or, after an early stop, has ended."""
    path = stopped_early_path(experiment)
    if path.is_file():
        return int(path.read_text(encoding="utf-8"))
    return experiment.config.train.max_steps


def stopped_early_path(experiment: Experiment) -> Path:
    """Holds the last step of a run that stopped before the config's."""
    return experiment.checkpoints_dir / "stopped-early"


def average_run(experiment: Experiment) -> None:
    """Averages the last `train.average_fraction` of a finished run.

    Raises:
        ValueError: training is not finished.
    """
    target = experiment.averaged_checkpoint
    if target.is_file():
        log.info("skip: %s is complete", target)
        return
    last = final_step(experiment)
    paths = {
        int(path.stem.partition("-")[2]): path
        for path in experiment.checkpoints_dir.glob("checkpoint-*.pt")
    }
    if last not in paths:
        raise ValueError(
            f"{experiment.checkpoints_dir} has no checkpoint of step {last}: run stage 6 to its end"
        )
    wanted = last * (1 - experiment.config.train.average_fraction)
    dims, _, end = read_checkpoint(paths.pop(last))
    if paths:
        start_step = min(sorted(paths), key=lambda step: abs(step - wanted))
        weights = average_range(read_checkpoint(paths[start_step]).extra, end)
    else:
        start_step, weights = 0, average_models([end["model_avg"]])
    model = TransducerModel(dims)
    model.load_state_dict(weights)
    save_checkpoint(target, model, averaged_steps=[start_step, last])
    write_provenance(experiment, "average", averaged_sha256=sha256(target))
    log.info("steps %d to %d -> %s", start_step, last, target)


def average_files(words: list[str]) -> None:
    """The standalone command: its key=value words as given.

    Raises:
        ValueError: a word that is missing or has no meaning, or files that cannot be averaged.
    """
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) < len(words) or not {"checkpoints", "out"} <= given.keys():
        raise ValueError(
            f"expected checkpoints=A.pt,B.pt out=F.pt, got {' '.join(words)}\nusage:\n"
            + "\n".join(line for line in (__doc__ or "").splitlines() if "checkpoints=" in line)
        )
    out, method = Path(given.pop("out")), given.pop("method", "models")
    paths = _named_files(given.pop("checkpoints"), given.pop("last", None))
    if method not in ("models", "range"):
        raise ValueError(f"method={method}: expected models or range")
    if method == "range" and len(paths) < 2:
        raise ValueError("method=range takes the first and the last checkpoint of the range")
    trusted = given.pop("trusted", "false") == "true"
    read = [read_checkpoint(path, trusted=trusted, **given) for path in paths]
    if method == "range":
        weights = average_range(read[0].extra, read[-1].extra)
    else:
        weights = average_models([checkpoint.state_dict for checkpoint in read])
    model = TransducerModel(read[-1].dims)
    load_weights(model, weights, paths[-1])
    save_checkpoint(out, model, averaged_files=[str(path) for path in paths], method=method)
    log.info("%s of %s -> %s", method, ", ".join(map(str, paths)), out)


def _named_files(text: str, last: str | None) -> list[Path]:
    """The files of a comma list, or the last ones of a folder by the numbers in their names."""
    if last is None:
        return [Path(name) for name in text.split(",")]
    if not last.isdigit() or last == "0":
        raise ValueError(f"last={last}: expected how many checkpoints to take, 1 or more")
    numbered = {
        int(match[2]): path
        for path in Path(text).glob("*.pt")
        if (match := re.fullmatch(r"(epoch|checkpoint)-(\d+)", path.stem))
    }
    if len(numbered) < int(last):
        raise ValueError(
            f"{text} has {len(numbered)} checkpoints (epoch-N.pt or checkpoint-N.pt), but "
            f"last={last}"
        )
    return [numbered[number] for number in sorted(numbered)[-int(last) :]]


if __name__ == "__main__":
    if any("=" in word for word in sys.argv[1:]) and "--exp" not in sys.argv:
        main(lambda: average_files(sys.argv[1:]))
    else:
        run_stage(__doc__, average_run)
