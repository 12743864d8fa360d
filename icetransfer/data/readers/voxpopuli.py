"""The ASR part of VoxPopuli: speeches in the European Parliament, cut into utterances.

Its own tools and its copy on Hugging Face have the same tables and lay the audio out otherwise:

    <language>/asr_{train,dev,test}.tsv     # id, raw_text, normalized_text, speaker_id, split, ...
    <language>/<year>/<id>.ogg                                         # voxpopuli.get_asr_data
    <language>/{train,dev,test}/{train,dev,test}_part_<n>/<id>.wav     # Hugging Face, unpacked
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from icetransfer.data.published import name_of
from icetransfer.data.readers.tables import read_table
from icetransfer.data.utterances import UNKNOWN_SPEAKER, Rejection, Utterance

_COLUMNS = ("id", "raw_text", "normalized_text", "speaker_id")
_SUFFIXES = (".ogg", ".wav", ".flac")


def read_voxpopuli(
    folder: Path, language: str, splits: Sequence[str]
) -> Iterator[Utterance | Rejection]:
    """Reads the utterances of some splits.

    The text is the normalised one, whose numbers were read out by the publisher; the raw one where
    that is empty.

    Args:
        folder: The language's folder, or the one that it lies in.
        language: Code of the language.
        splits: The splits to read, in the order train, dev, test.

    Raises:
        ValueError: A split's table is missing, or the corpus has not this language.
    """
    language = name_of("voxpopuli", language)
    root = folder / language if (folder / language).is_dir() else folder
    audio = _audio_files(root)
    for split in reversed(splits):
        for row in read_table(root / f"asr_{split}.tsv", _COLUMNS):
            if isinstance(row, Rejection):
                yield row
                continue
            speaker = row["speaker_id"]
            yield Utterance(
                id=row["id"],
                path=root / audio.get(row["id"], f"{row['id'][:4]}/{row['id']}.ogg"),
                text=row["normalized_text"] or row["raw_text"],
                speaker=UNKNOWN_SPEAKER if speaker in ("", "None") else speaker,
                split=split,
            )


def _audio_files(root: Path) -> dict[str, str]:
    """Path below the root of each audio file, by its name without suffix."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in files:
            name, suffix = os.path.splitext(file)  # noqa: PTH122 (half a million of them)
            if suffix in _SUFFIXES:
                found[name] = os.path.relpath(f"{folder}/{file}", root)
    return found
