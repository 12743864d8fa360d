"""Stage 7: the average of the weights over the end of a run -> exp/averaged.pt.

    python -m icetransfer.average --exp DIR
    python -m icetransfer.average checkpoints=epoch-28.pt,epoch-29.pt,epoch-30.pt out=averaged.pt
    python -m icetransfer.average checkpoints=DIR last=3 out=averaged.pt
    python -m icetransfer.average checkpoints=epoch-20.pt,epoch-30.pt method=range out=averaged.pt

A running average is kept while training; what is decoded is the average between two checkpoints.
The other forms average any icefall or icetransfer checkpoints: the plain mean of several, or with
`method=range` all steps from the first to the last, by their running averages (`model_avg`).  More
key=value words go to `load_transducer`, such as num_heads or trusted=true.
"""

import re
import sys
from pathlib import Path

from icetransfer.experiment import Experiment, log, main, run_stage, write_provenance
from icetransfer.model.averaging import average_models, average_range
from icetransfer.model.checkpoint import load_weights, read_checkpoint, save_checkpoint
from icetransfer.model.transducer import TransducerModel
from icetransfer.stage.stamp import Stamp, digests, sha256


def average_run(experiment: Experiment) -> None:
    """Averages the last `train.average_fraction` of a finished run.

    Raises:
        ValueError: training is not finished.
    """
    target = experiment.averaged_checkpoint
    last = experiment.final_step
    final = experiment.checkpoints_dir / f"checkpoint-{last}.pt"
    fraction = experiment.config.train.average_fraction
    stamp = Stamp(target.with_suffix(".stamp.json"), digests([final]) | {"last": f"{fraction:g}"})
    if stamp.is_current(target):
        log.info("skip: %s is complete", target)
        return
    paths = {
        int(path.stem.partition("-")[2]): path
        for path in experiment.checkpoints_dir.glob("checkpoint-*.pt")
    }
    if last not in paths:
        raise ValueError(
            f"{experiment.checkpoints_dir} has no checkpoint of step {last}: run stage 6 to its end"
        )
    stamp.renew(target)
    wanted = last * (1 - fraction)
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
