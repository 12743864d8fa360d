"""Stage 1: manifests of every corpus: what is recorded where, and its normalised text.

Writes to the manifests folder, for a corpus named X,

    X_{train,dev,test}.jsonl.gz   lhotse cuts: text normalised, as written in custom["raw_text"]
    X_rejected.tsv                id, path, reason, advice: what was left out
    X_prepared.json               counts, and what they were made from

A recording that cannot be used is left out and named; the others are not touched by it. Training
and dev text outside the alphabet is left out; test text never is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from icetransfer import atomic, config
from icetransfer.data import synthetic
from icetransfer.data.download import corpus_dir
from icetransfer.data.text import Normalizer
from icetransfer.experiment import Experiment, log, run_stage

SPLITS = ("train", "dev", "test")
SAMPLING_RATE = 16_000  # Hz
#: One chunk of 160 ms and its look-ahead of 130 ms: the least that can be decoded.
SHORTEST_TEST_SECONDS = 0.29
_TRANSCRIPTS = "transcripts.tsv"
_COLUMNS = ("path", "text", "speaker")


@dataclass(frozen=True)
class Rejection:
    """A line of X_rejected.tsv."""

    id: str
    path: str
    reason: str
    advice: str


@dataclass(frozen=True)
class Utterance:
    """A recording with its transcript, before anything is checked."""

    id: str
    path: Path
    text: str
    speaker: str
    split: str


@dataclass
class Prepared:
    """A corpus's cuts by split, as lhotse writes them, and what was left out."""

    cuts: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    rejections: list[Rejection] = field(default_factory=list)


class UnusableError(Exception):
    """A recording cannot be used: the reason, and what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def read_transcripts(folder: Path, holdout_every: int) -> tuple[list[Utterance], list[Rejection]]:
    """Read a folder's transcripts.tsv: path, text, speaker, separated by tabs, without quoting.

    The path is relative to the folder. A first line "path text speaker" is a header. A fourth
    column may name the split; otherwise every `holdout_every`th line is test and the one before
    it dev. Lines that are wrong count too, so that mending one moves no other.

    Args:
        folder: Where transcripts.tsv and the audio lie.
        holdout_every: N as above; 0 holds out nothing, 1 everything.

    Returns:
        The utterances in their order, and the lines that are wrong.

    Raises:
        ValueError: There is no transcripts.tsv.
    """
    path = folder / _TRANSCRIPTS
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: expected {', '.join(_COLUMNS)}, tab-separated, "
            "a line for each recording"
        )
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    utterances: dict[str, Utterance] = {}
    rejections = []
    offset = 1 if lines and lines[0].split(b"\t")[:2] == [b"path", b"text"] else 0
    for number, line in enumerate(lines[offset:]):
        if not line.strip():
            continue
        try:
            utterance = _parse_line(line, folder, _split(number, holdout_every))
            if utterance.id in utterances:
                raise UnusableError("duplicate id", f"keep one line of {utterance.id}")
        except UnusableError as error:
            name = line.split(b"\t")[0].decode(errors="replace")
            where = f"{_TRANSCRIPTS}:{number + offset + 1}"
            rejections.append(Rejection(where, name, error.reason, error.advice))
        else:
            utterances[utterance.id] = utterance
    return list(utterances.values()), rejections


def _parse_line(line: bytes, folder: Path, split: str) -> Utterance:
    try:
        cells = [cell.strip() for cell in line.decode("utf-8").split("\t")]
    except UnicodeDecodeError:
        raise UnusableError("not UTF-8", "save the file as UTF-8") from None
    if not 2 <= len(cells) <= 4 or not cells[0]:
        raise UnusableError(
            f"{len(cells)} tab-separated columns", "write path, text, speaker and perhaps split"
        )
    name, text, speaker, own_split = (*cells, *[""] * (4 - len(cells)))
    if own_split and own_split not in SPLITS:
        raise UnusableError(f"split {own_split!r}", f"write one of {', '.join(SPLITS)}, or nothing")
    identity = Path(name).with_suffix("").as_posix().replace("/", "-").lstrip("-.")
    return Utterance(identity, folder / name, text, speaker or "unknown", own_split or split)


def _split(number: int, holdout_every: int) -> str:
    if holdout_every == 0:
        return "train"
    place = number % holdout_every
    return {holdout_every - 1: "test", holdout_every - 2: "dev"}.get(place, "train")


def prepare_folder(
    folder: Path,
    language: str,
    *,
    holdout_every: int = 10,
    min_seconds: float = 0.5,
    max_seconds: float = 30.0,
) -> Prepared:
    """Check every recording of a folder and describe those that can be used.

    Args:
        folder: Where transcripts.tsv and the audio lie.
        language: Code of a language with text rules.
        holdout_every: See `read_transcripts`.
        min_seconds: Shortest recording of train and dev.
        max_seconds: Longest recording of train and dev.

    Raises:
        ValueError: No transcripts.tsv, no rules for the language, or nothing can be used.
    """
    normalizer = Normalizer(language)
    utterances, rejections = read_transcripts(folder, holdout_every)
    prepared = Prepared(rejections=rejections)
    for utterance in utterances:
        limits = (min_seconds, max_seconds)
        advice = "cut or join it, or change data.min_seconds and data.max_seconds"
        if utterance.split == "test":
            limits = (SHORTEST_TEST_SECONDS, float("inf"))
            advice = "remove the line: that is less than one chunk of 160 ms and its look-ahead"
        try:
            text = _checked_text(utterance, normalizer)
            sampling_rate, samples = _checked_audio(utterance.path, *limits, advice)
        except UnusableError as error:
            prepared.rejections.append(
                Rejection(utterance.id, str(utterance.path), error.reason, error.advice)
            )
        else:
            prepared.cuts[utterance.split].append(
                _cut(utterance, text, language, sampling_rate, samples)
            )
    if not any(prepared.cuts.values()):
        shown = [f"{r.path}: {r.reason} ({r.advice})" for r in prepared.rejections[:3]]
        raise ValueError(
            f"{folder}: none of its {len(prepared.rejections)} recordings can be used; "
            + ("the first: " + "; ".join(shown) if shown else f"{_TRANSCRIPTS} is empty")
        )
    return prepared


def _checked_text(utterance: Utterance, normalizer: Normalizer) -> str:
    text = normalizer(utterance.text)
    if not text:
        raise UnusableError("empty transcript", "write what is said, or remove the line")
    offending = normalizer.check(text)
    if offending and utterance.split != "test":
        raise UnusableError(
            f"{utterance.split} text outside the {normalizer.name} alphabet: {' '.join(offending)}",
            "write it as it is spoken (numbers in words)",
        )
    return text


def _checked_audio(
    path: Path, min_seconds: float, max_seconds: float, advice: str
) -> tuple[int, int]:
    """Return the sampling rate and the number of samples of audio that decodes to its end."""
    if not path.is_file():
        raise UnusableError("no such file", "correct the path, or bring the file")
    if path.stat().st_size == 0:
        raise UnusableError("empty file", "copy it again")
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels, promised = file.samplerate, file.channels, file.frames
            seconds = promised / rate
            # Before it is read: a broken header can promise hours.
            if not min_seconds <= seconds <= max_seconds:
                side = "short" if seconds < min_seconds else "long"
                limit = min_seconds if seconds < min_seconds else max_seconds
                raise UnusableError(
                    f"too {side}: {seconds:.3f} s, the limit is {limit:g} s", advice
                )
            decoded, loudest = 0, 0.0
            for block in file.blocks(blocksize=1 << 16, dtype="float32"):
                decoded += len(block)
                loudest = max(loudest, float(abs(block).max(initial=0.0)))
    except soundfile.SoundFileError as error:
        reason = str(error).splitlines()[0]
        raise UnusableError(
            f"not readable as audio ({reason})", "convert it to FLAC or WAV"
        ) from None
    if decoded != promised:
        raise UnusableError(
            f"truncated: {decoded} of {promised} samples", "copy or convert it again"
        )
    if channels != 1:
        raise UnusableError(f"{channels} channels", "convert it to mono")
    if loudest == 0.0:
        raise UnusableError("nothing but digital silence", "record it again, or remove the line")
    return rate, decoded


def _cut(
    utterance: Utterance, text: str, language: str, sampling_rate: int, samples: int
) -> dict[str, Any]:
    """Return a lhotse cut as it stands in a manifest; other rates are resampled when read."""
    from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

    recording = Recording(
        id=utterance.id,
        sources=[AudioSource("file", [0], str(utterance.path))],
        sampling_rate=sampling_rate,
        num_samples=samples,
        duration=samples / sampling_rate,
    )
    if sampling_rate != SAMPLING_RATE:
        recording = recording.resample(SAMPLING_RATE)
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=recording.duration,
        text=text,
        language=language,
        speaker=utterance.speaker,
        custom={"raw_text": utterance.text},
    )
    cut = MonoCut(
        id=utterance.id,
        start=0.0,
        duration=recording.duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
    )
    described: dict[str, Any] = cut.to_dict()
    return described


def prepare_synthetic(folder: Path) -> Prepared:
    """Describe the recordings of a corpus that `synthetic.synthesise` made.

    Args:
        folder: Its `out_dir`.

    Raises:
        ValueError: The corpus is not there, or not finished.
    """
    prepared = Prepared()
    for split in SPLITS:
        manifests = [folder / f"{split}_{kind}.jsonl.gz" for kind in ("recordings", "supervisions")]
        for manifest in manifests:
            if not manifest.is_file():
                raise ValueError(f"{manifest} does not exist: run stage 0, which makes it")
        recordings, supervisions = map(synthetic.read_jsonl_gz, manifests)
        for recording, supervision in zip(recordings, supervisions, strict=True):
            cut = {
                "id": recording["id"],
                "start": 0.0,
                "duration": recording["duration"],
                "channel": 0,
                "supervisions": [supervision],
                "recording": recording,
                "type": "MonoCut",
            }
            prepared.cuts[split].append(cut)
    return prepared


def prepare_manifests(
    name: str, folder: Path, settings: Mapping[str, Any], manifests_dir: Path
) -> None:
    """Write a corpus's manifests, unless they are there and were made from the same.

    Args:
        name: The corpus's name: the manifests' prefix.
        folder: Where the corpus lies.
        settings: The arguments of `prepare_folder`, language among them; those of a synthetic
            corpus hold its language alone.
        manifests_dir: Where to write.

    Raises:
        ValueError: Nothing in the corpus can be used.
    """
    transcripts = folder / _TRANSCRIPTS
    is_folder = "holdout_every" in settings
    source = [transcripts] if is_folder else [folder / f"{s}_supervisions.jsonl.gz" for s in SPLITS]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in source if p.is_file())).hexdigest()
    made_from = {
        "folder": str(folder),
        "sha256": digest,
        "text": Normalizer(settings["language"]).version,
        **settings,
    }
    record = manifests_dir / f"{name}_prepared.json"
    targets = {split: manifests_dir / f"{name}_{split}.jsonl.gz" for split in SPLITS}
    if record.is_file() and all(target.is_file() for target in targets.values()):
        if json.loads(record.read_text(encoding="utf-8"))["made_from"] == made_from:
            log.info("skip: manifests of %s are complete", name)
            return
        record.unlink()
    prepared = prepare_folder(folder, **settings) if is_folder else prepare_synthetic(folder)
    for split, target in targets.items():
        synthetic.write_jsonl_gz(target, prepared.cuts[split])
    _write_rejections(name, prepared.rejections, manifests_dir / f"{name}_rejected.tsv")
    counts = {split: _counts(prepared.cuts[split]) for split in SPLITS}
    for split, count in counts.items():
        log.info("%s %s: %d recordings, %.1f min, %d speakers", name, split, *count.values())
    summary = {"made_from": made_from, "splits": counts, "rejected": len(prepared.rejections)}
    atomic.write_text(record, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _counts(cuts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "recordings": len(cuts),
        "minutes": round(sum(cut["duration"] for cut in cuts) / 60, 2),
        "speakers": len({cut["supervisions"][0]["speaker"] for cut in cuts}),
    }


def _write_rejections(name: str, rejections: Sequence[Rejection], path: Path) -> None:
    """Write what was left out, and say how much and why."""
    rows = [("id", "path", "reason", "advice")]
    rows += [(r.id, r.path, r.reason, r.advice) for r in rejections]
    atomic.write_text(path, "".join("\t".join(row) + "\n" for row in rows))
    for reason, count in Counter(_kind(rejection) for rejection in rejections).most_common():
        log.warning("%s: %d left out: %s", name, count, reason)
    if rejections:
        log.warning("%s: each is named in %s", name, path)


def _kind(rejection: Rejection) -> str:
    """Return a reason without its particulars, to count by."""
    return re.sub(r"[:(].*|^\d+ ", "", rejection.reason).strip()


def prepare(experiment: Experiment) -> None:
    """Write the manifests of every corpus of the config."""
    data = experiment.config.data
    for name, corpus in data.corpora.items():
        settings: dict[str, Any] = {"language": corpus.language or experiment.config.language}
        if isinstance(corpus, config.FolderCorpus):
            settings |= {
                "holdout_every": corpus.holdout_every,
                "min_seconds": data.min_seconds,
                "max_seconds": data.max_seconds,
            }
        prepare_manifests(name, corpus_dir(data, name), settings, experiment.manifests_dir)


if __name__ == "__main__":
    run_stage(__doc__, prepare)
