"""Stage 1: manifests of every corpus: what is recorded where, and its normalised text.

Writes to the manifests folder, for a corpus named X,

    X_{train,dev,test}.jsonl.gz   lhotse cuts: text normalised, as written in custom["raw_text"]
    X_rejected.tsv                id, path, reason, advice: what was left out
    X_text.md                     what was done to the text, for a native speaker to read
    X_prepared.json               counts, and what they were made from
    X_audio.jsonl.gz              size and time of each file of audio, also of those that are
                                  left out: by these, one that is replaced or repaired is told
    X_parts/                      while it runs: what is checked, for a killed run to go on

With --share several processes, on one host or more, each check a share of the parts, which the
command without it joins.

A recording that cannot be used is left out and named; the others are not touched by it. Training
and dev text outside the alphabet is left out; test text never is. What a published corpus looks
like is in `readers/`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from icetransfer.data.download import corpus_dir
from icetransfer.data.jsonl import packed_lines, read_jsonl_gz, write_jsonl_gz
from icetransfer.data.leaks import refuse_leaks, without_duplicates
from icetransfer.data.readers.common_voice import read_common_voice
from icetransfer.data.readers.cuts import read_cuts
from icetransfer.data.readers.fleurs import read_fleurs
from icetransfer.data.readers.folder import read_folder
from icetransfer.data.readers.json_lines import read_json_lines
from icetransfer.data.readers.mls import read_mls
from icetransfer.data.readers.tables import common_folder
from icetransfer.data.readers.voxpopuli import read_voxpopuli
from icetransfer.data.recordings import (
    AUDIO_DIGEST,
    DOUBT,
    OUTSIDE,
    Limits,
    check,
    checked_audio,
    find_file,
)
from icetransfer.data.text.changes import TextChanges
from icetransfer.data.text.normalizer import Normalizer, rules_file
from icetransfer.data.utterances import (
    SPLITS,
    FileState,
    Rejection,
    UnusableError,
    Utterance,
    with_audio,
)
from icetransfer.experiment import Experiment, log, run_stage_in_shares
from icetransfer.settings import corpora as kinds
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.lock import claimed
from icetransfer.stage.parent import work_for_parent
from icetransfer.stage.share import ALL, Share

FORMAT = 3  # of the manifests; what older ones hold is made again
PART = 1000  # recordings that are checked together
_SHOWN = 3  # rejections that an error names
_LETTERS_SHOWN = 20
_NOTED = 8  # files of audio that are remembered, not to note them again

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
        root = common_folder([path for path, _ in manifests])
        if isinstance(corpus, kinds.Cuts):
            audio = folder / "audio"
            read = (read_cuts(path, split, audio, root) for path, split in manifests)
        else:
            read = (read_json_lines(path, split, root) for path, split in manifests)
        return itertools.chain.from_iterable(read)
    raise TypeError(f"{source.name}: a corpus of kind {corpus.kind} has no utterances to read")


@dataclass(frozen=True)
class _Files:
    """What stage 1 writes of a corpus."""

    folder: Path
    name: str

    @property
    def targets(self) -> dict[str, Path]:
        """The manifest of each split."""
        return {split: self.folder / f"{self.name}_{split}.jsonl.gz" for split in SPLITS}

    @property
    def audio(self) -> Path:
        """Size and time of each file of audio when it was checked."""
        return self.folder / f"{self.name}_audio.jsonl.gz"

    @property
    def rejected(self) -> Path:
        """What was left out."""
        return self.folder / f"{self.name}_rejected.tsv"

    @property
    def text(self) -> Path:
        """What normalisation did, for a native speaker to read."""
        return self.folder / f"{self.name}_text.md"

    @property
    def record(self) -> Path:
        """What all was made from, written last."""
        return self.folder / f"{self.name}_prepared.json"

    @property
    def parts(self) -> Path:
        """What is checked so far, in a folder for each state of the corpus's tables."""
        return self.folder / f"{self.name}_parts"


def prepare_manifests(
    source: Source, manifests_dir: Path, jobs: int = 1, share: Share = ALL
) -> None:
    """Writes a corpus's manifests, unless they are there and were made from the same.

    Args:
        source: The corpus.
        manifests_dir: Where to write.
        jobs: Processes that check recordings.
        share: The recordings to check; if that is not all, no manifest is written.

    Raises:
        ValueError: The corpus is not there, or nothing in it can be used.
    """
    name, files = source.name, _Files(manifests_dir, source.name)
    made_from = _made_from(source)
    if _is_complete(files, made_from):
        log.info("skip: manifests of %s are complete", name)
        if share.is_all:
            shutil.rmtree(files.parts, ignore_errors=True)
        return
    if isinstance(source.corpus, kinds.SyntheticCorpus):
        if not share.is_all:
            return
        rows = _synthetic_rows(source.folder)
    else:
        parts = files.parts / _digest({**made_from, "recordings": PART})
        count = _check_parts(source, parts, jobs, share)
        if not share.is_all:
            log.info("%s: share %d of %d is checked", name, share.number, share.of)
            return
        rows = _rows(parts, count)
    files.record.unlink(missing_ok=True)  # from here on, what is there is of both
    tally = _write(rows, files)
    tally.log(name, files.rejected)
    if tally.changes.sentences:
        _write_text_report(source, tally.changes, files.text)
    empty = [split for split in SPLITS if not tally.splits[split].recordings]
    if problem := _what_is_empty(source, empty, tally):
        shutil.rmtree(files.parts, ignore_errors=True)  # what is corrected is to be checked again
        raise ValueError(f"{name}: {problem}")
    # Before the record: parts that outlived it would pass for those of audio that came later.
    shutil.rmtree(files.parts, ignore_errors=True)
    summary = {
        "made_from": made_from,
        "splits": {split: of_split.counts() for split, of_split in tally.splits.items()},
        "rejected": tally.rejected,
    }
    atomic.write_text(files.record, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _is_complete(files: _Files, made_from: Mapping[str, Any]) -> bool:
    """Whether all is there and made from what is there now; says what has changed."""
    if not all(path.is_file() for path in (files.record, *files.targets.values())):
        return False
    before = read_json(files.record, ["made_from"])["made_from"]
    changed = sorted(key for key in before | made_from if before.get(key) != made_from.get(key))
    if not changed and (replaced := _replaced(files.audio)):
        changed = [f"recordings, such as {replaced}"]
    if changed:
        what = ", ".join(changed)
        log.info("%s: changed since its manifests: %s; checking again", files.name, what)
    return not changed


def _digest(tree: Mapping[str, Any]) -> str:
    """A name for what a corpus is made from."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _replaced(seen: Path) -> str:
    """The first file of audio that is another than when it was checked; "" for none."""
    if not seen.is_file():  # of an earlier version
        return ""
    for row in read_jsonl_gz(seen):
        if FileState.of(row["path"]) != (row["path"], row["size"], row["mtime"]):
            return str(row["path"])
    return ""


def _what_is_empty(source: Source, empty: list[str], tally: _Tally) -> str:
    """What to say of the splits without a recording; "" where each may be empty."""
    shown = [f"{r.path}: {r.reason} ({r.advice})" for r in tally.first_rejected]
    first = "; the first: " + "; ".join(shown) if shown else f": {_where(source)} is empty"
    if len(empty) == len(SPLITS):
        return f"none of its {tally.rejected} recordings can be used{first}"
    missing = [split for split in empty if kinds.must_hold(source.corpus, split)]
    if not missing:
        return ""
    left_out = f"; {tally.rejected} of the corpus are left out{first}" if shown else ""
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
            with table.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    normalizer = Normalizer(source.language)
    made_from = {"folder": str(source.folder), "sha256": digest.hexdigest(), "format": FORMAT}
    made_from |= {"text rules": normalizer.checksum}
    if isinstance(corpus, kinds.SyntheticCorpus):
        return made_from | {"text": normalizer.words_version, "language": source.language}
    return (
        made_from
        | {"text": normalizer.version, "language": source.language}
        | corpus.model_dump(mode="json", exclude={"path", "language"})
        | asdict(source.limits)
    )


def _check_parts(source: Source, parts: Path, jobs: int, share: Share) -> int:
    """Checks the recordings of a share, part by part; returns how many parts there are in all."""
    utterances = without_duplicates(read_utterances(source))
    waiting: deque[Future[None]] = deque()
    count = done = 0
    with ProcessPoolExecutor(jobs, initializer=work_for_parent) as pool:
        for number, part in enumerate(_in_parts(utterances)):
            count = number + 1
            if not share.has(number):
                continue
            done += 1
            target = _part(parts, number)
            if target.is_file():
                continue
            own = list(map(with_audio, part))
            waiting.append(pool.submit(check_part, own, source.language, source.limits, target))
            if len(waiting) > 4 * jobs:
                waiting.popleft().result()
                checked = (done - len(waiting)) * PART
                log.info("%s: some %d recordings checked", source.name, checked)
        for future in waiting:
            future.result()
    return count


def _in_parts(
    utterances: Iterator[Utterance | Rejection],
) -> Iterator[Iterator[Utterance | Rejection]]:
    """Yields each part; what is not taken of it is passed over."""
    for first in utterances:
        part = itertools.chain([first], itertools.islice(utterances, PART - 1))
        yield part
        deque(part, maxlen=0)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.jsonl.gz"


def check_part(
    part: list[Utterance | Rejection], language: str, limits: Limits, target: Path
) -> None:
    """Writes the cut of each utterance, or why it has none, a JSON object a line.

    The last line says what was done to the text.  Unless another process has done it; waits for one
    that is at it.
    """
    with claimed(target):
        if target.is_file():
            return
        normalizer, changes = Normalizer(language), TextChanges()
        rows = [_checked(utterance, normalizer, limits, changes) for utterance in part]
        write_jsonl_gz(target, [*rows, {"text": changes.to_json()}])


def _checked(
    utterance: Utterance | Rejection, normalizer: Normalizer, limits: Limits, changes: TextChanges
) -> dict[str, Any]:
    """A line of a part: a cut with its split and the state of its files, or a rejection."""
    if isinstance(utterance, Rejection):
        return {"rejected": asdict(utterance)}
    reading = normalizer.read(utterance.text)
    changes.add(utterance.text, reading, normalizer)
    # Before it is read: what replaces it then is noticed.
    file = FileState.of(str(find_file(utterance.path)))
    files = (*utterance.origins, file)
    found = check(utterance, reading, normalizer, limits)
    if isinstance(found, Rejection):
        if not _is_for_its_text(found):
            return {"rejected": asdict(replace(found, files=files))}
        changes.leave_out(reason_kind(found), utterance.text)
        return {"rejected": asdict(found)}
    return {"split": utterance.split, "cut": found, "files": files}


def _rows(parts: Path, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield from read_jsonl_gz(_part(parts, number))


def _synthetic_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for split in SPLITS:
        for cut in _synthetic_cuts(folder, split):
            path = str(cut["recording"]["sources"][0]["source"])
            files = (FileState.of(path),)
            promised = cut["duration"]
            utterance = Utterance(cut["id"], Path(path), "", "", split, promised_seconds=promised)
            try:
                audio = checked_audio(utterance, Limits(0.0, math.inf))
            except UnusableError as error:
                found = Rejection(cut["id"], path, error.reason, error.advice, files)
                yield {"rejected": asdict(found)}
                continue
            cut["custom"] = {AUDIO_DIGEST: audio.digest}
            yield {"split": split, "cut": cut, "files": files}


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


@dataclass
class _Split:
    """What there is of a split."""

    recordings: int = 0
    seconds: float = 0.0
    speakers: set[str] = field(default_factory=set)

    def counts(self) -> dict[str, float]:
        """For people, and for the plan of a sweep."""
        minutes, speakers = round(self.seconds / 60, 2), len(self.speakers)
        return {"recordings": self.recordings, "minutes": minutes, "speakers": speakers}


@dataclass
class _Tally:
    """What a corpus has, and what of it was left out."""

    splits: dict[str, _Split] = field(default_factory=lambda: {split: _Split() for split in SPLITS})
    reasons: Counter[str] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)
    first_rejected: list[Rejection] = field(default_factory=list)
    changes: TextChanges = field(default_factory=TextChanges)

    @property
    def rejected(self) -> int:
        """How many were left out."""
        return self.reasons.total()

    def add(self, split: str, cut: Mapping[str, Any]) -> None:
        """Counts a cut."""
        of_split = self.splits[split]
        of_split.recordings += 1
        of_split.seconds += cut["duration"]
        of_split.speakers.add(cut["supervisions"][0]["speaker"])

    def reject(self, rejection: Rejection) -> None:
        """Counts a recording that was left out."""
        self.reasons[reason_kind(rejection)] += 1
        self.letters.update(rejection.reason.partition(OUTSIDE)[2].split())
        if not _is_for_its_text(rejection):  # whose text is an example in the counts of its part
            self.changes.leave_out(reason_kind(rejection), "")
        if len(self.first_rejected) < _SHOWN:
            self.first_rejected.append(rejection)

    def log(self, name: str, listed: Path) -> None:
        """Says what was left out and why, and what there is."""
        for reason, count in self.reasons.most_common():
            log.warning("%s: %d left out: %s", name, count, reason)
        if self.letters:
            costs = ", ".join(
                f"{letter} {count}" for letter, count in self.letters.most_common(_LETTERS_SHOWN)
            )
            log.warning("%s: these characters cost recordings: %s", name, costs)
        if self.rejected:
            log.warning("%s: each is named in %s", name, listed)
        for split, of_split in self.splits.items():
            counts = of_split.counts().values()
            log.info("%s %s: %d recordings, %.1f min, %d speakers", name, split, *counts)


def _write(rows: Iterable[Mapping[str, Any]], files: _Files) -> _Tally:
    """Writes manifests, the state of their audio and what was left out, in one pass."""
    tally = _Tally()
    # Parts of one file, or of an archive, follow each other.
    noted: deque[FileState] = deque(maxlen=_NOTED)
    with ExitStack() as stack:
        targets = files.targets.items()
        add = {split: stack.enter_context(packed_lines(target)) for split, target in targets}
        add_audio = stack.enter_context(packed_lines(files.audio))
        listed = stack.enter_context(atomic.atomic_path(files.rejected))
        rejected = stack.enter_context(listed.open("w", encoding="utf-8"))
        rejected.write("id\tpath\treason\tadvice\n")
        for row in rows:
            if "text" in row:
                tally.changes.update(TextChanges.from_json(row["text"]))
                continue
            if "rejected" in row:
                rejection = Rejection(**row["rejected"])
                written = (rejection.id, rejection.path, rejection.reason, rejection.advice)
                rejected.write("\t".join(" ".join(cell.split()) for cell in written) + "\n")
                tally.reject(rejection)
                states = rejection.files
            else:
                split, cut, states = row["split"], row["cut"], row["files"]
                add[split](cut)
                tally.add(split, cut)
            for state in (FileState(*values) for values in states):
                if state not in noted:
                    noted.append(state)
                    add_audio(state._asdict())
    return tally


def _write_text_report(source: Source, changes: TextChanges, path: Path) -> None:
    """Writes what was done to a corpus's text, and says where a native speaker can read it."""
    rules = "/".join(rules_file(source.language).parts[-3:])
    atomic.write_text(path, changes.report(source.name, Normalizer(source.language), rules))
    log.info("%s: what was done to its text -> %s", source.name, path)


def _is_for_its_text(rejection: Rejection) -> bool:
    return DOUBT in rejection.reason or OUTSIDE in rejection.reason


def reason_kind(rejection: Rejection) -> str:
    """Returns a reason without its particulars, to count by."""
    doubt = rejection.reason.partition(DOUBT)[2]
    if doubt:
        return f"not sure what was said: {doubt.partition(':')[0]}"
    return re.sub(r"[:(].*|^\d+ ", "", rejection.reason).strip()


def prepare(experiment: Experiment, share: Share = ALL) -> None:
    """Writes the manifests of every corpus of the config, or checks a share of their recordings."""
    data = experiment.config.data
    for name, corpus in data.corpora.items():
        source = Source(
            name,
            corpus,
            corpus_dir(data, name),
            corpus.language or experiment.config.language,
            Limits(data.min_seconds, data.max_seconds),
        )
        prepare_manifests(source, experiment.manifests_dir, data.features.jobs, share)
    if share.is_all:
        log.info("what is in them: python -m icetransfer.look --exp %s", experiment.dir)
        refuse_leaks(experiment.manifests_dir, list(data.corpora))


if __name__ == "__main__":
    run_stage_in_shares(__doc__, prepare)
