"""Tables and lists of lines as people write them, of which one bad line costs no other."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from icetransfer.data.utterances import Rejection

_HEAD = 1 << 12  # bytes that tell how a file is written


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Reads the lines that are not blank, and the number of each.

    The text is UTF-8, or UTF-16 as spreadsheets save it, with or without a byte order mark; a file
    whose name ends in .gz is unpacked. Bytes that are not UTF-8 come as lone surrogates: see
    `is_utf8`.

    Raises:
        ValueError: A packed file is broken.
    """
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            head = file.read(_HEAD)
            file.seek(0)
            encoding, errors = _encoding(head)
            text = head.decode(encoding, errors="ignore")
            newline = "\r" if "\r" in text and "\n" not in text else "\n"
            for line in io.TextIOWrapper(file, encoding, errors, newline):
                number += 1
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: cannot be unpacked after line {number} ({error}): copy it again"
            ) from None


def _encoding(head: bytes) -> tuple[str, str]:
    """How a file that begins like this is decoded, and what is done with bytes that cannot be."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16", "replace"
    if b"\0" in head[:2]:
        return ("utf-16-be" if head[0] == 0 else "utf-16-le"), "replace"
    return "utf-8-sig", "surrogateescape"


def folder_of(manifest: Path) -> Path:
    """The folder of a corpus's manifest; a Shar is one itself."""
    return manifest.absolute() if manifest.is_dir() else manifest.absolute().parent


def common_folder(manifests: Sequence[Path]) -> Path:
    """The folder that holds all of a corpus's manifests, from which its ids count."""
    return Path(os.path.commonpath(list(map(folder_of, manifests))))


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone half of a character cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_table(
    path: Path, required: Sequence[str], header: Sequence[str] | None = None
) -> Iterator[dict[str, str] | Rejection]:
    """Reads a publisher's table without quoting: a quotation mark is a character like any other.

    Args:
        path: The table.
        required: Columns that must be there; others are read too.
        header: The columns' names when the file has no line of them.

    Yields:
        Each line's cells by column, or why it cannot be read.

    Raises:
        ValueError: The file is missing, or a required column.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: is the corpus unpacked as its publisher packed it?"
        )
    columns = list(header or [])
    for number, line in read_lines(path):
        values = [cell.strip() for cell in line.split("\t")]
        if not is_utf8(line):
            yield bad_line(path, number, line, "not UTF-8", "save the file as UTF-8")
        elif not columns:
            columns = values
            if missing := [name for name in required if name not in columns]:
                raise ValueError(
                    f"{path}: no column {', '.join(missing)}; it has {', '.join(columns)}"
                )
        elif len(values) != len(columns):
            reason = f"{len(values)} tab-separated columns"
            yield bad_line(
                path, number, line, reason, f"write {len(columns)}: {', '.join(columns)}"
            )
        else:
            yield dict(zip(columns, values, strict=True))


def bad_line(path: Path, number: int, line: str, reason: str, advice: str) -> Rejection:
    """A line of a table that cannot be read; its first cell stands for the recording."""
    first = line.split("\t")[0].strip().encode(errors="surrogateescape").decode(errors="replace")
    return Rejection(f"{path.name}:{number}", first, reason, advice)
