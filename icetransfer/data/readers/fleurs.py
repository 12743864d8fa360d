"""FLEURS, as its publisher has it on Hugging Face.

    <locale>/{train,dev,test}.tsv      # no header; see COLUMNS
    <locale>/audio/{train,dev,test}.tar.gz, unpacked beside it: <locale>/audio/<split>/<number>.wav

It does not tell speakers apart, so each recording counts as a speaker of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from icetransfer.data.published import name_of
from icetransfer.data.readers.tables import read_table
from icetransfer.data.utterances import SAMPLING_RATE, Rejection, Utterance

COLUMNS = ("id", "file", "raw_transcription", "transcription", "letters", "samples", "gender")


def read_fleurs(
    folder: Path, language: str, splits: Sequence[str]
) -> Iterator[Utterance | Rejection]:
    """Reads the recordings of some splits.

    The text is the raw transcription, because capitals and punctuation tell how its numbers and
    units are read.

    Args:
        folder: The locale's folder, or the one that it lies in.
        language: Code of the language.
        splits: The splits to read, in the order train, dev, test.

    Raises:
        ValueError: A split's table is missing, or FLEURS has not this language.
    """
    locale = name_of("fleurs", language)
    root = folder / locale if (folder / locale).is_dir() else folder
    for split in reversed(splits):
        audio = root / "audio" / split if (root / "audio" / split).is_dir() else root / split
        for row in read_table(root / f"{split}.tsv", (), header=COLUMNS):
            if isinstance(row, Rejection):
                yield row
                continue
            name = Path(row["file"]).stem
            samples = row["samples"]
            yield Utterance(
                id=name,
                path=audio / row["file"],
                text=row["raw_transcription"] or row["transcription"],
                speaker=name,
                split=split,
                promised_seconds=int(samples) / SAMPLING_RATE if samples.isdigit() else None,
            )
