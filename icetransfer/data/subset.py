"""Stage 3: the experiment's hours of training data, nested inside those of every larger one.

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
import itertools
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icetransfer.config import hours_label
from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.utterances import SPLITS, UNKNOWN_SPEAKER, speaker_of, text_of
from icetransfer.experiment import Experiment, log, run_stage
from icetransfer.stage import atomic
from icetransfer.stage.stamp import Stamp, digests

ORDER_SEED = "icetransfer subset 1"
_KEY_BYTES = 32
_BLOCK = 100  # cuts that are looked up together; more, and collecting garbage costs half of all

Name = tuple[str, str]  # corpus, cut id
Rows = NDArray[np.int64]  # numbers of some candidates


@dataclass
class HeldOut:
    """What may not be trained on, and what should not be repeated."""

    recordings: set[tuple[str, ...]] = field(default_factory=set)
    sentences: dict[str, set[str]] = field(default_factory=dict)  # of each test set
    speakers: set[tuple[str, str]] = field(default_factory=set)  # and their corpus
    dev_sentences: set[str] = field(default_factory=set)

    def apart(self, corpus: str, cut: Mapping[str, Any], kinds: Sequence[str]) -> bool:
        """Whether a cut has nothing in common with a dev or test split that it must not have."""
        if "speakers" in kinds and (corpus, speaker_of(cut)) in self.speakers:
            return False
        return "sentences" not in kinds or not any(
            text_of(cut) in sentences
            for sentences in (*self.sentences.values(), self.dev_sentences)
        )


def order_key(corpus: str, cut_id: str) -> bytes:
    """Where a cut comes in the fixed random order: 32 bytes."""
    return hashlib.sha256(f"{ORDER_SEED}/{corpus}/{cut_id}".encode()).digest()


class Candidates:
    """The cuts that may be taken, in columns: a hundred bytes each, where objects are a thousand.

    Attributes:
        corpora: names of the corpora.
        excluded: how many a dev or test split holds, and are not candidates.
        set_apart: how many have a speaker or a sentence of a dev or test split, and are none.
        shared_speakers: how many have such a speaker and are candidates.
        repeats: numbers of the candidates that have a sentence of a test set, by test set.
    """

    def __init__(self) -> None:
        self.corpora: list[str] = []
        self.excluded = 0
        self.set_apart = 0
        self.shared_speakers = 0
        self.repeats: dict[str, array[int]] = {}
        self._speaker_numbers: dict[tuple[str, str | None], int] = {}
        self._corpus, self._speaker = array("H"), array("I")
        self._seconds = array("d")
        self._keys = bytearray()
        self._ids, self._ends = (
            bytearray(),
            array("Q", [0]),
        )  # one after another, and where each ends

    def __len__(self) -> int:
        return len(self._seconds)

    def add(
        self, corpus: str, cut_id: str, seconds: float, key: bytes, speaker: str | None = None
    ) -> None:
        """Adds a cut.

        Args:
            corpus: its corpus.
            cut_id: its name in it.
            seconds: how long it is, before speed perturbation.
            key: its `order_key`.
            speaker: who speaks.
        """
        if corpus not in self.corpora[-1:]:
            self.corpora.append(corpus)
        self._corpus.append(len(self.corpora) - 1)
        self._speaker.append(
            self._speaker_numbers.setdefault((corpus, speaker), len(self._speaker_numbers))
        )
        self._seconds.append(seconds)
        self._keys += key
        self._ids += cut_id.encode()
        self._ends.append(len(self._ids))

    def name(self, row: int) -> Name:
        """Corpus and id of a cut."""
        cut_id = self._ids[self._ends[row] : self._ends[row + 1]].decode()
        return self.corpora[self._corpus[row]], cut_id

    @property
    def seconds(self) -> NDArray[np.float64]:
        """How long each is."""
        return np.frombuffer(self._seconds, np.float64)

    @property
    def corpus(self) -> NDArray[np.uint16]:
        """Which of the corpora each is of."""
        return np.frombuffer(self._corpus, np.uint16)

    @property
    def speaker(self) -> NDArray[np.uint32]:
        """A number for each one's speaker."""
        return np.frombuffer(self._speaker, np.uint32)

    def in_order(self) -> Rows:
        """All of them in the order in which they are taken.

        At any point of it, each corpus has given the same share of its seconds.
        """
        by_key = np.argsort(np.frombuffer(self._keys, f"S{_KEY_BYTES}"), kind="stable")
        share = np.empty(len(self))  # of its corpus, which comes before a cut
        for number in range(len(self.corpora)):
            rows = by_key[self.corpus[by_key] == number]
            seconds = self.seconds[rows]
            before = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
            share[rows] = before / math.fsum(seconds)
        return by_key[np.argsort(share[by_key], kind="stable")]


def select(candidates: Candidates, hours: float | None) -> Rows:
    """Takes cuts in the fixed order until their durations reach `hours`.

    Args:
        candidates: the cuts to take from.
        hours: how much to take; None for all.

    Returns:
        Numbers of the candidates taken, in the fixed order.

    Raises:
        ValueError: there is less than `hours`, or nothing.
    """
    seconds = candidates.seconds
    available = math.fsum(seconds) / 3600
    if not len(candidates) or (hours is not None and available < hours):
        of_each = {
            corpus: math.fsum(seconds[candidates.corpus == number]) / 3600
            for number, corpus in enumerate(candidates.corpora)
        }
        each = ", ".join(f"{corpus} {there:.4g} h" for corpus, there in sorted(of_each.items()))
        raise ValueError(
            f"hours={hours_label(hours)} of training data wanted, but the recipe has "
            f"{available:.4g} h ({available * 60:.4g} min) in {len(candidates)} usable recordings"
            f"{f' ({each})' if len(of_each) > 1 else ''}: "
            f"ask for less, or add data to data.corpora"
        )
    ordered = candidates.in_order()
    if hours is None:
        return ordered
    reached = np.cumsum(seconds[ordered])
    return ordered[: np.searchsorted(reached, hours * 3600) + 1]


def subset_path(experiment: Experiment) -> Path:
    """The list of the experiment's training cuts, shared by the experiments of the same hours."""
    return experiment.manifests_dir / f"subset-{hours_label(experiment.config.hours)}.txt"


def read_subset(path: Path) -> set[tuple[str, str]]:
    """(corpus, cut id) of each line of a subset's list.

    Raises:
        ValueError: the file does not exist.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run stage 3, which makes it")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {(corpus, cut_id) for corpus, _, cut_id in (line.partition(" ") for line in lines)}


def training_texts(experiment: Experiment) -> Iterator[str]:
    """The transcripts of the experiment's training cuts.

    Raises:
        ValueError: the subset or a manifest does not exist.
    """
    path = subset_path(experiment)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run stage 3, which makes it")
    keys = bytearray()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            corpus, _, cut_id = line.rstrip("\n").partition(" ")
            keys += order_key(corpus, cut_id)[:8]
    taken = np.unique(np.frombuffer(keys, np.uint64))
    for corpus in experiment.config.data.corpora:
        cuts = read_jsonl_gz(experiment.manifests_dir / f"{corpus}_train.jsonl.gz")
        for cut, _ in _those_among(cuts, corpus, taken):
            yield text_of(cut)


def _identities(cut: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What tells that two corpora hold the same recording: its place, or its name and text."""
    source = cut["recording"]["sources"][0]["source"]
    return (source, f"{cut['start']:.3f}"), (cut["id"], text_of(cut))


def _held_out(experiment: Experiment) -> HeldOut:
    """The recordings of every dev and test split, and the sentences of every test split."""
    held_out = HeldOut()
    for corpus in experiment.config.data.corpora:
        sentences = held_out.sentences.setdefault(corpus, set())
        for split in ("dev", "test"):
            for cut in read_jsonl_gz(experiment.manifests_dir / f"{corpus}_{split}.jsonl.gz"):
                held_out.recordings.update(_identities(cut))
                (sentences if split == "test" else held_out.dev_sentences).add(text_of(cut))
                if (speaker := speaker_of(cut)) != UNKNOWN_SPEAKER:
                    held_out.speakers.add((corpus, speaker))
    return held_out


def _candidates(experiment: Experiment, held_out: HeldOut) -> Candidates:
    """Every training cut of usable length that has features and that no dev or test split holds."""
    data = experiment.config.data
    found = Candidates()
    found.repeats = {test_set: array("Q") for test_set in held_out.sentences}
    for corpus in data.corpora:
        computed = _computed(experiment.manifests_dir / f"{corpus}_train_fbank.jsonl.gz", corpus)
        cuts = read_jsonl_gz(experiment.manifests_dir / f"{corpus}_train.jsonl.gz")
        for cut, key in _those_among(cuts, corpus, computed):
            if not data.min_seconds <= cut["duration"] <= data.max_seconds:
                continue
            if not held_out.recordings.isdisjoint(_identities(cut)):
                found.excluded += 1
                continue
            if not held_out.apart(corpus, cut, data.keep_apart):
                found.set_apart += 1
                continue
            text, speaker = text_of(cut), speaker_of(cut)
            found.shared_speakers += (corpus, speaker) in held_out.speakers
            for test_set, sentences in held_out.sentences.items():
                if text in sentences:
                    found.repeats[test_set].append(len(found))
            found.add(corpus, cut["id"], cut["duration"], key, speaker)
    return found


def _computed(manifest: Path, corpus: str) -> NDArray[np.uint64]:
    """What identifies the cuts that have features, sorted: the first bytes of their keys."""
    found = bytearray()
    for cut in read_jsonl_gz(manifest):
        found += order_key(corpus, cut["custom"]["source_id"])[:8]
    return np.unique(np.frombuffer(found, np.uint64))


def _those_among(
    cuts: Iterator[dict[str, Any]], corpus: str, known: NDArray[np.uint64]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields each cut whose key begins with one of `known`, which are sorted, and its key."""
    while len(known) and (block := list(itertools.islice(cuts, _BLOCK))):
        keys = [order_key(corpus, cut["id"]) for cut in block]
        wanted = np.frombuffer(b"".join(key[:8] for key in keys), np.uint64)
        places = np.searchsorted(known, wanted)
        there = known[np.minimum(places, len(known) - 1)] == wanted
        yield from itertools.compress(zip(block, keys, strict=True), there)


def _summary(candidates: Candidates, taken: Rows, corpora: Iterable[str]) -> dict[str, Any]:
    """Recordings, hours and speakers by corpus, and sentences that a test set has too."""
    chosen = np.zeros(len(candidates), bool)
    chosen[taken] = True
    given = {}
    for corpus in corpora:
        rows: Rows = np.zeros(0, np.int64)
        if corpus in candidates.corpora:
            number = candidates.corpora.index(corpus)
            rows = np.flatnonzero(chosen & (candidates.corpus == number))
        given[corpus] = {
            "recordings": len(rows),
            "hours": round(math.fsum(candidates.seconds[rows]) / 3600, 4),
            "speakers": len(np.unique(candidates.speaker[rows])),
        }
    repeated = {
        test_set: int(np.count_nonzero(chosen[np.asarray(rows)]))
        for test_set, rows in candidates.repeats.items()
    }
    return {
        "corpora": given,
        "sentences_in_test_sets": repeated,
        "in_dev_or_test": candidates.excluded,
        "speakers_in_dev_or_test": candidates.shared_speakers,
        "kept_apart": candidates.set_apart,
    }


def _stamp(experiment: Experiment, path: Path) -> Stamp:
    """What a subset is made from: all manifests, and the rule that chooses."""
    data, folder = experiment.config.data, experiment.manifests_dir
    manifests = [folder / f"{c}_{split}.jsonl.gz" for c in data.corpora for split in SPLITS]
    manifests += [folder / f"{corpus}_train_fbank.jsonl.gz" for corpus in data.corpora]
    inputs = digests(manifests) | {
        "rule": ORDER_SEED,
        "seconds": f"{data.min_seconds:g} to {data.max_seconds:g}",
        "keep_apart": " ".join(data.keep_apart),
    }
    return Stamp(path.with_suffix(".stamp.json"), inputs)


def make_subset(experiment: Experiment) -> None:
    """Writes the list of the experiment's training cuts, unless it is there and still right."""
    path = subset_path(experiment)
    stamp = _stamp(experiment, path)
    if stamp.is_current(path, path.with_suffix(".json")):
        log.info("skip: %s is complete", path)
        return
    stamp.renew(path, path.with_suffix(".json"))
    candidates = _candidates(experiment, _held_out(experiment))
    if candidates.excluded:
        log.warning(
            "%d training recordings are in a dev or test split too: left out", candidates.excluded
        )
    if candidates.shared_speakers:
        log.warning(
            "%d training recordings are of speakers of a dev or test split: WER there is not that "
            "of new voices; data.keep_apart=[speakers] leaves them out", candidates.shared_speakers,
        )  # fmt: skip
    if candidates.set_apart:
        kinds = " and ".join(experiment.config.data.keep_apart)
        log.info("%d left out to keep %s apart", candidates.set_apart, kinds)
    taken = select(candidates, experiment.config.hours)
    summary = _summary(candidates, taken, experiment.config.data.corpora)
    for test_set, count in summary["sentences_in_test_sets"].items():
        if count:
            log.warning(
                "%d training recordings have a sentence of the test set %s; "
                "data.keep_apart=[sentences] leaves them out", count, test_set,
            )  # fmt: skip
    for corpus, given in summary["corpora"].items():
        log.info("%s: %d recordings, %.4g h, %d speakers", corpus, *given.values())
    atomic.write_text(path.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")
    with atomic.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for row in taken:
            corpus, cut_id = candidates.name(row)
            lines.write(f"{corpus} {cut_id}\n")
    minutes = math.fsum(candidates.seconds[taken]) / 60
    log.info("%d recordings, %.2f minutes -> %s", len(taken), minutes, path)


if __name__ == "__main__":
    run_stage(__doc__, make_subset)
