"""What a corpus's reader gives to stage 1: recordings with their transcripts, not checked yet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

SAMPLING_RATE = 16_000  # Hz, of all that is trained on and recognised
SPLITS = ("train", "dev", "test")
UNKNOWN_SPEAKER = "unknown"


class FileState(NamedTuple):
    """Size and time of a file, by which a replaced one is told; None where there is none."""

    path: str
    size: int | None
    mtime: int | None

    @classmethod
    def of(cls, path: str) -> FileState:
        """What there is now."""
        try:
            found = os.stat(path)  # noqa: PTH116 (millions of them)
        except (OSError, ValueError):  # or a path that no file can have
            return cls(path, None, None)
        return cls(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Utterance:
    """A recording, or a part of one, with its transcript.

    Attributes:
        id: Its name, once in the corpus.
        path: The audio file.
        text: As the corpus has it.
        speaker: The corpus's name of the speaker, or "unknown".
        split: "train", "dev" or "test".
        start: Where it begins in the file, in seconds.
        seconds: How long it is; None for the whole file.
        promised_seconds: How long the corpus says that the file is; None where it says nothing.
        write_audio: Writes the file, unless it is there, or returns why not; None where the
            corpus has it.
        origins: The files that it is written from, as they were when the corpus was read.
    """

    id: str
    path: Path
    text: str
    speaker: str
    split: str
    start: float = 0.0
    seconds: float | None = None
    promised_seconds: float | None = None
    write_audio: Callable[[], Rejection | None] | None = field(
        default=None, compare=False, repr=False
    )
    origins: tuple[FileState, ...] = ()


@dataclass(frozen=True)
class Rejection:
    """A line of X_rejected.tsv.

    Attributes:
        id: Of the recording, or the place of a line that is about none.
        path: Of the audio or of the table.
        reason: Why it cannot be used.
        advice: What to do about it.
        files: What was there of its audio; where that changes, it is looked at again.
    """

    id: str
    path: str
    reason: str
    advice: str
    files: tuple[FileState, ...] = ()


def with_audio(found: Utterance | Rejection) -> Utterance | Rejection:
    """The utterance, when its audio is a file; or why it cannot be."""
    if isinstance(found, Rejection) or found.write_audio is None:
        return found
    rejection = found.write_audio()
    if rejection is not None:
        return replace(rejection, files=found.origins)
    return replace(found, write_audio=None)


class UnusableError(Exception):
    """A recording cannot be used: the reason, and what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def id_of_path(name: str) -> str:
    """The id of a recording that is known by its file: safe as a file's name.

    It is the name without its suffix. A path with folders is joined by hyphens and ends in eight
    digits of its hash, so that boek/1.flac is another recording than boek-1.flac, whatever else
    the corpus holds.
    """
    # Not pathlib: a corpus may have millions of them.
    written = os.path.splitext(os.path.normpath(name))[0]  # noqa: PTH122
    joined = written.replace("/", "-").lstrip("-.")
    if joined == written:
        return joined
    return f"{joined}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"


def id_of_part(identity: str, start: float) -> str:
    """The id of a part of a recording: that of the whole, and the millisecond where it begins."""
    return f"{identity}-{round(1000 * start):08d}"


def text_of(cut: Mapping[str, Any]) -> str:
    """The transcript of a cut as it stands in a manifest."""
    return " ".join(supervision.get("text") or "" for supervision in cut["supervisions"])


def speaker_of(cut: Mapping[str, Any]) -> str:
    """Who speaks in a cut as it stands in a manifest, or "unknown"."""
    return str(cut["supervisions"][0].get("speaker") or UNKNOWN_SPEAKER)
