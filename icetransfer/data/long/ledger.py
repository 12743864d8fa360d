"""The files of recordings that were cut: two of each, and the tables of all.

    DIR/recordings/<id>.json          what was found in a recording
    DIR/recordings/<id>.stamp.json    what that was made from
    DIR/transcripts.tsv               path, text, speaker, offset, duration, confidence
    DIR/rejected.tsv                  path, offset, duration, reason, confidence, text, heard
    DIR/summary.md                    a line for each recording, and the reasons
    DIR/audio/                        utterances as files, where that is asked for

The tables are written again after each recording, from all of the command that are done.  `kind:
folder` reads the folder as a corpus.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from icetransfer.data.long.cutting import Piece
from icetransfer.data.readers.folder import TRANSCRIPTS
from icetransfer.data.utterances import SAMPLING_RATE, id_of_part, id_of_path
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.markdown import markdown_table
from icetransfer.stage.stamp import Stamp, sha256

REJECTED = "rejected.tsv"
SUMMARY = "summary.md"
_KEYS = ("path", "speaker", "seconds", "words", "kept_words", "pieces")


@dataclass(frozen=True)
class LongRecording:
    """A recording and the text of the whole.

    Attributes:
        audio: its file.
        text: that of its text.
        speaker: who speaks; "unknown" where nobody said.
    """

    audio: Path
    text: Path
    speaker: str


@dataclass(frozen=True)
class Found:
    """What was found in a recording.

    Attributes:
        path: of its audio, relative to the output folder.
        speaker: who speaks.
        seconds: of audio.
        words: of the text, in all.
        kept_words: of them, in utterances.
        pieces: utterances and what is not kept.
    """

    path: str
    speaker: str
    seconds: float
    words: int
    kept_words: int
    pieces: list[Piece]

    @property
    def utterances(self) -> list[Piece]:
        """What is kept."""
        return [piece for piece in self.pieces if not piece.reason]

    @property
    def kept_seconds(self) -> float:
        """Of utterances."""
        return sum(piece.end - piece.start for piece in self.utterances)

    @property
    def kept_share(self) -> float:
        """Of the words."""
        return self.kept_words / max(self.words, 1)


class Ledger:
    """The output folder.

    Args:
        folder: made if it is not there.
        inputs: what everything in it is made from besides a recording and its text, by name.
        copies: whether utterances are files of their own.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str], copies: bool) -> None:
        self.folder = folder.resolve()
        self._inputs = {**inputs, "copies": str(copies)}
        self._copies = copies
        (self.folder / "recordings").mkdir(parents=True, exist_ok=True)

    def name(self, recording: LongRecording) -> str:
        """The path of its audio, as it stands in the tables: relative to the folder."""
        return os.path.relpath(recording.audio.resolve(), self.folder)

    def load(self, recording: LongRecording) -> Found | None:
        """What was found in a recording before; None if that was made from something else."""
        path, stamp = self._files(recording)
        if not stamp.is_current(path):
            return None
        found = read_json(path, _KEYS)
        pieces = [Piece(*piece) for piece in found["pieces"]]
        return Found(**{key: found[key] for key in _KEYS} | {"pieces": pieces})

    def save(self, recording: LongRecording, found: Found) -> None:
        """Keeps what was found in a recording."""
        path, stamp = self._files(recording)
        stamp.renew(path)
        content = vars(found) | {"pieces": [list(piece) for piece in found.pieces]}
        atomic.write_text(path, json.dumps(content, ensure_ascii=False, indent=0) + "\n")

    def _files(self, recording: LongRecording) -> tuple[Path, Stamp]:
        stem = self.folder / "recordings" / id_of_path(self.name(recording))
        status = recording.audio.stat()
        inputs = self._inputs | {
            "audio": f"{status.st_size} bytes of {status.st_mtime_ns}",
            "text": sha256(recording.text),
            "speaker": recording.speaker,
        }
        return stem.with_name(f"{stem.name}.json"), Stamp(
            stem.with_name(f"{stem.name}.stamp.json"), inputs
        )

    def copy_path(self, path: str, piece: Piece) -> Path:
        """Where an utterance's own file lies."""
        return self.folder / "audio" / f"{id_of_part(id_of_path(path), piece.start)}.flac"

    def write_tables(self, all_found: Sequence[Found]) -> None:
        """Writes transcripts.tsv, rejected.tsv and summary.md."""
        header = ["path", "text", "speaker", "confidence"]
        if not self._copies:
            header = ["path", "text", "speaker", "offset", "duration", "confidence"]
        rows = [self._row(f, piece) for f in all_found for piece in f.utterances]
        _write_table(self.folder / TRANSCRIPTS, header, rows)
        header = ["path", "offset", "duration", "reason", "confidence", "text", "heard"]
        rows = [_rejection(f, piece) for f in all_found for piece in f.pieces if piece.reason]
        _write_table(self.folder / REJECTED, header, rows)
        atomic.write_text(self.folder / SUMMARY, summary(all_found))

    def _row(self, found: Found, piece: Piece) -> list[str]:
        confidence = f"{piece.confidence:.3f}"
        if self._copies:
            path = self.copy_path(found.path, piece).relative_to(self.folder)
            return [str(path), piece.text, found.speaker, confidence]
        place = [f"{piece.start:.2f}", f"{piece.end - piece.start:.2f}"]
        return [found.path, piece.text, found.speaker, *place, confidence]


def _rejection(found: Found, piece: Piece) -> list[str]:
    confidence = "" if piece.confidence is None else f"{piece.confidence:.3f}"
    place = [f"{piece.start:.2f}", f"{piece.end - piece.start:.2f}"]
    return [found.path, *place, piece.reason, confidence, piece.text, piece.heard]


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with (
        atomic.atomic_path(path) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])


def summary(all_found: Sequence[Found]) -> str:
    """The page that says how much was kept, and why not the rest."""
    minutes, kept = sum(f.seconds for f in all_found), sum(f.kept_seconds for f in all_found)
    count = sum(len(f.utterances) for f in all_found)
    words, kept_words = sum(f.words for f in all_found), sum(f.kept_words for f in all_found)
    head = (
        f"# Long recordings, cut into utterances\n\n{count} utterances, {kept / 60:.1f} of "
        f"{minutes / 60:.1f} minutes, {kept_words} of {words} words "
        f"({kept_words / max(words, 1):.1%}).\n\n"
    )
    of_each = markdown_table(
        ["recording", "minutes", "kept", "utterances", "words", "kept"],
        [
            [
                f.path, f"{f.seconds / 60:.1f}", f"{f.kept_seconds / 60:.1f}",
                str(len(f.utterances)), str(f.words), f"{f.kept_share:.1%}",
            ]
            for f in all_found
        ],
    )  # fmt: skip
    pieces = [piece for f in all_found for piece in f.pieces if piece.reason]
    times, seconds = Counter[str](), Counter[str]()
    for piece in pieces:
        kind = piece.reason.partition(":")[0]
        times[kind] += 1
        seconds[kind] += round(piece.end - piece.start)
    of_reasons = markdown_table(
        ["not kept", "times", "minutes"],
        [[kind, str(n), f"{seconds[kind] / 60:.1f}"] for kind, n in times.most_common()],
    )
    return head + of_each + "\n" + (of_reasons if pieces else "Nothing was left out.\n")


def write_copies(
    ledger: Ledger, path: str, pieces: Sequence[Piece], audio: Iterable[NDArray[np.float32]]
) -> None:
    """Writes utterances as FLAC of 16 kHz, one after another as the recording is read.

    Args:
        ledger: where they go.
        path: of the recording, as in the tables.
        pieces: the utterances, in order of time.
        audio: the recording's samples, in pieces.
    """
    held, begin = np.zeros(0, dtype=np.float32), 0  # the sample at which `held` begins
    waiting = list(pieces)
    for samples in audio:
        held = np.concatenate([held, samples])
        while waiting and round(waiting[0].end * SAMPLING_RATE) <= begin + len(held):
            _write_copy(ledger.copy_path(path, waiting[0]), held, begin, waiting.pop(0))
        first = round(waiting[0].start * SAMPLING_RATE) if waiting else begin + len(held)
        drop = min(max(first - begin, 0), len(held))
        held, begin = held[drop:], begin + drop
    for piece in waiting:  # the last may end with the recording
        _write_copy(ledger.copy_path(path, piece), held, begin, piece)


def _write_copy(target: Path, held: NDArray[np.float32], begin: int, piece: Piece) -> None:
    first, end = (round(time * SAMPLING_RATE) - begin for time in (piece.start, piece.end))
    with atomic.atomic_path(target) as partial:
        soundfile.write(partial, held[max(first, 0) : end], SAMPLING_RATE)
