"""Files of a JSON object a line, packed: what manifests are.

They are written with the same bytes each time, and read line by line, whatever their length.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icetransfer.stage.atomic import atomic_path


def write_jsonl_gz(path: Path, items: Iterable[Mapping[str, Any]]) -> int:
    """Writes objects to a file, whole or not at all; no time stamp and no name go into it.

    Returns:
        How many there were.
    """
    count = 0
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
    ):
        for item in items:
            packed.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def read_jsonl_gz(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file.

    Raises:
        ValueError: The file does not exist, or is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the recipe's earlier stages, which make it")
    number = 0
    try:
        if not path.stat().st_size:  # a packed file of nothing has some bytes
            raise EOFError("it has no bytes")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                yield json.loads(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or cut short at line {number} ({error}): remove it, and run the "
            f"stage again that makes it"
        ) from None
