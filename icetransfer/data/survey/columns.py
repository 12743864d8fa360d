"""Every utterance of a recipe's manifests in columns: 50 bytes each, where objects are thousands.

The manifests are read as a stream, once for the columns and once more for the few utterances that
are to be shown.  An utterance is known by its row, which counts over all manifests in their order.

What is only compared (ids, texts, speakers, audio) stands as Python's hash of 64 bits: among five
million texts, the chance that any two are taken for one is one in a million.
"""

from __future__ import annotations

import gzip
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import validate
from lhotse.serialization import deserialize_item
from numpy.typing import NDArray

from icetransfer.data.jsonl import read_jsonl_gz
from icetransfer.data.leaks import identities
from icetransfer.data.survey.letters import Letters
from icetransfer.data.text.normalizer import Normalizer
from icetransfer.data.utterances import SPLITS, UNKNOWN_SPEAKER, speaker_of, text_of

NOBODY = 0  # in place of the hash of an unknown speaker
#: lhotse's validator sees every cut of a manifest up to here, then one in ten: it takes three times
#: as long as all the rest, and what it finds is wrong with the program that wrote the manifest.
_VALIDATED = 20_000
_THEN_EVERY = 10
_TICK = 1000  # utterances between two calls of `tick`

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """One manifest of stage 1, and the rows that its utterances have.

    Attributes:
        corpus: The corpus's name.
        split: "train", "dev" or "test".
        language: Of its text.
        path: The file.
        first: Its first row.
        last: The row after its last.
    """

    corpus: str
    split: str
    language: str
    path: Path
    first: int
    last: int

    @property
    def name(self) -> str:
        """As it is called in tables."""
        return f"{self.corpus} {self.split}"

    @property
    def rows(self) -> slice:
        """Its part of every column."""
        return slice(self.first, self.last)


@dataclass
class Problems:
    """What lhotse's validator says of a manifest.

    Attributes:
        checked: Cuts that it has seen.
        found: Those that it does not accept.
        first: What it said of the first of them.
    """

    checked: int = 0
    found: int = 0
    first: str = ""


@dataclass
class Survey:
    """All utterances of a recipe.

    Attributes:
        manifests: In the order of their rows.
        letters: What each manifest's text is written in.
        problems: What lhotse says of each manifest.
        seconds: Length of each utterance.
        characters: How many its normalised text has, without spaces.
        ids: Hash of each one's id.
        texts: Of its normalised text.
        speakers: Of its speaker, `NOBODY` if not known; speakers of two corpora are never the same.
        places: Of where its audio lies.
        contents: Of its samples; of its place where stage 1 has no digest of them.
    """

    manifests: list[Manifest]
    letters: list[Letters]
    problems: list[Problems]
    seconds: NDArray[np.float32]
    characters: NDArray[np.uint32]
    ids: Rows
    texts: Rows
    speakers: Rows
    places: Rows
    contents: Rows

    def __len__(self) -> int:
        return len(self.seconds)

    def manifest_of(self, row: int) -> Manifest:
        """Where an utterance stands."""
        return next(found for found in self.manifests if found.first <= row < found.last)

    def rows_of(self, *splits: str) -> Rows:
        """The rows of all manifests of these splits."""
        parts = [np.arange(m.first, m.last) for m in self.manifests if m.split in splits]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def rates(self) -> NDArray[np.float64]:
        """Characters a second of every utterance."""
        return self.characters / np.maximum(self.seconds, 1e-3).astype(np.float64)


@dataclass
class _Columns:
    """The columns of `Survey` while they grow."""

    seconds: array[float] = field(default_factory=lambda: array("f"))
    characters: array[int] = field(default_factory=lambda: array("I"))
    hashes: dict[str, array[int]] = field(
        default_factory=lambda: {
            name: array("q") for name in ("ids", "texts", "speakers", "places", "contents")
        }
    )

    def add(self, corpus: str, cut: Mapping[str, Any], text: str) -> None:
        """Adds a cut."""
        self.seconds.append(cut["duration"])
        self.characters.append(len(text) - text.count(" "))
        who = speaker_of(cut)
        place, *content = map(hash, identities(cut))
        add = self.hashes
        add["ids"].append(hash(cut["id"]))
        add["texts"].append(hash(text))
        add["speakers"].append(NOBODY if who == UNKNOWN_SPEAKER else hash((corpus, who)))
        add["places"].append(place)
        add["contents"].append(content[0] if content else place)


def survey(
    folder: Path, languages: Mapping[str, str], tick: Callable[[str, int], None] = lambda *_: None
) -> Survey:
    """Reads all manifests of a recipe once.

    Args:
        folder: The manifests'.
        languages: The language of each corpus.
        tick: Is told, now and then, the manifest that is read and how many utterances are done.

    Raises:
        ValueError: A manifest does not exist or is damaged, or all are empty.
    """
    columns = _Columns()
    manifests, letters, problems = [], [], []
    for corpus, language in languages.items():
        normalizer = Normalizer(language)
        for split in SPLITS:
            path = folder / f"{corpus}_{split}.jsonl.gz"
            first, own, wrong = len(columns.seconds), Letters(normalizer.alphabet), Problems()
            for number, cut in enumerate(read_jsonl_gz(path)):
                text = text_of(cut)
                columns.add(corpus, cut, text)
                own.add(cut["id"], text)
                if number < _VALIDATED or number % _THEN_EVERY == 0:
                    _validate(cut, wrong)
                if number % _TICK == 0:
                    tick(f"{corpus} {split}", first + number)
            manifests.append(Manifest(corpus, split, language, path, first, len(columns.seconds)))
            letters.append(own)
            problems.append(wrong)
    if not columns.seconds:
        raise ValueError(f"{folder}: the manifests hold no utterance; see stage 1's log for why")
    return Survey(
        manifests,
        letters,
        problems,
        np.frombuffer(columns.seconds, np.float32),
        np.frombuffer(columns.characters, np.uint32),
        **{name: np.frombuffer(found, np.int64) for name, found in columns.hashes.items()},
    )


def _validate(cut: Mapping[str, Any], problems: Problems) -> None:
    """Lets lhotse look at a cut as it stands in a manifest."""
    problems.checked += 1
    try:
        validate(deserialize_item(dict(cut)))
    except Exception as error:  # assertions, and whatever a missing key raises
        problems.found += 1
        problems.first = problems.first or f"{cut['id']}: {' '.join(str(error).split())}"


def pick(survey: Survey, rows: Collection[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the cuts of some rows; the lines of others are passed over unparsed.

    Args:
        survey: Of the same manifests.
        rows: Which.

    Yields:
        Row and cut, in the order of the rows.
    """
    wanted = np.unique(np.asarray([*rows], np.int64))
    for manifest in survey.manifests:
        own = wanted[(wanted >= manifest.first) & (wanted < manifest.last)] - manifest.first
        if not len(own):
            continue
        asked = iter(own.tolist())
        next_one = next(asked)
        with gzip.open(manifest.path, "rb") as lines:
            for number, line in enumerate(lines):
                if number == next_one:
                    yield manifest.first + number, json.loads(line)
                    if (next_one := next(asked, -1)) < 0:
                        break
