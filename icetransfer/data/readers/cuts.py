"""lhotse's own formats: a manifest of cuts (.jsonl, .jsonl.gz) or a Shar folder.

A cut's audio must be one file or lie in the Shar's archives; that is written out once, as FLAC, so
that later stages read all corpora in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icetransfer.data.utterances import UNKNOWN_SPEAKER, Rejection, Utterance
from icetransfer.stage import atomic


def read_cuts(source: Path, split: str, audio_folder: Path) -> Iterator[Utterance | Rejection]:
    """Reads a manifest or a Shar folder, cut by cut.

    Args:
        source: The manifest's file, or the Shar's folder.
        split: What its cuts are for.
        audio_folder: Where audio goes that is no file.

    Raises:
        ValueError: There is no such file or folder.
    """
    from lhotse import CutSet

    if source.is_dir():
        if not list(source.glob("cuts.*.jsonl*")):
            raise ValueError(f"{source}: no Shar here; expected cuts.000000.jsonl.gz and the like")
        cuts = CutSet.from_shar(in_dir=source)
    elif source.is_file():
        cuts = CutSet.from_jsonl_lazy(source)
    else:
        raise ValueError(f"{source} does not exist: correct the paths in data.corpora")
    for cut in cuts:
        yield _utterance(cut, split, audio_folder)


def _utterance(cut: Any, split: str, audio_folder: Path) -> Utterance | Rejection:
    if type(cut).__name__ != "MonoCut" or not cut.has_recording:
        advice = "trim_to_supervisions() gives one of each; save the cuts with their recordings"
        return Rejection(cut.id, "", "not a cut of one channel of one recording", advice)
    text = " ".join(s.text or "" for s in cut.supervisions)
    speakers = {s.speaker for s in cut.supervisions if s.speaker}
    speaker = "+".join(sorted(speakers)) or UNKNOWN_SPEAKER
    sources = cut.recording.sources
    if len(sources) == 1 and sources[0].type == "file" and not cut.recording.transforms:
        path, start = Path(sources[0].source), cut.start
    else:
        path, start = audio_folder / f"{cut.id.replace('/', '-')}.flac", 0.0
        if not path.is_file():
            with atomic.atomic_path(path) as temporary:
                cut.save_audio(temporary)
    return Utterance(cut.id, path, text, speaker, split, start=start, seconds=cut.duration)
