"""Which utterances are too fast or too slow for their text: a robust z-score of the speaking rate.

A text that belongs to another recording is mostly too long or too short for this one.  Its rate, in
characters a second, is compared with those of the utterances of its corpus that have about as much
text, because a short utterance has a larger share of pauses and varies more.  The score is

    z = (log rate - median) / (1.4826 * median absolute deviation)

which a normal distribution would leave within 4 but for one in 16,000, and which wrong utterances
do not move as long as they are fewer than half.

Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993), the modified z-score.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation

from icetransfer.data.survey.columns import Rows, Survey

LIMIT = 4.0
_ALIKE = 100  # utterances that are compared with each other, at least
_MOST_GROUPS = 50  # of a corpus
_LEAST_SCALE = 0.03  # 3 %: of speech from a machine the deviation is next to nothing


def scores(survey: Survey) -> NDArray[np.float64]:
    """The z-score of every utterance: above zero it is faster than those like it."""
    found = np.zeros(len(survey))
    rates = np.log(np.maximum(survey.rates(), 1e-3))
    corpora = dict.fromkeys(manifest.corpus for manifest in survey.manifests)
    for corpus in corpora:
        own = [np.arange(m.first, m.last) for m in survey.manifests if m.corpus == corpus]
        for rows in _alike(np.concatenate(own), survey.characters):
            scale = median_abs_deviation(rates[rows], scale="normal")
            found[rows] = (rates[rows] - np.median(rates[rows])) / max(scale, _LEAST_SCALE)
    return found


def _alike(rows: Rows, characters: NDArray[np.uint32]) -> list[Rows]:
    """Divides rows into groups of as much text each, of at least 100 utterances if there are."""
    if not len(rows):
        return []
    by_length = rows[np.argsort(characters[rows], kind="stable")]
    groups = min(max(1, len(rows) // _ALIKE), _MOST_GROUPS)
    return np.array_split(by_length, groups)
