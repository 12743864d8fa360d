"""Tab-separated tables, of which one bad line costs no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from icetransfer.data.utterances import Rejection


def read_table(
    path: Path, required: Sequence[str], header: Sequence[str] | None = None
) -> Iterator[dict[str, str] | Rejection]:
    """Reads a table without quoting: a quotation mark is a character like any other.

    Args:
        path: The table, UTF-8.
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
    with path.open("rb") as lines:
        columns = list(header or [])
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                cells = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError:
                yield _bad(path, number, line, "not UTF-8", "save the file as UTF-8")
                continue
            values = [cell.strip() for cell in cells.rstrip("\r\n").split("\t")]
            if not columns:
                columns = values
                if missing := [name for name in required if name not in columns]:
                    raise ValueError(
                        f"{path}: no column {', '.join(missing)}; it has {', '.join(columns)}"
                    )
            elif len(values) != len(columns):
                reason = f"{len(values)} tab-separated columns"
                yield _bad(
                    path, number, line, reason, f"write {len(columns)}: {', '.join(columns)}"
                )
            else:
                yield dict(zip(columns, values, strict=True))


def _bad(path: Path, number: int, line: bytes, reason: str, advice: str) -> Rejection:
    first = line.split(b"\t")[0].decode(errors="replace").strip()
    return Rejection(f"{path.name}:{number}", first, reason, advice)
