"""Stage 4: the experiment's hours of training data, nested inside those of every larger one.

Cuts are put in an order that depends on their names alone, and taken from its start until the
hours are reached: 2 minutes lie inside 8, and 8 inside 30.  Neither the experiment's seed nor its
init moves a cut in or out, so runs that differ in these learn from the same recordings.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from icetransfer import atomic
from icetransfer.config import hours_label
from icetransfer.data.features import read_manifest
from icetransfer.experiment import Experiment, log, run_stage

ORDER_SEED = "icetransfer subset 1"


def order_key(corpus: str, cut_id: str) -> bytes:
    """Where a cut comes in the fixed random order."""
    return hashlib.sha256(f"{ORDER_SEED}/{corpus}/{cut_id}".encode()).digest()


def select(durations: dict[tuple[str, str], float], hours: float | None) -> list[tuple[str, str]]:
    """Takes cuts in the fixed order until their durations reach `hours`.

    Args:
        durations: seconds of each cut, by (corpus, cut id), before speed perturbation.
        hours: how much to take; None for all.

    Returns:
        (corpus, cut id) of the cuts taken, in the fixed order.

    Raises:
        ValueError: there is less than `hours`, or nothing.
    """
    ordered = sorted(durations, key=lambda name: order_key(*name))
    available = sum(durations.values()) / 3600
    if not ordered or (hours is not None and available < hours):
        raise ValueError(
            f"hours={hours_label(hours)} of training data wanted, but the recipe has "
            f"{available:.4g} h ({available * 60:.4g} min) in {len(ordered)} usable recordings: "
            f"ask for less, or add data to data.corpora"
        )
    if hours is None:
        return ordered
    seconds, taken = 0.0, []
    for name in ordered:
        if seconds >= hours * 3600:
            break
        taken.append(name)
        seconds += durations[name]
    return taken


def subset_path(experiment: Experiment) -> Path:
    """The list of the experiment's training cuts, shared by the experiments of the same hours."""
    return experiment.manifests_dir / f"subset-{hours_label(experiment.config.hours)}.txt"


def read_subset(path: Path) -> set[tuple[str, str]]:
    """(corpus, cut id) of each line of a subset's list.

    Raises:
        ValueError: the file does not exist.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run stage 4, which makes it")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {(corpus, cut_id) for corpus, _, cut_id in (line.partition(" ") for line in lines)}


def _durations(experiment: Experiment, corpora: Iterable[str]) -> dict[tuple[str, str], float]:
    """Seconds of every training cut of usable length whose features exist."""
    data = experiment.config.data
    durations = {}
    for corpus in corpora:
        computed = experiment.manifests_dir / f"{corpus}_train_fbank.jsonl.gz"
        usable = {cut.source_id for cut in read_manifest(computed)}
        for cut in read_manifest(experiment.manifests_dir / f"{corpus}_train.jsonl.gz"):
            if cut.id in usable and data.min_seconds <= cut.duration <= data.max_seconds:
                durations[corpus, cut.id] = cut.duration
    return durations


def make_subset(experiment: Experiment) -> None:
    """Writes the list of the experiment's training cuts, unless it is there."""
    path = subset_path(experiment)
    if path.is_file():
        log.info("skip: %s is complete", path)
        return
    durations = _durations(experiment, experiment.config.data.corpora)
    taken = select(durations, experiment.config.hours)
    atomic.write_text(path, "".join(f"{corpus} {cut_id}\n" for corpus, cut_id in taken))
    minutes = sum(durations[name] for name in taken) / 60
    log.info("%d recordings, %.2f minutes -> %s", len(taken), minutes, path)


if __name__ == "__main__":
    run_stage(__doc__, make_subset)
