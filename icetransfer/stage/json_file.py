"""JSON files that one stage writes and another reads."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def read_json(path: Path, keys: Collection[str] | None = None) -> Any:
    """What a file holds.

    Args:
        path: of the file.
        keys: that it must have, as an object; None where it may be anything.

    Raises:
        ValueError: it is damaged, or lacks a key; names the file.
        OSError: it is not there, or cannot be read.
    """
    advice = "bring back what it was, or remove it and run the stage again that writes it"
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): {advice}") from None
    if keys is not None and not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object: {advice}")
    if lacks := [key for key in keys or () if key not in content]:
        raise ValueError(f"{path} lacks {', '.join(lacks)}: {advice}")
    return content
