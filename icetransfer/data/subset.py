"""Stage 4: the experiment's hours of training data, nested inside those of every larger one.

The cuts of a corpus are put in an order that depends on their names alone, and taken from its start
until the hours are reached: 2 minutes lie inside 8, and 8 inside 30.  Of several corpora each gives
the same share of its hours; within one the order is random, so that speakers give theirs, but for
chance.  Neither the experiment's seed nor its init moves a cut in or out, so runs that differ in
these learn from the same recordings.

Beside the list stands `subset-<hours>.json`: hours and speakers by corpus, and how many of the
recordings repeat a sentence of a test set.  A recording that is in any corpus's dev or test split
is never taken.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icetransfer import atomic
from icetransfer.config import hours_label
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.experiment import Experiment, log, run_stage

ORDER_SEED = "icetransfer subset 1"

Name = tuple[str, str]  # corpus, cut id


@dataclass
class HeldOut:
    """What may not be trained on, and what should not be repeated."""

    recordings: set[tuple[str, ...]] = field(default_factory=set)
    sentences: dict[str, set[str]] = field(default_factory=dict)  # of each test set


def order_key(corpus: str, cut_id: str) -> bytes:
    """Where a cut comes in the fixed random order."""
    return hashlib.sha256(f"{ORDER_SEED}/{corpus}/{cut_id}".encode()).digest()


def proportional_order(durations: Mapping[Name, float]) -> list[Name]:
    """The order in which cuts are taken: at any point of it, each corpus has given the same share.

    Args:
        durations: seconds of each cut, by (corpus, cut id).
    """
    by_corpus: dict[str, list[Name]] = defaultdict(list)
    for name in durations:
        by_corpus[name[0]].append(name)
    placed = []
    for names in by_corpus.values():
        total = sum(durations[name] for name in sorted(names))
        before = 0.0
        for name in sorted(names, key=lambda name: order_key(*name)):
            placed.append((before / total, order_key(*name), name))
            before += durations[name]
    return [name for _, _, name in sorted(placed)]


def select(durations: Mapping[Name, float], hours: float | None) -> list[Name]:
    """Takes cuts in the fixed order until their durations reach `hours`.

    Args:
        durations: seconds of each cut, by (corpus, cut id), before speed perturbation.
        hours: how much to take; None for all.

    Returns:
        (corpus, cut id) of the cuts taken, in the fixed order.

    Raises:
        ValueError: there is less than `hours`, or nothing.
    """
    available = sum(durations.values()) / 3600
    if not durations or (hours is not None and available < hours):
        seconds = Counter[str]()
        for (corpus, _), duration in durations.items():
            seconds[corpus] += duration  # type: ignore[assignment]  # a Counter of floats
        each = ", ".join(f"{corpus} {s / 3600:.4g} h" for corpus, s in sorted(seconds.items()))
        raise ValueError(
            f"hours={hours_label(hours)} of training data wanted, but the recipe has "
            f"{available:.4g} h ({available * 60:.4g} min) in {len(durations)} usable recordings"
            f"{f' ({each})' if len(seconds) > 1 else ''}: "
            f"ask for less, or add data to data.corpora"
        )
    ordered = proportional_order(durations)
    if hours is None:
        return ordered
    taken_seconds, taken = 0.0, []
    for name in ordered:
        if taken_seconds >= hours * 3600:
            break
        taken.append(name)
        taken_seconds += durations[name]
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


def _identities(cut: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What tells that two corpora hold the same recording: its place, or its name and text."""
    source = cut["recording"]["sources"][0]["source"]
    return (source, f"{cut['start']:.3f}"), (cut["id"], _text(cut))


def _text(cut: Mapping[str, Any]) -> str:
    return " ".join(supervision.get("text") or "" for supervision in cut["supervisions"])


def _held_out(experiment: Experiment) -> HeldOut:
    """The recordings of every dev and test split, and the sentences of every test split."""
    held_out = HeldOut()
    for corpus in experiment.config.data.corpora:
        sentences = held_out.sentences.setdefault(corpus, set())
        for split in ("dev", "test"):
            for cut in read_jsonl_gz(experiment.manifests_dir / f"{corpus}_{split}.jsonl.gz"):
                held_out.recordings.update(_identities(cut))
                if split == "test":
                    sentences.add(_text(cut))
    return held_out


def _usable(experiment: Experiment, held_out: HeldOut) -> tuple[dict[Name, float], int]:
    """Seconds of every training cut of usable length whose features exist.

    Also returns how many were left out because a dev or test split holds them.
    """
    data = experiment.config.data
    durations = {}
    excluded = 0
    for corpus in data.corpora:
        computed = experiment.manifests_dir / f"{corpus}_train_fbank.jsonl.gz"
        usable = {cut["custom"]["source_id"] for cut in read_jsonl_gz(computed)}
        for cut in read_jsonl_gz(experiment.manifests_dir / f"{corpus}_train.jsonl.gz"):
            if cut["id"] not in usable:
                continue
            if not data.min_seconds <= cut["duration"] <= data.max_seconds:
                continue
            if held_out.recordings.intersection(_identities(cut)):
                excluded += 1
            else:
                durations[corpus, cut["id"]] = cut["duration"]
    return durations, excluded


def _summary(experiment: Experiment, taken: set[Name], held_out: HeldOut) -> dict[str, Any]:
    """Recordings, hours and speakers by corpus, and sentences that a test set has too."""
    corpora = {}
    repeated = dict.fromkeys(held_out.sentences, 0)
    for corpus in experiment.config.data.corpora:
        recordings, seconds, speakers = 0, 0.0, set[str | None]()
        for cut in read_jsonl_gz(experiment.manifests_dir / f"{corpus}_train.jsonl.gz"):
            if (corpus, cut["id"]) not in taken:
                continue
            recordings += 1
            seconds += cut["duration"]
            speakers.update(s.get("speaker") for s in cut["supervisions"])
            for test_set, sentences in held_out.sentences.items():
                repeated[test_set] += _text(cut) in sentences
        corpora[corpus] = {
            "recordings": recordings,
            "hours": round(seconds / 3600, 4),
            "speakers": len(speakers),
        }
    return {"corpora": corpora, "sentences_in_test_sets": repeated}


def make_subset(experiment: Experiment) -> None:
    """Writes the list of the experiment's training cuts, unless it is there."""
    path = subset_path(experiment)
    if path.is_file():
        log.info("skip: %s is complete", path)
        return
    held_out = _held_out(experiment)
    durations, excluded = _usable(experiment, held_out)
    if excluded:
        log.warning("%d training recordings are in a dev or test split too: left out", excluded)
    taken = select(durations, experiment.config.hours)
    summary = _summary(experiment, set(taken), held_out)
    for test_set, count in summary["sentences_in_test_sets"].items():
        if count:
            log.warning(
                "%d training recordings have a sentence of the test set %s", count, test_set
            )
    for corpus, given in summary["corpora"].items():
        log.info("%s: %d recordings, %.4g h, %d speakers", corpus, *given.values())
    summary["in_dev_or_test"] = excluded
    atomic.write_text(path.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")
    atomic.write_text(path, "".join(f"{corpus} {cut_id}\n" for corpus, cut_id in taken))
    minutes = sum(durations[name] for name in taken) / 60
    log.info("%d recordings, %.2f minutes -> %s", len(taken), minutes, path)


if __name__ == "__main__":
    run_stage(__doc__, make_subset)
