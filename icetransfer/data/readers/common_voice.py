"""Common Voice, any release, as Mozilla packs it.

    cv-corpus-23.0-2025-09-05/<language>/
        clips/common_voice_<language>_<number>.mp3
        train.tsv dev.tsv test.tsv validated.tsv other.tsv invalidated.tsv
        clip_durations.tsv                       # in milliseconds; not in old releases

The columns used are client_id, path and sentence; their order and the others differ by release.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from icetransfer.data.readers.tables import read_table
from icetransfer.data.utterances import SPLITS, UNKNOWN_SPEAKER, Rejection, Utterance
from icetransfer.experiment import log

_COLUMNS = ("client_id", "path", "sentence")


def read_common_voice(folder: Path, language: str, train: str) -> Iterator[Utterance | Rejection]:
    """Reads the test, the dev and then the training clips.

    Args:
        folder: The release's folder, or that of the language in it.
        language: Mozilla's code of the language.
        train: The table to train on: "train", or "validated" without the clips and the speakers of
            dev and test.

    Raises:
        ValueError: No such folder or table.
    """
    root = language_folder(folder, language)
    durations = _durations(root / "clip_durations.tsv")
    held_out: set[str] = set()  # clips and speakers of dev and test
    left = 0
    for split in reversed(SPLITS):
        table = root / f"{train if split == 'train' else split}.tsv"
        for row in read_table(table, _COLUMNS):
            if isinstance(row, Rejection):
                yield row
                continue
            if split != "train":
                held_out.update((row["path"], row["client_id"]))
            elif train == "validated" and {row["path"], row["client_id"]} & held_out:
                left += 1
                continue
            # Releases of before 2020 have names without a suffix.
            name = row["path"] if row["path"].endswith(".mp3") else row["path"] + ".mp3"
            yield Utterance(
                id=Path(name).stem,
                path=root / "clips" / name,
                text=row["sentence"],
                speaker=row["client_id"] or UNKNOWN_SPEAKER,
                split=split,
                promised_seconds=durations.get(name),
            )
    if left:
        log.info(
            "%s: %d validated clips are not for training: dev, test, their speakers", root, left
        )


def language_folder(folder: Path, language: str) -> Path:
    """The folder that holds a language's clips.

    Raises:
        ValueError: There is none.
    """
    for root in (folder, folder / language, *sorted(folder.glob(f"cv-corpus-*/{language}"))):
        if (root / "clips").is_dir():
            return root
    raise ValueError(
        f"{folder}: no Common Voice here; expected {language}/clips and {language}/*.tsv in it"
    )


def _durations(path: Path) -> dict[str, float]:
    """Seconds of each clip, where the release says them."""
    if not path.is_file():
        return {}
    rows = read_table(path, ("clip",))
    return {
        row["clip"]: int(value) / 1000
        for row in rows
        if isinstance(row, dict)
        for column, value in row.items()
        if column.startswith("duration") and value.isdigit()
    }
