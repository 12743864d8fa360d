"""lhotse's own formats: a manifest of cuts (.jsonl, .jsonl.gz) or a Shar folder.

A cut whose audio is not a file of one channel (it lies in the Shar's archives, comes from a command
or a URL, is transformed) is written out once, as FLAC, so that later stages read all corpora in the
same way: by `utterances.with_audio`, when it is to be checked.

What was written is of a certain command, place and file: of another one, it is written again.

A cut with one supervision is an utterance. Of a cut with several, each is an utterance of its own,
from where it starts to where it ends; so is one that leaves much of its cut without a transcript.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from icetransfer.data.decoding import Levels
from icetransfer.data.readers.tables import folder_of, is_utf8, read_lines
from icetransfer.data.utterances import (
    UNKNOWN_SPEAKER,
    FileState,
    Rejection,
    UnusableError,
    Utterance,
)
from icetransfer.stage import atomic

_NO_REASON = ("[extra info]", "Set LHOTSE_")  # what lhotse adds to an error
_ADVICE = "write it with lhotse's CutSet.to_file"
PATIENCE_SECONDS = 300.0  # for a cut's audio from a command or a site
_TOLERANCE = 0.1  # seconds by which supervisions may overlap, or reach out of their cut
_UNTRANSCRIBED = 1.0  # seconds of a cut that its one supervision may leave out


class _Read(NamedTuple):
    """A cut as it was read.

    Attributes:
        cut: lhotse's.
        where: The manifest and the number of the line, or the shard.
        archives: The files of the shard.
    """

    cut: Any
    where: str
    archives: tuple[FileState, ...] = ()


def read_cuts(
    source: Path, split: str, audio_folder: Path, root: Path
) -> Iterator[Utterance | Rejection]:
    """Reads a manifest or a Shar folder, cut by cut.

    Args:
        source: The manifest's file, or the Shar's folder.
        split: What its cuts are for.
        audio_folder: Where audio goes that is no file.
        root: The `common_folder`: cuts of the same id in two folders have two ids here.

    Raises:
        ValueError: There is no such file or folder.
    """
    if source.is_dir():
        if not list(source.glob("cuts.*.jsonl*")):
            raise ValueError(f"{source}: no Shar here; expected cuts.000000.jsonl.gz and the like")
        cuts = _shar_cuts(source)
    elif source.is_file():
        cuts = _manifest_cuts(source)
    else:
        raise ValueError(f"{source} does not exist: correct the paths in data.corpora")
    below_root = os.path.relpath(folder_of(source), root)
    for read in cuts:
        if isinstance(read, Rejection):
            yield read
            continue
        try:
            found = list(_utterances(read, below_root, split, audio_folder))
        except (AttributeError, TypeError, ValueError) as error:  # a field of another type
            reason = f"not a cut ({type(error).__name__}: {_one_line(error)})"
            found = [Rejection(str(read.cut.id), read.where, reason, _ADVICE)]
        yield from found


def _manifest_cuts(manifest: Path) -> Iterator[_Read | Rejection]:
    from lhotse.cut import Cut
    from lhotse.serialization import deserialize_item

    for number, line in read_lines(manifest):
        try:
            row = json.loads(line)
            if "\\u" in line and not is_utf8(json.dumps(row, ensure_ascii=False)):
                raise ValueError("half of a character, a lone surrogate")
            cut = deserialize_item(row)
            if not isinstance(cut, Cut):
                raise TypeError(f"a {type(cut).__name__}")
        except Exception as error:  # whatever lhotse raises on a row that is no cut
            where = f"{manifest.name}:{number}"
            reason = f"not a cut ({type(error).__name__}: {_one_line(error)})"
            yield Rejection(where, str(manifest), reason, _ADVICE)
            continue
        yield _Read(cut, f"{manifest}:{number}")


def _shar_cuts(folder: Path) -> Iterator[_Read | Rejection]:
    """The cuts of a Shar, shard by shard: a broken shard ends no other."""
    from lhotse import CutSet

    for shard in sorted(folder.glob("cuts.*.jsonl*")):
        number = shard.name.split(".")[1]
        paths = sorted(folder.glob(f"*.{number}.*"))
        archives = tuple(FileState.of(str(path)) for path in paths if path != shard)
        try:
            for cut in CutSet.from_shar(fields={path.name.split(".")[0]: [path] for path in paths}):
                yield _Read(cut, str(shard), archives)
        except Exception as error:  # whatever an archive that is cut off raises
            reason = f"the rest of the shard cannot be read ({_one_line(error)})"
            yield Rejection(shard.name, str(shard), reason, "copy the shard again", archives)


def _utterances(
    read: _Read, below_root: str, split: str, audio_folder: Path
) -> Iterator[Utterance | Rejection]:
    cut = read.cut
    name = _id_below(below_root, str(cut.id))
    if type(cut).__name__ != "MonoCut" or not cut.has_recording:
        advice = "trim_to_supervisions() gives one of each; save the cuts with their recordings"
        yield Rejection(name, read.where, "not a cut of one channel of one recording", advice)
        return
    supervisions = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    overlapping = _overlapping(supervisions)
    for number, supervision in enumerate(supervisions or [None]):
        identity = name if len(supervisions) < 2 else f"{name}-{supervision.id}"
        try:
            if number in overlapping:
                raise UnusableError(
                    f"supervision {supervision.id} overlaps {overlapping[number]}",
                    "correct their start and duration, or remove those that speak at once",
                )
            part = _transcribed(cut, supervision, alone=len(supervisions) == 1)
            path = _path(part)
        except UnusableError as error:
            yield Rejection(identity, read.where, error.reason, error.advice)
            continue
        found = Utterance(
            identity, path or audio_folder / f"{_file_name(identity)}.flac", supervision.text,
            supervision.speaker or UNKNOWN_SPEAKER, split,
            start=part.start if path else 0.0, seconds=part.duration,
        )  # fmt: skip
        if not path:
            origins = read.archives + tuple(map(FileState.of, _files(part)))
            written = replace(found, origins=origins)
            found = replace(written, write_audio=partial(_write, part, written))
        yield found


def _id_below(folder: str, cut_id: str) -> str:
    """A cut's id, with the folder of its manifest where a corpus has manifests in several."""
    if folder == ".":
        return cut_id
    digest = hashlib.sha256(f"{folder}/{cut_id}".encode()).hexdigest()[:8]
    return f"{folder.replace('/', '-')}-{cut_id}-{digest}"


def _overlapping(supervisions: list[Any]) -> dict[int, str]:
    """The numbers of the supervisions that overlap another, and the other's id; in order."""
    found: dict[int, str] = {}
    last = 0  # which of them ends last so far
    for number, supervision in enumerate(supervisions[1:], 1):
        if supervision.start < supervisions[last].end - _TOLERANCE:
            found[number] = supervisions[last].id
            found.setdefault(last, supervision.id)
        if supervision.end > supervisions[last].end:
            last = number
    return found


def _transcribed(cut: Any, supervision: Any, alone: bool) -> Any:
    """The cut, or the part of it that a supervision is about.

    Raises:
        UnusableError: There is no text, or it is about more than the cut.
    """
    from lhotse.utils import fastcopy

    if supervision is None or not isinstance(supervision.text, str) or not supervision.text:
        raise UnusableError("empty transcript", "write what is said as the supervision's text")
    start, end = supervision.start, supervision.end
    if start < -_TOLERANCE or end > cut.duration + _TOLERANCE:
        raise UnusableError(
            f"supervision {supervision.id} reaches out of its cut: {start:g} to {end:g} s of "
            f"{cut.duration:g} s",
            "lengthen the cut, or cut the recording with trim_to_supervisions()",
        )
    start, end = max(start, 0.0), min(end, cut.duration)
    if alone and cut.duration - (end - start) <= _UNTRANSCRIBED:
        return cut
    return fastcopy(
        cut, start=cut.start + start, duration=end - start, supervisions=[], features=None
    )


def _path(cut: Any) -> Path | None:
    """The file that holds a cut's audio; None if it is to be written.

    Raises:
        UnusableError: There is no such channel.
    """
    channels = cut.recording.channel_ids
    if cut.channel not in channels:
        raise UnusableError(
            f"channel {cut.channel}, but the recording has {', '.join(map(str, channels))}",
            "write one that it has as the cut's channel",
        )
    (source, *others), transforms = cut.recording.sources, cut.recording.transforms
    if source.type == "file" and source.channels == [cut.channel] and not (others or transforms):
        return Path(source.source)
    return None


def _write(cut: Any, utterance: Utterance) -> Rejection | None:
    """Writes a cut's audio to a file; returns why, if whatever is behind it gives none."""
    origin = _digest_of_origin(cut, utterance.origins)
    if _written_from(utterance.path) == origin:
        return None
    try:
        samples = _load(cut)
        levels = Levels()
        levels.add(samples)
        levels.check()
        with (
            atomic.atomic_path(utterance.path) as temporary,
            soundfile.SoundFile(temporary, "w", cut.sampling_rate, 1, "PCM_16") as file,
        ):
            file.comment = origin
            file.write(samples)
    except UnusableError as error:
        return Rejection(utterance.id, _origin(cut), error.reason, error.advice)
    except (AttributeError, TypeError, ValueError) as error:  # a field of another type
        reason = f"not a cut ({type(error).__name__}: {_one_line(error)})"
        return Rejection(utterance.id, _origin(cut), reason, _ADVICE)
    return None


def _digest_of_origin(cut: Any, origins: Sequence[FileState]) -> str:
    """What tells the audio of a cut from that of another command, place or file."""
    recording = cut.recording
    sources = [
        (s.type, s.channels, "" if s.type == "memory" else s.source) for s in recording.sources
    ]
    place = (cut.id, cut.start, cut.duration, cut.channel, sources, recording.transforms)
    return hashlib.sha256(repr((place, tuple(origins))).encode()).hexdigest()


def _written_from(path: Path) -> str:
    """The digest that a written file carries; "" of none."""
    if not path.is_file():
        return ""
    try:
        with soundfile.SoundFile(path) as file:
            comment: str = file.comment
            return comment
    except (OSError, soundfile.SoundFileError):  # damaged since
        return ""


def _load(cut: Any) -> NDArray[np.float32]:
    """Samples (N, 1) of a cut, from a command, a URL, an archive or a file of several channels."""
    try:
        with _patience():
            samples: NDArray[np.float32] = cut.load_audio().T
    except Exception as error:  # whatever lhotse, a command or a site raises
        kind = cut.recording.sources[0].type
        raise UnusableError(
            f"its {'archive' if kind == 'memory' else kind} gives no audio ({_one_line(error)})",
            "see whether it does outside of the recipe, or write its audio to a file",
        ) from None
    if not samples.size:
        raise UnusableError(
            f"its audio has nothing in channel {cut.channel}",
            "write a channel that the audio has in the cut and its recording",
        )
    return samples


@contextmanager
def _patience() -> Iterator[None]:
    """Raises TimeoutError in what waits too long: a command or a site that never answers."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"nothing came in {PATIENCE_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _file_name(identity: str) -> str:
    """An id as a file's name: another for each id, and not too long for a file system."""
    safe = identity.replace("/", "-")
    if safe == identity and len(identity.encode()) <= 200:
        return identity
    return f"{safe[:40]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _files(cut: Any) -> list[str]:
    """The files that a cut's audio is in, if it is in files."""
    return [str(source.source) for source in cut.recording.sources if source.type == "file"]


def _origin(cut: Any) -> str:
    """Where a cut's audio comes from, as far as that is words."""
    return ", ".join(s.source for s in cut.recording.sources if s.type != "memory")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NO_REASON)]
    reason = lines[-1] if lines else type(error).__name__
    return re.sub(r" object at 0x[0-9a-f]+", "", reason)  # of which each run has another
