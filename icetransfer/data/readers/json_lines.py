"""NeMo's manifests: a JSON object a line, as Granary, YODAS and the like come.

    {"audio_filepath": "a.wav", "duration": 3.2, "text": "...", "offset": 0.0, "speaker": "x"}

duration, offset, speaker and further keys may be absent; without a duration the audio is read to
its end. A relative path is relative to the manifest. A JSON array of such objects is read too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icetransfer.data.readers.tables import is_utf8, read_lines
from icetransfer.data.utterances import (
    UNKNOWN_SPEAKER,
    Rejection,
    UnusableError,
    Utterance,
    id_of_part,
    id_of_path,
)

_ADVICE = "write a JSON object with audio_filepath, duration and text"


def read_json_lines(manifest: Path, split: str, root: Path) -> Iterator[Utterance | Rejection]:
    """Reads a manifest, packed with gzip when its name ends in .gz.

    Args:
        manifest: The file.
        split: What its recordings are for.
        root: The `common_folder`: files of the same name beside two manifests have two ids.

    Raises:
        ValueError: There is no such file, or it is an array that is not JSON.
    """
    if not manifest.is_file():
        raise ValueError(f"{manifest} does not exist: correct the paths in data.corpora")
    below_root = os.path.relpath(manifest.absolute().parent, root)
    for where, row in _rows(manifest):
        try:
            parsed = _parsed(row) if isinstance(row, str) else row
            yield _utterance(parsed, manifest.parent, below_root, split)
        except UnusableError as error:
            yield Rejection(where, str(manifest), error.reason, error.advice)


def _rows(manifest: Path) -> Iterator[tuple[str, Any]]:
    """The manifest's lines, or the items of its array, and where each stands."""
    lines = read_lines(manifest)
    first = next(lines, (0, ""))
    if not first[1].lstrip().startswith("["):
        for number, line in itertools.chain([first] if first[0] else [], lines):
            yield f"{manifest.name}:{number}", line
        return
    try:
        items = json.loads("\n".join([first[1], *(line for _, line in lines)]))
    except ValueError as error:
        raise ValueError(
            f"{manifest}: begins with [ and is not a JSON array ({error}): correct it, or write an "
            "object a line"
        ) from None
    for place, item in enumerate(items, 1):
        yield f"{manifest.name}:item {place}", item


def _parsed(line: str) -> Any:
    if not is_utf8(line):
        raise UnusableError("not UTF-8", "save the file as UTF-8")
    try:
        return json.loads(line)
    except ValueError as error:
        reason = f"not a line of a NeMo manifest ({type(error).__name__}: {error})"
        raise UnusableError(reason, _ADVICE) from None


def _utterance(row: Any, folder: Path, below_root: str, split: str) -> Utterance:
    if not isinstance(row, dict):
        raise UnusableError(f"a JSON {type(row).__name__}, not an object", _ADVICE)
    name, text = _string(row, "audio_filepath"), _string(row, "text")
    offset, duration = _seconds(row, "offset"), _seconds(row, "duration")
    if offset is not None and offset < 0:
        raise UnusableError(
            f"offset {offset:g} is negative", "write the seconds from the beginning of the file"
        )
    if duration is not None and duration <= 0:
        raise UnusableError(
            f"duration {duration:g} is not positive", "write the seconds, or leave the key out"
        )
    if row.get("channel") not in (None, 0):
        raise UnusableError(
            f"channel {row['channel']!r}: audio of one channel is read",
            "write that channel to a file of its own, and leave the key out",
        )
    speaker = str(row.get("speaker") or UNKNOWN_SPEAKER)
    if not is_utf8(speaker):
        raise UnusableError("speaker has half of a character (a lone surrogate)", _ADVICE)
    part = "offset" in row
    identity = id_of_path(os.path.join(below_root, name))  # noqa: PTH118 (millions of them)
    return Utterance(
        id=id_of_part(identity, offset or 0.0) if part else identity,
        path=folder / name,
        text=text,
        speaker=speaker,
        split=split,
        start=offset or 0.0,
        seconds=duration if part else None,
        promised_seconds=None if part else duration,
    )


def _string(row: dict[str, Any], field: str) -> str:
    advice = f'write "{field}": "..."'
    if field not in row:
        raise UnusableError(f"no {field}", advice)
    value = row[field]
    if not isinstance(value, str):
        raise UnusableError(f"{field} is {json.dumps(value)[:40]}, not a string", advice)
    if not is_utf8(value):
        raise UnusableError(f"{field} has half of a character (a lone surrogate)", advice)
    return value


def _seconds(row: dict[str, Any], field: str) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UnusableError(
            f"{field} is {json.dumps(value)[:40]}, not a number", "write seconds, as 3.2"
        )
    return seconds
