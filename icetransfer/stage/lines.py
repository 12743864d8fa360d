"""Files of a JSON object a line that grow while a stage runs: metrics.jsonl and log/cost.jsonl.

What they hold is for people to look at, so a line that cannot be written ends nothing.  A disk that
was full, or a process that was killed, may leave a torn line: the next one begins on a line of its
own, and readers go around it.
"""

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("icetransfer")


def append_line(path: Path, item: Mapping[str, Any]) -> None:
    """Adds an object to a file, which is made if it is not there; warns if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            is_torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_torn + json.dumps(item).encode() + b"\n")
    except OSError as error:
        log.warning("%s: a line could not be added (%s)", path, error.strerror)


def read_lines(path: Path, keys: Collection[str]) -> list[dict[str, Any]]:
    """The objects of a file, none if it is not there; warns of lines that are torn.

    Args:
        path: of the file.
        keys: that every object has.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    items = [_parsed(line, keys) for line in lines]
    for number, item in enumerate(items, start=1):
        if item is None:
            log.warning("%s, line %d: left out: it is torn, by a full disk or a kill", path, number)
    return [item for item in items if item is not None]


def last_lines(path: Path, size: int, keys: Collection[str]) -> list[dict[str, Any]]:
    """The whole ones among the last lines of a file, of which it reads so many bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [item for line in lines if (item := _parsed(line, keys)) is not None]


def _parsed(line: bytes, keys: Collection[str]) -> dict[str, Any] | None:
    try:
        item = json.loads(line)
    except ValueError:
        return None
    return item if isinstance(item, dict) and item.keys() >= set(keys) else None
