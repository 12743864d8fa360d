"""Multilingual LibriSpeech, FLAC or Opus, as OpenSLR 94 packs it.

mls_<language>[_opus]/{train,dev,test}/
    transcripts.txt                                           # id, tab, text
    audio/<speaker>/<book>/<speaker>_<book>_<number>.{flac,opus}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from icetransfer.data.published import name_of
from icetransfer.data.readers.tables import read_table
from icetransfer.data.utterances import Rejection, Utterance


def archive_name(language: str, codec: str) -> str:
    """The name of the archive and of the folder in it.

    Raises:
        ValueError: The corpus has not this language.
    """
    return f"mls_{name_of('mls', language)}" + ("_opus" if codec == "opus" else "")


def read_mls(
    folder: Path, language: str, codec: str, splits: Sequence[str]
) -> Iterator[Utterance | Rejection]:
    """Reads the recordings of some splits.

    Args:
        folder: The unpacked archive, or the folder that it lies in.
        language: Code of the language.
        codec: "flac" or "opus".
        splits: The splits to read, in the order train, dev, test.

    Raises:
        ValueError: A split's transcripts are missing, or the corpus has not this language.
    """
    name = archive_name(language, codec)
    root = folder / name if (folder / name).is_dir() else folder
    for split in reversed(splits):
        table = root / split / "transcripts.txt"
        for row in read_table(table, (), header=("id", "text")):
            if isinstance(row, Rejection):
                yield row
                continue
            speaker, _, rest = row["id"].partition("_")
            book = rest.partition("_")[0]
            yield Utterance(
                id=row["id"],
                path=root / split / "audio" / speaker / book / f"{row['id']}.{codec}",
                text=row["text"],
                speaker=speaker,
                split=split,
            )
