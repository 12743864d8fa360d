"""What a corpus's reader gives to stage 1: recordings with their transcripts, not checked yet."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

SAMPLING_RATE = 16_000  # Hz, of all that is trained on and recognised
SPLITS = ("train", "dev", "test")
UNKNOWN_SPEAKER = "unknown"


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
    """

    id: str
    path: Path
    text: str
    speaker: str
    split: str
    start: float = 0.0
    seconds: float | None = None
    promised_seconds: float | None = None


@dataclass(frozen=True)
class Rejection:
    """A line of X_rejected.tsv."""

    id: str
    path: str
    reason: str
    advice: str


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
