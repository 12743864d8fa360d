"""Anyone's folder of audio with a transcripts.tsv: path, text, speaker, separated by tabs.

The path is relative to the folder. A first line that names the columns is a header: the columns
may then stand in any order, under the names in `_NAMES`, and others are not read. A fourth column
may name the split; otherwise one recording in N is test and another dev, chosen by a hash of its
id, or of its speaker's name: whatever is added or removed, the others stay where they are.

With a column named offset, a line is about a part of the file: it begins there and is as long as
the column duration says, both in seconds, or goes on to the end. Without one, a column of
durations is not read.

A line whose cells are quoted as spreadsheets do it is read so; in any other line a quotation mark
is a character like any other.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from icetransfer.data.readers.tables import bad_line, is_utf8, read_lines
from icetransfer.data.utterances import (
    SPLITS,
    UNKNOWN_SPEAKER,
    Rejection,
    UnusableError,
    Utterance,
    id_of_part,
    id_of_path,
)

TRANSCRIPTS = "transcripts.tsv"
_HOLDOUT_SEED = "icetransfer holdout 1"
_COLUMNS = ("path", "text", "speaker", "split")  # their order when there is no header
#: What people call the columns, in small letters, with _ for a space or a hyphen.
_NAMES: Mapping[str, Sequence[str]] = {
    "path": (
        "path", "file", "file_name", "filename", "file_path", "filepath", "audio", "audio_file",
        "audio_path", "audio_filename", "audio_filepath", "wav", "wav_path", "wav_filename",
        "clip",
    ),
    "text": (
        "text", "sentence", "transcript", "transcripts", "transcription", "raw_transcription",
    ),
    "speaker": ("speaker", "speaker_id", "speaker_name", "spk", "spk_id", "client_id"),
    "split": ("split", "subset"),
    "offset": ("offset",),
    "duration": ("duration",),
}  # fmt: skip


def read_folder(
    folder: Path, holdout_every: int, by_speaker: bool = False
) -> Iterator[Utterance | Rejection]:
    """Reads a folder's transcripts.

    Args:
        folder: Where transcripts.tsv and the audio lie.
        holdout_every: N as above; 0 holds out nothing, 1 everything.
        by_speaker: Hold out all of a speaker's recordings together, where speakers are named.

    Raises:
        ValueError: There is no transcripts.tsv, or its header lacks the path or the text.
    """
    path = folder / TRANSCRIPTS
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: expected path, text, speaker, tab-separated, "
            "a line for each recording"
        )
    columns: Sequence[str] = ()
    for number, line in read_lines(path):
        if not columns:
            header = _header(path, number, line)
            columns = header or _COLUMNS
            if header:
                continue
        try:
            yield _parse_line(line, columns, folder, holdout_every, by_speaker)
        except UnusableError as error:
            yield bad_line(path, number, line, error.reason, error.advice)


def _header(path: Path, number: int, line: str) -> Sequence[str]:
    """The columns that a line names; "" for one that is not read; none if it is no header."""
    known = {name: column for column, names in _NAMES.items() for name in names}
    cells = _cells(line)
    written = [cell.casefold().replace(" ", "_").replace("-", "_") for cell in cells]
    columns = [known.get(name, "") for name in written]
    if not {"path", "text"} & set(columns) or (path.parent / cells[0]).is_file():
        return ()
    for column in _NAMES:
        found = columns.count(column)
        if found > 1 or (found == 0 and column in ("path", "text")):
            raise ValueError(
                f"{path}:{number}: {found or 'no'} columns of the {column} in the header "
                f"{', '.join(cells)}: name one of them {column}, and no other "
                f"{', '.join(_NAMES[column][1:])}"
            )
    in_order = tuple(columns) == _COLUMNS[: len(columns)]
    return _COLUMNS if in_order else columns  # further columns may have no name


def _cells(line: str) -> list[str]:
    """A line's cells: unquoted where its quoting is valid, as they stand where it is not."""
    try:
        (cells,) = csv.reader([line], delimiter="\t", strict=True)
    except csv.Error:  # a quotation mark of the text, or a carriage return
        cells = line.split("\t")
    return [cell.strip() for cell in cells]


def _parse_line(
    line: str, columns: Sequence[str], folder: Path, holdout_every: int, by_speaker: bool
) -> Utterance:
    if not is_utf8(line):
        raise UnusableError("not UTF-8", "save the file as UTF-8")
    cells = _cells(line)
    if cells[-1].startswith('"') and cells[-1].count('"') % 2:
        raise UnusableError(
            "a quotation mark in the last column that is not closed on the line",
            "write the text on one line, or leave the quotation mark out",
        )
    row = dict(zip(columns, cells, strict=False))
    if len(cells) > len(columns) or not {"path", "text"} <= set(row):
        wanted = f"{len(columns)}, as the header has"
        if columns == _COLUMNS:
            wanted = "path, text, speaker and perhaps split"
        raise UnusableError(
            f"{len(cells)} tab-separated columns",
            f"write {wanted}; put a text that has a tab between quotation marks",
        )
    if not row["path"]:
        raise UnusableError("no path", "write the audio file's path, relative to the folder")
    identity, speaker = id_of_path(row["path"]), row.get("speaker") or UNKNOWN_SPEAKER
    start, seconds = _place(row)
    if start is not None:
        identity = id_of_part(identity, start)
    unit = speaker if by_speaker and speaker != UNKNOWN_SPEAKER else identity
    split = row.get("split") or _split(unit, holdout_every)
    if split not in SPLITS:
        raise UnusableError(f"split {split!r}", f"write one of {', '.join(SPLITS)}, or nothing")
    return Utterance(
        identity, folder / row["path"], row["text"], speaker, split, start or 0.0, seconds
    )


def _place(row: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Where a part of a file begins, and how long it is; None, None for the whole file."""
    if "offset" not in row:
        return None, None
    start = _number(row["offset"] or "0", "offset", 0)
    return start, _number(row["duration"], "duration", 0.001) if row.get("duration") else None


def _number(cell: str, column: str, least: float) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise UnusableError(f"{column} {cell!r}", "write seconds from the file's beginning, as 3.2")
    return number


def _split(unit: str, holdout_every: int) -> str:
    """The split of a recording or a speaker: a function of its name alone."""
    if holdout_every == 0:
        return "train"
    digest = hashlib.blake2b(f"{_HOLDOUT_SEED} {unit}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") % holdout_every
    return {0: "test", 1: "dev"}.get(place, "train")
