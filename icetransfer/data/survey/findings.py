"""What a survey finds: who is to be listened to first, what is there twice, what leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation

from icetransfer.data.survey import overlaps, pace
from icetransfer.data.survey.columns import Rows, Survey, pick
from icetransfer.data.survey.letters import LeftOut, Stranger, strangers, unseen
from icetransfer.data.utterances import speaker_of, text_of

WORST = 20  # utterances to listen to
LONGEST = 10  # utterances of each list
LEAST_CER = 50.0  # percent: with fewer errors, the text is hardly another one
_CER_DEVIATIONS = 3.0  # above the median: of a weak model, CERs are far apart anyway
_MOST_SPEAKERS = 10

Cers = NDArray[np.float32]  # in percent, by row; not a number where there is none


@dataclass(frozen=True)
class Utterance:
    """An utterance that is shown, or listed.

    Attributes:
        row: Of the survey.
        where: Its corpus and split.
        cut: As it stands in the manifest.
        seconds: How long it is.
        rate: Characters a second.
        z: Its speaking rate, see `pace`.
        cer: Of the model's words against its text, in percent; None if they are not known.
        heard: The model's words.
        reasons: Why it is suspect, if it is.
    """

    row: int
    where: str
    cut: dict[str, Any]
    seconds: float
    rate: float
    z: float
    cer: float | None
    heard: str
    reasons: list[str]

    @property
    def id(self) -> str:
        """Its name in the corpus."""
        return str(self.cut["id"])

    @property
    def text(self) -> str:
        """Normalised."""
        return text_of(self.cut)

    @property
    def speaker(self) -> str:
        """Who speaks."""
        return speaker_of(self.cut)

    @property
    def path(self) -> str:
        """Its audio file."""
        return str(self.cut["recording"]["sources"][0]["source"])


@dataclass(frozen=True)
class Findings:
    """Everything that is said about a recipe's data.

    Attributes:
        survey: The utterances.
        z: Their speaking rates, see `pace`.
        cers: Of training utterances that a model has recognised.
        cer_limit: In percent; from here on an utterance is suspect.
        fast: Rows whose text is too long for their audio, the worst first.
        slow: Rows whose text is too short.
        misheard: Rows in which the model heard something else.
        worst: The rows to listen to.
        longest: The longest of all.
        fastest: Those with the most characters a second.
        speakers: A row of each of the speakers with most speech.
        copies: Recordings that are there twice.
        sentences: Training utterances of the same text.
        retakes: Training utterances of the same text by the same speaker.
        leaks: What training shares with dev and test.
        strangers: Characters that are rare or outside the alphabet.
        unseen: Letters of the alphabet that no training text has.
        left_out: What stage 1 has left out.
    """

    survey: Survey
    z: NDArray[np.float64]
    cers: Cers
    cer_limit: float
    fast: Rows
    slow: Rows
    misheard: Rows
    worst: Rows
    longest: Rows
    fastest: Rows
    speakers: Rows
    copies: overlaps.Copies
    sentences: overlaps.Groups
    retakes: overlaps.Groups
    leaks: list[overlaps.Leak]
    strangers: list[Stranger]
    unseen: list[str]
    left_out: LeftOut

    @property
    def recognised(self) -> int:
        """Utterances that a model has recognised."""
        return int(np.count_nonzero(~np.isnan(self.cers)))

    @property
    def suspects(self) -> Rows:
        """All rows that are likely wrong, in their order."""
        return np.unique(
            np.concatenate([self.fast, self.slow, self.misheard, self.copies.differing])
        )

    @property
    def shown(self) -> Rows:
        """All rows of which the page shows something."""
        pairs = [row for leak in self.leaks for pair in leak.pairs for row in pair]
        groups = (self.copies.all, self.sentences, self.retakes)
        twice = [group[:2] for found in groups for group in found.largest]
        lists = (self.worst, self.longest, self.fastest, self.speakers, np.asarray(pairs, int))
        return np.unique(np.concatenate([*lists, *twice]).astype(np.int64))

    def seconds_by_speaker(self) -> tuple[Rows, NDArray[np.float64]]:
        """A row of each known speaker in training, and their seconds, most first."""
        return _by_speaker(self.survey)

    def utterances(
        self, rows: Rows, heard: Callable[[int], str] = lambda row: ""
    ) -> Iterator[Utterance]:
        """Reads some utterances from the manifests, in their order.

        Args:
            rows: Which.
            heard: The model's words in a row.
        """
        marks = {
            "text too long for the audio": set(self.fast.tolist()),
            "text too short for the audio": set(self.slow.tolist()),
            "the model heard something else": set(self.misheard.tolist()),
            "same audio as one with another text": set(self.copies.differing.tolist()),
        }
        rates = self.survey.rates()
        for row, cut in pick(self.survey, rows):
            cer = float(self.cers[row])
            yield Utterance(
                row,
                self.survey.manifest_of(row).name,
                cut,
                float(self.survey.seconds[row]),
                float(rates[row]),
                float(self.z[row]),
                None if np.isnan(cer) else cer,
                heard(row),
                [reason for reason, marked in marks.items() if row in marked],
            )


def look(survey: Survey, left_out: LeftOut, cers: Cers | None = None) -> Findings:
    """Looks at a recipe's utterances.

    Args:
        survey: The utterances.
        left_out: What stage 1 has left out.
        cers: Of those that a model has recognised.
    """
    cers = np.full(len(survey), np.nan, np.float32) if cers is None else cers
    z, train = pace.scores(survey), survey.rows_of("train")
    limit = _cer_limit(cers)
    badness = np.fmax(np.abs(z) / pace.LIMIT, np.nan_to_num(cers / limit))
    worst_first = np.argsort(-badness, kind="stable")
    fast = worst_first[z[worst_first] > pace.LIMIT]
    slow = worst_first[z[worst_first] < -pace.LIMIT]
    in_train = [own for own, m in zip(survey.letters, survey.manifests, strict=True)
                if m.split == "train"]  # fmt: skip
    held_out = [own for own, m in zip(survey.letters, survey.manifests, strict=True)
                if m.split != "train"]  # fmt: skip
    known = train[survey.speakers[train] != 0]
    by_speaker = survey.speakers ^ (survey.texts * 31)
    return Findings(
        survey,
        z,
        cers,
        limit,
        fast,
        slow,
        worst_first[np.nan_to_num(cers[worst_first]) >= limit],
        worst_first[:WORST],
        np.argsort(-survey.seconds, kind="stable")[:LONGEST],
        np.argsort(-survey.rates(), kind="stable")[:LONGEST],
        _by_speaker(survey)[0][:_MOST_SPEAKERS],
        overlaps.copies(survey, LONGEST),
        overlaps.groups_of(survey.texts, train, LONGEST),
        overlaps.groups_of(by_speaker, known, LONGEST),
        overlaps.leaks(survey),
        strangers(in_train, held_out, left_out),
        unseen(in_train),
        left_out,
    )


def _cer_limit(cers: Cers) -> float:
    """What CER is suspect: far from the others', and at least every second character."""
    known = cers[~np.isnan(cers)]
    if not len(known):
        return LEAST_CER
    far = np.median(known) + _CER_DEVIATIONS * median_abs_deviation(known, scale="normal")
    return max(LEAST_CER, float(far))


def _by_speaker(survey: Survey) -> tuple[Rows, NDArray[np.float64]]:
    train = survey.rows_of("train")
    known = train[survey.speakers[train] != 0]
    _, firsts, inverse = np.unique(survey.speakers[known], return_index=True, return_inverse=True)
    seconds = np.bincount(inverse, survey.seconds[known], len(firsts)).astype(np.float64)
    order = np.lexsort([known[firsts], -seconds])
    return known[firsts[order]], seconds[order]
