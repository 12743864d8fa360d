"""Recordings of a dev or test split that are in training too, of every corpus of a recipe.

They are told by where their audio lies, and by its samples: a copy under another name, or in
another lossless format, is the same recording.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.recordings import AUDIO_DIGEST
from icetransfer.data.utterances import SPLITS
from icetransfer.stage import atomic
from icetransfer.stage.stamp import Stamp, digests

_SHOWN = 5


def refuse_leaks(manifests_dir: Path, corpora: Sequence[str]) -> None:
    """Looks for recordings that are both learned from and held out, unless that was done.

    Raises:
        ValueError: there are some; all are listed in `leaks.tsv`.
    """
    paths = [manifests_dir / f"{name}_{split}.jsonl.gz" for name in corpora for split in SPLITS]
    apart = manifests_dir / "apart.json"
    stamp = Stamp(manifests_dir / "apart.stamp.json", digests(paths))
    if stamp.is_current(apart):
        return
    apart.unlink(missing_ok=True)
    held_out = _held_out(manifests_dir, corpora)
    found = [
        (f"{corpus}_train", cut["id"], *place)
        for corpus in corpora
        for cut in read_jsonl_gz(manifests_dir / f"{corpus}_train.jsonl.gz")
        if (place := next((held_out[key] for key in identities(cut) if key in held_out), None))
    ]
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
    atomic.write_text(apart, json.dumps({"held_out": len(set(held_out.values()))}) + "\n")


def _held_out(
    manifests_dir: Path, corpora: Sequence[str]
) -> dict[tuple[str, ...], tuple[str, str]]:
    """What tells each recording of a dev or test split, with the split and its id there."""
    return {
        key: (f"{corpus}_{split}", cut["id"])
        for corpus in corpora
        for split in ("dev", "test")
        for cut in read_jsonl_gz(manifests_dir / f"{corpus}_{split}.jsonl.gz")
        for key in identities(cut)
    }


def identities(cut: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What tells that two cuts are the same recording: its place, then its samples if known."""
    source = cut["recording"]["sources"][0]["source"]
    yield str(source), f"{cut['start']:.3f}"
    if digest := (cut.get("custom") or {}).get(AUDIO_DIGEST):  # synthetic speech has none
        yield (str(digest),)
