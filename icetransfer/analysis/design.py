"""How large a sweep must be to see a gap of a given size, from the noise of one that was run.

The hierarchical model (`hierarchy.py`) tells four sources of noise apart: languages differ, runs
differ by their seeds, test sets have few utterances, and the rest.  More seeds divide the second,
a longer test set the third, and more languages divide all of them for the mean.  A gap is seen when
a one-sided test at 5 % finds it with a probability of 90 %.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from icetransfer.analysis.hierarchy import Measured, Posterior
from icetransfer.analysis.significance import LEVEL

POWER = 0.9
SEEDS = (1, 2, 3, 5)
LONGER = (1, 2, 4)  # times the sweep's own test sets
MOST_LANGUAGES = 50


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a language's gap at one amount of data, mean over the latencies.

    Attributes:
        language: of the true gaps, over languages.
        run: of a pair of trainings with other seeds; 0 where the sweep cannot tell.
        utterances: of the test set.
        rest: what is left, over the latencies of the sweep.
    """

    language: float
    run: float
    utterances: float
    rest: float

    def of_language(self, seeds: int, longer: float) -> float:
        """The standard error of one language's gap."""
        trained = (self.run**2 + self.rest**2) / seeds
        return math.sqrt(trained + self.utterances**2 / longer)

    def of_mean(self, languages: int, seeds: int, longer: float) -> float:
        """The standard error of the mean over languages."""
        own = self.of_language(seeds, longer)
        return math.sqrt((self.language**2 + own**2) / languages)


def noise_of(posterior: Posterior, measured: Sequence[Measured]) -> Noise:
    """The noise of a sweep, each source at the model's median."""

    def median(name: str) -> float:
        return float(np.median(posterior.spread[name])) if name in posterior.spread else 0.0

    cells = defaultdict(list)
    for m in measured:
        cells[m.language, m.seed, m.point.hours].append(m.noise)
    variances = [np.mean(noises, axis=0).var() for noises in cells.values()]
    tiers = len(posterior.latency)
    return Noise(
        language=median("language"),
        run=median("run"),
        utterances=math.sqrt(float(np.mean(variances))),
        rest=median("rest") / math.sqrt(tiers),
    )


def smallest_gap(error: float) -> float:
    """The gap that is seen with a standard error."""
    return float((stats.norm.ppf(1 - LEVEL) + stats.norm.ppf(POWER)) * error)


def languages_needed(noise: Noise, gap: float, seeds: int, longer: float) -> int | None:
    """How many languages show a mean gap; None where `MOST_LANGUAGES` do not.

    Student's quantiles with n - 1 degrees of freedom, as the mean's interval has them.
    """
    for count in range(2, MOST_LANGUAGES + 1):
        bound = stats.t.ppf(1 - LEVEL, count - 1) + stats.t.ppf(POWER, count - 1)
        if bound * noise.of_mean(count, seeds, longer) <= gap:
            return count
    return None
