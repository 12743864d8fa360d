"""What comes twice: recordings, sentences; and what training shares with what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icetransfer.data.survey.columns import NOBODY, Manifest, Rows, Survey

#: What an utterance may share with one that is held out: what it is, and its column.
LEAKS = {
    "recording": "contents",
    "place": "places",
    "id": "ids",
    "sentence": "texts",
    "speaker": "speakers",
}
_PAIRS = 5  # shown of each leak


@dataclass(frozen=True)
class Groups:
    """Utterances that have something in common.

    Attributes:
        groups: How many there are, of two utterances or more.
        more: Utterances over one a group.
        largest: The rows of some groups, the largest first.
    """

    groups: int
    more: int
    largest: Sequence[Rows]


def groups_of(values: Rows, rows: Rows, most: int) -> Groups:
    """Finds the rows with equal values.

    Args:
        values: A column.
        rows: The rows that are compared.
        most: Groups to return.
    """
    _, inverse, counts = np.unique(values[rows], return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    order = np.argsort(inverse, kind="stable")
    begins = np.concatenate([[0], np.cumsum(counts)])[several]
    firsts = rows[order[begins]]
    shown = np.lexsort([firsts, -counts[several]])[:most]
    largest = [rows[order[begins[i] : begins[i] + counts[several[i]]]] for i in shown]
    return Groups(len(several), int(np.sum(counts[several] - 1)), largest)


@dataclass(frozen=True)
class Copies:
    """Recordings that are there twice.

    Attributes:
        all: Of the same audio.
        differing: The rows of those whose copies have another text: one of the two is wrong.
    """

    all: Groups
    differing: Rows


def copies(survey: Survey, most: int) -> Copies:
    """Finds recordings of the same samples, wherever they are."""
    rows = np.arange(len(survey))
    everything = groups_of(survey.contents, rows, most)
    if not everything.groups:
        return Copies(everything, np.zeros(0, np.int64))
    _, inverse, counts = np.unique(survey.contents, return_inverse=True, return_counts=True)
    twice = np.flatnonzero(counts[inverse] > 1)
    order = twice[np.argsort(inverse[twice], kind="stable")]
    same = inverse[order][1:] == inverse[order][:-1]
    other_text = same & (survey.texts[order][1:] != survey.texts[order][:-1])
    wrong = np.unique(inverse[order][1:][other_text])
    return Copies(everything, np.sort(order[np.isin(inverse[order], wrong)]))


@dataclass(frozen=True)
class Leak:
    """What the training of all corpora shares with one dev or test set.

    Attributes:
        held_out: The set.
        kind: Of `LEAKS`.
        train: Training utterances that share it.
        of_held_out: Utterances of the set that do.
        pairs: Rows of some, in training and in the set.
    """

    held_out: Manifest
    kind: str
    train: int
    of_held_out: int
    pairs: Sequence[tuple[int, int]]

    @property
    def share(self) -> float:
        """Of the set, in percent."""
        return 100 * self.of_held_out / (self.held_out.last - self.held_out.first)


def leaks(survey: Survey) -> list[Leak]:
    """Compares training with every dev and test set; a line for each kind that is shared."""
    train = survey.rows_of("train")
    found = []
    for manifest in survey.manifests:
        if manifest.split == "train" or manifest.first == manifest.last:
            continue
        own = np.arange(manifest.first, manifest.last)
        for kind, column in LEAKS.items():
            values = getattr(survey, column)
            learned, held = values[train], values[own]
            in_train = np.flatnonzero(np.isin(learned, held) & (learned != NOBODY))
            if kind == "place":  # those of the same samples are told as recordings
                same = np.isin(survey.contents[train[in_train]], survey.contents[own])
                in_train = in_train[~same]
            if not len(in_train):
                continue
            in_set = np.isin(held, learned[in_train])
            firsts = in_train[:_PAIRS]
            pairs = [
                (int(train[i]), int(own[np.flatnonzero(held == learned[i])[0]])) for i in firsts
            ]
            found.append(Leak(manifest, kind, len(in_train), int(in_set.sum()), pairs))
    return found
