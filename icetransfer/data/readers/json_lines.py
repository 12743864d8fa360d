"""NeMo's manifests: a JSON object a line, as Granary, YODAS and the like come.

    {"audio_filepath": "a.wav", "duration": 3.2, "text": "...", "offset": 0.0, "speaker": "x"}

offset, speaker and further keys may be absent; a relative path is relative to the manifest.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icetransfer.data.utterances import UNKNOWN_SPEAKER, Rejection, Utterance


def read_json_lines(manifest: Path, split: str) -> Iterator[Utterance | Rejection]:
    """Reads a manifest, packed with gzip when its name ends in .gz.

    Args:
        manifest: The file.
        split: What its recordings are for.

    Raises:
        ValueError: There is no such file.
    """
    if not manifest.is_file():
        raise ValueError(f"{manifest} does not exist: correct the paths in data.corpora")
    with gzip.open(manifest) if manifest.suffix == ".gz" else manifest.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield _utterance(row, manifest, split)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                where = f"{manifest.name}:{number}"
                advice = "write a JSON object with audio_filepath, duration and text"
                reason = f"not a line of a NeMo manifest ({type(error).__name__}: {error})"
                yield Rejection(where, str(manifest), reason, advice)


def _utterance(row: dict[str, Any], manifest: Path, split: str) -> Utterance:
    path = manifest.parent / row["audio_filepath"]
    offset = float(row.get("offset") or 0)
    part = "offset" in row
    name = Path(row["audio_filepath"]).with_suffix("").as_posix().replace("/", "-").lstrip("-.")
    return Utterance(
        id=f"{name}-{round(1000 * offset):08d}" if part else name,
        path=path,
        text=str(row["text"]),
        speaker=str(row.get("speaker") or UNKNOWN_SPEAKER),
        split=split,
        start=offset,
        seconds=float(row["duration"]) if part else None,
        promised_seconds=None if part else float(row["duration"]),
    )
