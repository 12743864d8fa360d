"""What can stand side by side on the page: each precision of each tier of each bundle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from icetransfer.bundle.settings import read_settings
from icetransfer.bundle.tiers import find_tiers, open_tier, precisions_of
from icetransfer.config import LOOK_AHEAD_MS
from icetransfer.experiment import log
from icetransfer.stage.stamp import sha256
from icetransfer.stage.text import read_text
from icetransfer.streaming.exported import Exported
from icetransfer.streaming.segments import Listener

RECORDING = "test.wav"
TRANSCRIPT = "test.txt"


@dataclass(eq=False)
class Column:
    """One tier in one precision.

    Attributes:
        bundle: what the page calls the bundle.
        tier: "160" (ms), ..., or "offline".
        precision: "fp32", "int8", ...
        exported: the tier's files.
        chunk_size: in 50 Hz frames; -1 is offline.
    """

    bundle: str
    tier: str
    precision: str
    exported: Exported
    chunk_size: int
    _listen: Callable[[], Listener] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def id(self) -> str:
        """Its name among all columns."""
        return f"{self.bundle}/{self.tier}/{self.precision}"

    @property
    def chunk_seconds(self) -> float:
        """Audio that is decoded at once; of an offline tier a tenth of a second is heard."""
        return 0.1 if self.chunk_size == -1 else self.chunk_size / 50

    def listen(self) -> Listener:
        """Begins a recording; the first one loads the models.

        Raises:
            ValueError: a file is missing or broken.
        """
        with self._lock:
            if self._listen is None:
                self._listen = open_tier(self.exported, self.chunk_size, self.precision)
        return self._listen()


@dataclass(frozen=True)
class Recording:
    """The test speech of one bundle or more.

    Attributes:
        path: a sound file.
        text: what it says.
        bundles: what the page calls those that it came with.
    """

    path: Path
    text: str
    bundles: list[str]


def find_columns(folders: Sequence[Path]) -> list[Column]:
    """The columns of bundles, in their order, by latency, fp32 first.

    What is half written or damaged is named in the log and left out, if anything else is there.

    Raises:
        ValueError: a folder has no bundle that works, or two are the same folder.
    """
    columns = []
    for folder, label in zip(folders, labels(folders), strict=True):
        tiers, broken = find_tiers(folder)
        found = []
        for tier in sorted(tiers, key=lambda name: (len(name), name)):
            exported, size = tiers[tier]
            try:
                read_settings(exported.dir)  # of another version?
                for precision in precisions_of(exported):
                    exported.check(precision)
                    found.append(Column(label, tier, precision, exported, size))
            except ValueError as error:
                broken.append(str(error))
        if not found:
            raise ValueError("\n".join(broken))
        for problem in broken:
            log.warning("left out: %s", problem)
        columns += found
    return columns


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names of bundles: the experiment's, or as much of the path as tells them apart.

    Raises:
        ValueError: two are the same folder.
    """
    paths = [folder.resolve() for folder in folders]
    if len({*paths}) < len(paths):
        raise ValueError("the same folder was given twice with --bundle: give each one once")
    names = [path.parts[1:-1] if path.name == "bundle" else path.parts[1:] for path in paths]
    names = [name[:-2] if len(name) > 1 and name[-2] == "bundle" else name for name in names]
    if len({*names}) < len(names):  # tiers of one bundle
        names = [path.parts[1:] for path in paths]
    for length in range(1, max(map(len, names))):
        short = ["/".join(name[-length:]) for name in names]
        if len({*short}) == len(short):
            return short
    return ["/".join(name) for name in names]


def find_recordings(columns: Sequence[Column]) -> list[Recording]:
    """The different test recordings of bundles."""
    found: dict[str, Recording] = {}
    for column in columns:
        path = column.exported.dir / RECORDING
        if not path.is_file():
            continue
        transcript = path.with_name(TRANSCRIPT)
        text = read_text(transcript).strip() if transcript.is_file() else ""
        recording = found.setdefault(sha256(path), Recording(path, text, []))
        if column.bundle not in recording.bundles:
            recording.bundles.append(column.bundle)
    return [*found.values()]


def describe(columns: Sequence[Column], recordings: Sequence[Recording]) -> dict[str, Any]:
    """What the page is told when it opens."""
    return {
        "columns": [
            {
                "id": column.id,
                "bundle": column.bundle,
                "tier": column.tier,
                "precision": column.precision,
                "chunk_ms": round(1000 * column.chunk_seconds),
                "look_ahead_ms": LOOK_AHEAD_MS,
                "megabytes": round(column.exported.size(column.precision) / 1e6, 1),
            }
            for column in columns
        ],
        "recordings": [
            {
                "url": f"/recordings/{number}.wav",
                "text": recording.text,
                "bundles": recording.bundles,
                "seconds": round(soundfile.info(recording.path).duration, 1),
            }
            for number, recording in enumerate(recordings)
        ],
    }
