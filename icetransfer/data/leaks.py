"""Recordings of a dev or test split that are in training too, of every corpus of a recipe.

They are told by where their audio lies, also where parts of one file overlap, and by its samples: a
copy under another name, or in another lossless format, is the same recording.
"""

import hashlib
import json
import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.recordings import AUDIO_DIGEST
from icetransfer.data.utterances import SPLITS, Rejection, Utterance
from icetransfer.stage import atomic
from icetransfer.stage.stamp import Stamp, digests

_DUPLICATE = "duplicate id"
_BOTH_SIDES = f"{_DUPLICATE}: in training and in dev or test"  # the reason of a rejection
_SHOWN = 5
_SHARED_SECONDS = 0.1  # of audio that two neighbours may share: their ends are rounded

Found = tuple[str, str]  # split, id


def without_duplicates(
    utterances: Iterable[Utterance | Rejection],
) -> Iterator[Utterance | Rejection]:
    """Yields each id once: the first utterance of a name, a rejection for the others.

    One that is both learned from and held out is an error later, in `refuse_leaks`.
    """
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}  # digests: a third of the memory
    for utterance in utterances:
        if isinstance(utterance, Utterance):
            digest = hashlib.blake2b(utterance.id.encode(), digest_size=8).digest()
            learned = utterance.split == "train"
            if digest in seen[not learned]:
                yield _duplicate(utterance, _BOTH_SIDES)
                continue
            if digest in seen[learned]:
                yield _duplicate(utterance, _DUPLICATE)
                continue
            seen[learned].add(digest)
        yield utterance


def _duplicate(utterance: Utterance, reason: str) -> Rejection:
    advice = f"keep one line of {utterance.id}, or give the other file another name"
    return Rejection(utterance.id, str(utterance.path), reason, advice)


def refuse_leaks(manifests_dir: Path, corpora: Sequence[str]) -> None:
    """Looks for recordings that are both learned from and held out, unless that was done.

    Raises:
        ValueError: there are some; all are listed in `leaks.tsv`.
    """
    kinds = (*(f"{split}.jsonl.gz" for split in SPLITS), "rejected.tsv")
    paths = [manifests_dir / f"{name}_{kind}" for name in corpora for kind in kinds]
    apart = manifests_dir / "apart.json"
    stamp = Stamp(manifests_dir / "apart.stamp.json", digests(paths))
    if stamp.is_current(apart):
        return
    apart.unlink(missing_ok=True)
    held_out = _read_held_out(manifests_dir, corpora)
    found = [leak for corpus in corpora for leak in _leaks(manifests_dir, corpus, held_out)]
    if found:
        rows = [("training split", "recording", "is in", "as"), *found]
        listed = manifests_dir / "leaks.tsv"
        atomic.write_text(listed, "".join("\t".join(row) + "\n" for row in rows))
        shown = "; ".join(
            f"{own} of {split} is {name} of {where}" for split, own, where, name in found[:_SHOWN]
        )
        raise ValueError(
            f"{len(found)} training recordings are in a dev or test split too ({shown}): a WER "
            f"there would say nothing. Take them out of one of the two; all are in {listed}"
        )
    stamp.renew()
    atomic.write_text(apart, json.dumps({"held_out": held_out.count}) + "\n")


def _leaks(manifests_dir: Path, corpus: str, held_out: "_HeldOut") -> Iterator[tuple[str, ...]]:
    """The lines of `leaks.tsv` of a corpus's training split."""
    split, twice = f"{corpus}_train", _twice(manifests_dir / f"{corpus}_rejected.tsv")
    for cut in read_jsonl_gz(manifests_dir / f"{split}.jsonl.gz"):
        if place := held_out.find(cut):
            yield split, cut["id"], *place
        elif cut["id"] in twice:
            yield split, cut["id"], "dev or test of the same corpus", cut["id"]
    for name in sorted(twice):
        if kept := held_out.split_of(corpus, name):
            yield split, name, kept, name


def _twice(rejected: Path) -> set[str]:
    """The ids that were rejected because they are in training and in dev or test."""
    if not rejected.is_file():
        return set()
    rows = (line.split("\t") for line in rejected.read_text(encoding="utf-8").splitlines())
    return {row[0] for row in rows if row[2] == _BOTH_SIDES}


class _HeldOut:
    """The recordings of the dev and test splits, as they can be told."""

    def __init__(self) -> None:
        self._splits: dict[tuple[str, str], str] = {}  # by corpus and id
        self._parts: dict[str, list[tuple[float, float, Found]]] = {}  # of each file, sorted
        self._longest = 0.0  # of them, in seconds
        self._contents: dict[str, Found] = {}  # by the digest of their samples

    def add(self, split: str, cut: Mapping[str, Any]) -> None:
        """Adds a cut of a dev or test split."""
        found = split, str(cut["id"])
        self._splits[split.rpartition("_")[0], found[1]] = split
        insort(self._parts.setdefault(_file(cut), []), (*_place(cut), found))
        self._longest = max(self._longest, cut["duration"])
        if digest := _digest(cut):
            self._contents[digest] = found

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._splits)

    def split_of(self, corpus: str, cut_id: str) -> str | None:
        """The split that has a cut of this id."""
        return self._splits.get((corpus, cut_id))

    def find(self, cut: Mapping[str, Any]) -> Found | None:
        """The split and the id there of what a training cut shares audio with; None for none."""
        start, end = _place(cut)
        parts = self._parts.get(_file(cut), [])
        near = bisect_left(parts, (start - self._longest,)), bisect_left(parts, (end,))
        for begin, stop, found in parts[slice(*near)]:
            if min(end, stop) - max(start, begin) > _SHARED_SECONDS:
                return found
        return self._contents.get(_digest(cut))


def _read_held_out(manifests_dir: Path, corpora: Sequence[str]) -> _HeldOut:
    held_out = _HeldOut()
    for corpus in corpora:
        for split in ("dev", "test"):
            for cut in read_jsonl_gz(manifests_dir / f"{corpus}_{split}.jsonl.gz"):
                held_out.add(f"{corpus}_{split}", cut)
    return held_out


def identities(cut: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What tells that two cuts are the same recording: its place, then its samples if known."""
    yield _file(cut), f"{cut['start']:.3f}"
    if digest := _digest(cut):
        yield (digest,)


def _file(cut: Mapping[str, Any]) -> str:
    source: str = cut["recording"]["sources"][0]["source"]
    return os.path.abspath(source)  # noqa: PTH100 (millions of them)


def _place(cut: Mapping[str, Any]) -> tuple[float, float]:
    return cut["start"], cut["start"] + cut["duration"]


def _digest(cut: Mapping[str, Any]) -> str:
    return str((cut.get("custom") or {}).get(AUDIO_DIGEST, ""))
