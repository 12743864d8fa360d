"""Made-up sweeps drawn from known laws: intervals hold the truth, and tests err, as they say.

A sweep is made as a real one is: every utterance has a difficulty, every cell a WER that the law
sets, and the errors are binomial; so gaps carry the noise of test sets of 600 utterances, and at
the larger amounts many are below zero.  Every figure is over 200 sweeps, whose own noise is 1.5
points of coverage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from icetransfer import gap
from icetransfer.analysis import laws
from icetransfer.analysis.bootstrap import Resampling, interval
from icetransfer.analysis.significance import Utterances
from icetransfer.analysis.sweep_results import Point, Result, Row, collect, collect_gaps

UTTERANCES, WORDS, SWEEPS = 600, 20, 200
HOURS = (1.0, 2.5, 5.0, 10.0, 25.0)
IDS = tuple(map(str, range(UTTERANCES)))


@dataclass(frozen=True)
class Truth:
    """What a sweep is drawn from; WERs in points."""

    a: float = 4.21
    b: float = 0.95
    languages: int = 3
    differ: float = 0.0  # standard deviation of a over languages, relative
    hours: Sequence[float] = HOURS
    tiers: Sequence[int] = (160,)
    tier_effect: float = 0.0  # of the gap, from a tier to the next
    quantised: float | None = None  # change of int8
    quantised_ml: float = 0.0  # that of ML besides
    missing: float = 0.0  # share of the cells

    def draw(self, rng: np.random.Generator) -> Row:
        """Results and utterances of a sweep, and their WERs and gaps."""
        results, utterances = [], {}
        for language in range(self.languages):
            hard = rng.gamma(2, 0.5, UTTERANCES)
            hard /= hard.mean()
            own = self.a * (1 + self.differ * rng.standard_normal())
            for hours in self.hours:
                if rng.random() < self.missing:
                    continue
                for index, tier in enumerate(self.tiers):
                    law = own * hours**-self.b + index * self.tier_effect
                    for name, change, ml_change in self._precisions():
                        for init, more in (("en", law), ("ml", ml_change)):
                            wer = 15 * hours**-0.2 + more + change
                            path = Path(f"{language}/{hours}/{tier}/{name}/{init}")
                            errors = rng.binomial(WORDS, np.minimum(wer / 100 * hard, 0.95))
                            found = made_up(errors)
                            utterances[path] = found
                            point = Point("t", name, tier, hours)
                            results.append(
                                Result(f"l{language}", init, point, found.wer, recogs=path)
                            )
        resampling = Resampling(f"l{language}" for language in range(self.languages))
        wers = collect(results, resampling, utterances)
        return {
            "results": results,
            "resampling": resampling,
            "wers": wers,
            "gaps": collect_gaps(wers),
        }

    def _precisions(self) -> list[tuple[str, float, float]]:
        full = [("fp32", 0.0, 0.0)]
        if self.quantised is None:
            return full
        return [*full, ("int8", self.quantised, self.quantised_ml)]


def made_up(errors: np.ndarray) -> Utterances:
    words = np.full(UTTERANCES, float(WORDS))
    return Utterances(IDS, errors.astype(float), words, np.arange(UTTERANCES), "utterance")


@pytest.mark.parametrize(
    ("truth", "least_gap"),
    [
        (Truth(b=0.5, languages=1), 0.92),
        (Truth(b=0.95, languages=2, differ=0.3), 0.87),
        (Truth(b=1.5, languages=3), 0.92),
        (Truth(b=1.5, languages=3, differ=0.3, missing=0.15), 0.90),
        (Truth(b=0.95, languages=8, differ=0.3), 0.92),
    ],
    ids=["one", "two that differ", "three alike", "three with holes", "eight"],
)
def test_intervals_of_the_law_and_of_the_gap_cover_the_truth(
    truth: Truth, least_gap: float
) -> None:
    rng = np.random.default_rng(17)
    gaps_in, gaps_seen, b_in, factor_in, under_in, fitted, negative = 0, 0, 0, 0, 0, 0, 0
    threshold = 0.25
    crossing = (truth.a / threshold) ** (1 / truth.b)
    for _ in range(SWEEPS):
        sweep = truth.draw(rng)
        resampling = sweep["resampling"]
        points = list(sweep["gaps"])
        hours = [point.hours for point in points]
        means = [resampling.mean(sweep["gaps"][point]) for point in points]
        for point, mean in zip(points, means, strict=True):
            low, high = interval(mean, len(sweep["gaps"][point]))
            gaps_in += low <= truth.a * point.hours**-truth.b <= high
            gaps_seen += 1
            negative += mean[0] < 0
        law = laws.fit_power_law(hours, means, truth.languages)
        if law.b is None:
            continue
        fitted += 1
        b_in += law.b_low <= truth.b <= law.b_high
        low, high = law.factor_interval
        factor_in += low <= 2**-truth.b <= high
        under = laws.threshold(law, threshold, hours, truth.languages)
        under_in += (under.low or 0) <= crossing <= (under.high or np.inf)
    assert fitted >= 0.95 * SWEEPS
    assert 0.91 <= b_in / fitted <= 0.99
    assert factor_in == b_in
    assert 0.90 <= under_in / fitted <= 0.995
    assert least_gap <= gaps_in / gaps_seen <= 0.985
    assert negative > 0 or truth.b < 1


def test_the_latency_test_errs_at_its_rate() -> None:
    """Where tiers do not matter, "they differ" is said in one sweep of twenty."""
    for languages, differ in ((1, 0.0), (3, 0.3), (8, 0.3)):
        truth = Truth(
            languages=languages, differ=differ, hours=(1.0, 5.0), tiers=(160, 320, 640, -1)
        )
        rng = np.random.default_rng(11)
        rows = []
        for _ in range(SWEEPS):
            sweep = truth.draw(rng)
            rows += gap.latency_rows(sweep["gaps"], sweep["resampling"], margin=1.0)
        differs = np.mean([row["difference_p"] < 0.05 for row in rows])
        assert 0.01 <= differs <= 0.085
        assert np.mean([row["ci_low"] == 0 for row in rows]) >= 1 - differs - 0.01


def test_the_equivalence_test_errs_at_its_rate_and_sees_sameness() -> None:
    """Two tiers exactly a margin apart are called the same in at most one sweep of twenty."""
    margin = 2.0
    for effect, least, most in ((margin, 0.015, 0.085), (0.0, 0.9, 1.0)):
        truth = Truth(hours=(1.0,), tiers=(160, 320), tier_effect=effect, languages=8)
        rng = np.random.default_rng(23)
        rows = []
        for _ in range(SWEEPS):
            sweep = truth.draw(rng)
            rows += gap.latency_rows(sweep["gaps"], sweep["resampling"], margin)
        same = np.mean([row["equivalence_p"] < 0.05 for row in rows])
        assert least <= same <= most
        covered = [row["ci_low"] <= effect <= row["ci_high"] for row in rows]
        assert np.mean(covered) >= 0.93
        trend = [row["trend_ci_low"] <= -effect <= row["trend_ci_high"] for row in rows]
        assert 0.91 <= np.mean(trend) <= 0.99


@pytest.mark.parametrize("languages", [1, 3, 8])
def test_the_quantisation_test_errs_at_its_rate(languages: int) -> None:
    for more, least, most in ((0.0, 0.005, 0.085), (1.5, 0.7, 1.0)):
        truth = Truth(
            languages=languages, hours=(1.0, 5.0), quantised=0.5, quantised_ml=more, differ=0.3
        )
        rng = np.random.default_rng(5)
        depends, covered = [], []
        for _ in range(SWEEPS):
            sweep = truth.draw(rng)
            (row,) = gap.quantisation_rows(sweep["results"], sweep["wers"], sweep["resampling"])
            depends.append(row["ml_minus_en_p"] < 0.05)
            expected = 0.5 + more / 2
            covered.append(row["wer_change_ci_low"] <= expected <= row["wer_change_ci_high"])
        assert least <= np.mean(depends) <= most
        assert 0.91 <= np.mean(covered) <= 0.995


def test_intervals_of_the_hours_saved_cover_the_truth() -> None:
    truth = Truth(languages=3)
    multilingual = [15 * hours**-0.2 for hours in HOURS]
    english = [wer + truth.a * h**-truth.b for wer, h in zip(multilingual, HOURS, strict=True)]
    # EN's curve is read as it is measured: straight between its points over log hours
    falling = -np.array(english)
    needed = np.exp(np.interp(-np.array(multilingual), falling, np.log(HOURS)))
    covered = np.zeros(len(HOURS))
    rng = np.random.default_rng(5)
    for _ in range(SWEEPS):
        sweep = truth.draw(rng)
        _, rows = gap.curve_rows(sweep["wers"], sweep["resampling"])
        for index, row in enumerate(rows):
            ratio = needed[index] / HOURS[index]
            covered[index] += (
                (row["ratio_ci_low"] or 0) <= ratio <= (row["ratio_ci_high"] or np.inf)
            )
    assert needed[0] == pytest.approx(2.18, abs=0.01)
    assert (covered[:4] >= 0.91 * SWEEPS).all()
    assert (covered[:4] <= 0.995 * SWEEPS).all()
