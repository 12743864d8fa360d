"""Stage 1: manifests of every corpus: what is recorded where, and its normalised text.

Writes to the manifests folder, for a corpus named X,

    X_{train,dev,test}.jsonl.gz   lhotse cuts: text normalised, as written in custom["raw_text"]
    X_rejected.tsv                id, path, reason, advice: what was left out
    X_text.md                     what was done to the text, for a native speaker to read
    X_prepared.json               counts, and what they were made from
    X_audio.jsonl.gz              size and time of each file, by which a replaced one is told
    X_parts/                      while it runs: what is checked, for a killed run to go on

A recording that cannot be used is left out and named; the others are not touched by it. Training
and dev text outside the alphabet is left out; test text never is. What a published corpus looks
like is in `readers/`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icetransfer.data.download import corpus_dir
from icetransfer.data.jsonl import read_jsonl_gz, write_jsonl_gz
from icetransfer.data.leaks import refuse_leaks
from icetransfer.data.readers.common_voice import read_common_voice
from icetransfer.data.readers.cuts import read_cuts
from icetransfer.data.readers.fleurs import read_fleurs
from icetransfer.data.readers.folder import read_folder
from icetransfer.data.readers.json_lines import common_folder, read_json_lines
from icetransfer.data.readers.mls import read_mls
from icetransfer.data.readers.voxpopuli import read_voxpopuli
from icetransfer.data.recordings import DOUBT, OUTSIDE, Limits, check
from icetransfer.data.text.changes import TextChanges
from icetransfer.data.text.normalizer import Normalizer, rules_file
from icetransfer.data.utterances import SPLITS, Rejection, Utterance
from icetransfer.experiment import Experiment, log, run_stage
from icetransfer.settings import corpora as kinds
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json

FORMAT = 2  # of the manifests; what older ones hold is made again
PART = 1000  # recordings that are checked together
_SHOWN = 3  # rejections that an error names
_LETTERS_SHOWN = 20

#: The files that decide what is in a corpus, below its folder.
_TABLES: Mapping[str, tuple[str, ...]] = {
    "synthetic": tuple(f"{split}_supervisions.jsonl.gz" for split in SPLITS),
    "folder": ("transcripts.tsv",),
    "fleurs": ("*.tsv", "*/*.tsv"),
    "mls": ("*/transcripts.txt", "*/*/transcripts.txt"),
    "common_voice": ("*.tsv", "*/*.tsv", "*/*/*.tsv"),
    "voxpopuli": ("asr_*.tsv", "*/asr_*.tsv"),
}


@dataclass(frozen=True)
class Source:
    """A corpus, and how it is to be read."""

    name: str
    corpus: kinds.AnyCorpus
    folder: Path  # where it lies, or, of manifests, where audio goes that is no file
    language: str
    limits: Limits


def read_utterances(source: Source) -> Iterator[Utterance | Rejection]:
    """Reads the utterances that the config uses, test first where the corpus has splits.

    Raises:
        ValueError: The corpus is not there, or lacks a table.
    """
    for utterance in _read_all(source):
        if isinstance(utterance, Rejection) or kinds.has_split(source.corpus, utterance.split):
            yield utterance


def _read_all(source: Source) -> Iterator[Utterance | Rejection]:
    corpus, folder, language = source.corpus, source.folder, source.language
    splits = [split for split in SPLITS if kinds.has_split(corpus, split)]
    if isinstance(corpus, kinds.FolderCorpus):
        return read_folder(folder, corpus.holdout_every, corpus.holdout_by == "speaker")
    if isinstance(corpus, kinds.Fleurs):
        return read_fleurs(folder, language, splits)
    if isinstance(corpus, kinds.MultilingualLibriSpeech):
        return read_mls(folder, language, corpus.codec, splits)
    if isinstance(corpus, kinds.CommonVoice):
        return read_common_voice(folder, language, corpus.train)
    if isinstance(corpus, kinds.VoxPopuli):
        return read_voxpopuli(folder, language, splits)
    if isinstance(corpus, kinds.ManifestCorpus):
        manifests = [(path, split) for split in reversed(splits) for path in getattr(corpus, split)]
        if isinstance(corpus, kinds.Cuts):
            audio = folder / "audio"
            read = (read_cuts(path, split, audio) for path, split in manifests)
        else:
            root = common_folder([path for path, _ in manifests])
            read = (read_json_lines(path, split, root) for path, split in manifests)
        return itertools.chain.from_iterable(read)
    raise TypeError(f"{source.name}: a corpus of kind {corpus.kind} has no utterances to read")


def without_duplicates(
    utterances: Iterable[Utterance | Rejection],
) -> Iterator[Utterance | Rejection]:
    """Yields each id once: the first utterance of a name, a rejection for the others.

    Test comes first, so a recording that is in training too stays in the test set.
    """
    seen: set[str] = set()
    for utterance in utterances:
        if isinstance(utterance, Utterance):
            if utterance.id in seen:
                advice = f"keep one line of {utterance.id}, or give the other file another name"
                yield Rejection(utterance.id, str(utterance.path), "duplicate id", advice)
                continue
            seen.add(utterance.id)
        yield utterance


def prepare_manifests(source: Source, manifests_dir: Path, jobs: int = 1) -> None:
    """Writes a corpus's manifests, unless they are there and were made from the same.

    Args:
        source: The corpus.
        manifests_dir: Where to write.
        jobs: Processes that check recordings.

    Raises:
        ValueError: The corpus is not there, or nothing in it can be used.
    """
    name = source.name
    made_from = _made_from(source)
    record = manifests_dir / f"{name}_prepared.json"
    targets = {split: manifests_dir / f"{name}_{split}.jsonl.gz" for split in SPLITS}
    seen = manifests_dir / f"{name}_audio.jsonl.gz"
    parts = manifests_dir / f"{name}_parts"
    if record.is_file() and all(target.is_file() for target in targets.values()):
        before = read_json(record, ["made_from"])["made_from"]
        changed = sorted(key for key in before | made_from if before.get(key) != made_from.get(key))
        if not changed and (replaced := _replaced(seen)):
            changed = [f"recordings, such as {replaced}"]
        if not changed:
            log.info("skip: manifests of %s are complete", name)
            shutil.rmtree(parts, ignore_errors=True)
            return
        log.info("%s: changed since its manifests: %s; checking again", name, ", ".join(changed))
        shutil.rmtree(parts, ignore_errors=True)
        record.unlink()
    if isinstance(source.corpus, kinds.SyntheticCorpus):
        for split, target in targets.items():
            write_jsonl_gz(target, _synthetic_cuts(source.folder, split))
        rejections: list[Rejection] = []
    else:
        rejections = _check_all(source, made_from, parts, jobs)
        for split, target in targets.items():
            write_jsonl_gz(target, _checked(parts, split))
        _write_text_report(source, parts, rejections, manifests_dir / f"{name}_text.md")
    counts = {split: _counts(target) for split, target in targets.items()}
    _write_rejections(name, rejections, manifests_dir / f"{name}_rejected.tsv")
    empty = [split for split in SPLITS if not counts[split]["recordings"]]
    if problem := _what_is_empty(source, empty, rejections):
        shutil.rmtree(parts, ignore_errors=True)  # what is corrected now is to be checked again
        raise ValueError(f"{name}: {problem}")
    for split, count in counts.items():
        log.info("%s %s: %d recordings, %.1f min, %d speakers", name, split, *count.values())
    write_jsonl_gz(seen, _audio_files(targets.values()))
    summary = {"made_from": made_from, "splits": counts, "rejected": len(rejections)}
    atomic.write_text(record, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(parts, ignore_errors=True)


def _audio_files(manifests: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Size and time of each file of audio in some manifests, by which a replaced one is told."""
    last = ""  # of the parts of one file, which follow each other, it is enough to note one
    for cut in itertools.chain.from_iterable(map(read_jsonl_gz, manifests)):
        path = cut["recording"]["sources"][0]["source"]
        if path != last and Path(path).is_file():
            last, found = path, Path(path).stat()
            yield {"path": path, "size": found.st_size, "mtime": found.st_mtime_ns}


def _replaced(seen: Path) -> str:
    """The first file of audio that is another than when it was checked; "" for none."""
    if not seen.is_file():  # of an earlier version
        return ""
    for row in read_jsonl_gz(seen):
        try:
            found = Path(row["path"]).stat()
        except OSError:
            return str(row["path"])
        if (found.st_size, found.st_mtime_ns) != (row["size"], row["mtime"]):
            return str(row["path"])
    return ""


def _what_is_empty(source: Source, empty: list[str], rejections: list[Rejection]) -> str:
    """What to say of the splits without a recording; "" where each may be empty."""
    shown = [f"{r.path}: {r.reason} ({r.advice})" for r in rejections[:_SHOWN]]
    first = "; the first: " + "; ".join(shown) if shown else f": {_where(source)} is empty"
    if len(empty) == len(SPLITS):
        return f"none of its {len(rejections)} recordings can be used{first}"
    missing = [split for split in empty if kinds.must_hold(source.corpus, split)]
    if not missing:
        return ""
    left_out = f"; {len(rejections)} of the corpus are left out{first}" if shown else ""
    if isinstance(source.corpus, kinds.FolderCorpus):
        advice = "add recordings, or set holdout_every to less, or to 0 to hold out none"
    else:
        advice = "add recordings, or take the split out of data.corpora"
    return f"no recording of it is for {' or '.join(missing)}{left_out}. To go on, {advice}"


def _where(source: Source) -> str:
    """Where a corpus comes from: its manifests, or its folder."""
    corpus = source.corpus
    if isinstance(corpus, kinds.ManifestCorpus):
        return ", ".join(str(path) for split in SPLITS for path in getattr(corpus, split))
    return str(source.folder)


def _made_from(source: Source) -> dict[str, Any]:
    """What decides a corpus's manifests, the audio left aside."""
    corpus = source.corpus
    if isinstance(corpus, kinds.ManifestCorpus):
        given = [path for split in SPLITS for path in getattr(corpus, split)]
        tables = [t for p in given for t in (sorted(p.glob("cuts.*")) if p.is_dir() else [p])]
    else:
        tables = [
            t for pattern in _TABLES[corpus.kind] for t in sorted(source.folder.glob(pattern))
        ]
    digest = hashlib.sha256()
    for table in tables:
        if table.is_file():
            digest.update(table.read_bytes())
    normalizer = Normalizer(source.language)
    made_from = {"folder": str(source.folder), "sha256": digest.hexdigest(), "format": FORMAT}
    if isinstance(corpus, kinds.SyntheticCorpus):
        return made_from | {"text": normalizer.words_version, "language": source.language}
    return (
        made_from
        | {"text": normalizer.version, "language": source.language}
        | corpus.model_dump(mode="json", exclude={"path", "language"})
        | asdict(source.limits)
    )


def _check_all(
    source: Source, made_from: Mapping[str, Any], parts: Path, jobs: int
) -> list[Rejection]:
    """Checks every recording, part by part; returns what was left out, in the corpus's order."""
    key = parts / "made_from.json"
    if not key.is_file() or read_json(key) != made_from:
        shutil.rmtree(parts, ignore_errors=True)  # of another corpus or normaliser
        atomic.write_text(key, json.dumps(made_from, ensure_ascii=False))
    utterances = without_duplicates(read_utterances(source))
    waiting: deque[Future[None]] = deque()
    done = 0
    with ProcessPoolExecutor(jobs) as pool:
        for number in itertools.count():
            part = list(itertools.islice(utterances, PART))
            if not part:
                break
            target = parts / f"{number:06d}.jsonl.gz"
            done += len(part)
            if not target.is_file():
                waiting.append(
                    pool.submit(check_part, part, source.language, source.limits, target)
                )
            if len(waiting) > 4 * jobs:
                waiting.popleft().result()
                log.info("%s: some %d recordings checked", source.name, done - len(waiting) * PART)
        for future in waiting:
            future.result()
    return [Rejection(**row["rejected"]) for row in _rows(parts) if "rejected" in row]


def check_part(
    part: list[Utterance | Rejection], language: str, limits: Limits, target: Path
) -> None:
    """Writes the cut of each utterance, or why it has none, a JSON object a line."""
    normalizer = Normalizer(language)
    changes = TextChanges()
    rows: list[dict[str, Any]] = []
    for utterance in part:
        if isinstance(utterance, Rejection):
            rows.append({"rejected": asdict(utterance)})
            continue
        changes.add(utterance.text, normalizer.read(utterance.text), normalizer)
        found = check(utterance, normalizer, limits)
        if isinstance(found, Rejection):
            rows.append({"rejected": asdict(found)})
            if DOUBT in found.reason or OUTSIDE in found.reason:
                changes.leave_out(_kind(found), utterance.text)
        else:
            rows.append({"split": utterance.split, "cut": found})
    rows.append({"text": changes.to_json()})
    write_jsonl_gz(target, rows)


def _rows(parts: Path) -> Iterator[dict[str, Any]]:
    for part in sorted(parts.glob("*.jsonl.gz")):
        if not part.name.startswith("."):  # of a killed run
            yield from read_jsonl_gz(part)


def _checked(parts: Path, split: str) -> Iterator[dict[str, Any]]:
    return (row["cut"] for row in _rows(parts) if row.get("split") == split)


def _synthetic_cuts(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The cuts of a corpus that `synthetic.synthesise` made.

    Raises:
        ValueError: It is not there, or not finished.
    """
    manifests = [folder / f"{split}_{kind}.jsonl.gz" for kind in ("recordings", "supervisions")]
    for manifest in manifests:
        if not manifest.is_file():
            raise ValueError(f"{manifest} does not exist: run stage 0, which makes it")
    for recording, supervision in zip(*map(read_jsonl_gz, manifests), strict=True):
        yield {
            "id": recording["id"],
            "start": 0.0,
            "duration": recording["duration"],
            "channel": 0,
            "supervisions": [supervision],
            "recording": recording,
            "type": "MonoCut",
        }


def _counts(manifest: Path) -> dict[str, float]:
    recordings, seconds, speakers = 0, 0.0, set()
    for cut in read_jsonl_gz(manifest):
        recordings += 1
        seconds += cut["duration"]
        speakers.add(cut["supervisions"][0]["speaker"])
    return {
        "recordings": recordings,
        "minutes": round(seconds / 60, 2),
        "speakers": len(speakers),
    }


def _write_rejections(name: str, rejections: list[Rejection], path: Path) -> None:
    """Writes what was left out, and says how much and why."""
    rows = [("id", "path", "reason", "advice")]
    rows += [(r.id, r.path, r.reason, r.advice) for r in rejections]
    lines = ("\t".join(" ".join(cell.split()) for cell in row) for row in rows)
    atomic.write_text(path, "".join(line + "\n" for line in lines))
    for reason, count in Counter(_kind(rejection) for rejection in rejections).most_common():
        log.warning("%s: %d left out: %s", name, count, reason)
    letters = Counter(x for r in rejections for x in r.reason.partition(OUTSIDE)[2].split())
    if letters:
        costs = ", ".join(
            f"{letter} {count}" for letter, count in letters.most_common(_LETTERS_SHOWN)
        )
        log.warning("%s: these characters cost so many of them: %s", name, costs)
    if rejections:
        log.warning("%s: each is named in %s", name, path)


def _write_text_report(
    source: Source, parts: Path, rejections: list[Rejection], path: Path
) -> None:
    """Writes what was done to a corpus's text, and says where a native speaker can read it."""
    changes = TextChanges()
    for row in _rows(parts):
        if "text" in row:
            changes.update(TextChanges.from_json(row["text"]))
    for rejection in rejections:
        if DOUBT not in rejection.reason and OUTSIDE not in rejection.reason:
            changes.leave_out(_kind(rejection), "")
    normalizer = Normalizer(source.language)
    rules = "/".join(rules_file(source.language).parts[-3:])
    atomic.write_text(path, changes.report(source.name, normalizer, rules))
    log.info("%s: what was done to its text -> %s", source.name, path)


def _kind(rejection: Rejection) -> str:
    """Returns a reason without its particulars, to count by."""
    doubt = rejection.reason.partition(DOUBT)[2]
    if doubt:
        return f"not sure what was said: {doubt.partition(':')[0]}"
    return re.sub(r"[:(].*|^\d+ ", "", rejection.reason).strip()


def prepare(experiment: Experiment) -> None:
    """Writes the manifests of every corpus of the config."""
    data = experiment.config.data
    for name, corpus in data.corpora.items():
        source = Source(
            name,
            corpus,
            corpus_dir(data, name),
            corpus.language or experiment.config.language,
            Limits(data.min_seconds, data.max_seconds),
        )
        prepare_manifests(source, experiment.manifests_dir, data.features.jobs)
    refuse_leaks(experiment.manifests_dir, list(data.corpora))


if __name__ == "__main__":
    run_stage(__doc__, prepare)
