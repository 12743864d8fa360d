"""Anyone's folder of audio with a transcripts.tsv: path, text, speaker, separated by tabs.

The path is relative to the folder. A first line "path text speaker" is a header. A fourth column
may name the split; otherwise every Nth line is test and the one before it dev.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from icetransfer.data.utterances import SPLITS, UNKNOWN_SPEAKER, Rejection, UnusableError, Utterance

TRANSCRIPTS = "transcripts.tsv"


def read_folder(folder: Path, holdout_every: int) -> Iterator[Utterance | Rejection]:
    """Reads a folder's transcripts.

    Lines that are wrong count too, so that mending one moves no other to another split.

    Args:
        folder: Where transcripts.tsv and the audio lie.
        holdout_every: N as above; 0 holds out nothing, 1 everything.

    Raises:
        ValueError: There is no transcripts.tsv.
    """
    path = folder / TRANSCRIPTS
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: expected path, text, speaker, tab-separated, "
            "a line for each recording"
        )
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    offset = 1 if lines and lines[0].split(b"\t")[:2] == [b"path", b"text"] else 0
    for number, line in enumerate(lines[offset:]):
        if not line.strip():
            continue
        try:
            yield _parse_line(line, folder, _split(number, holdout_every))
        except UnusableError as error:
            name = line.split(b"\t")[0].decode(errors="replace")
            where = f"{TRANSCRIPTS}:{number + offset + 1}"
            yield Rejection(where, name, error.reason, error.advice)


def _parse_line(line: bytes, folder: Path, split: str) -> Utterance:
    try:
        cells = [cell.strip() for cell in line.decode("utf-8").split("\t")]
    except UnicodeDecodeError:
        raise UnusableError("not UTF-8", "save the file as UTF-8") from None
    if not 2 <= len(cells) <= 4 or not cells[0]:
        raise UnusableError(
            f"{len(cells)} tab-separated columns", "write path, text, speaker and perhaps split"
        )
    name, text, speaker, own_split = (*cells, *[""] * (4 - len(cells)))
    if own_split and own_split not in SPLITS:
        raise UnusableError(f"split {own_split!r}", f"write one of {', '.join(SPLITS)}, or nothing")
    identity = Path(name).with_suffix("").as_posix().replace("/", "-").lstrip("-.")
    return Utterance(identity, folder / name, text, speaker or UNKNOWN_SPEAKER, own_split or split)


def _split(number: int, holdout_every: int) -> str:
    if holdout_every == 0:
        return "train"
    place = number % holdout_every
    return {holdout_every - 1: "test", holdout_every - 2: "dev"}.get(place, "train")
