"""Which start for this much data: ML, EN, or either.

    python -m icetransfer.recommend --hours 300 [--results results.csv] [--chunk-ms 160]

With the results of a sweep of one's own the answer rests on them; without, on the published law,
and it says so.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy

from icetransfer import experiment, gap
from icetransfer.config import hours_label, parse_hours

# arXiv:2606.24169: mean gap over eight European languages, FLEURS, 160 ms, FastConformer 0.6 B
PUBLISHED = ((100.0, 4.21), (2500.0, 0.20))  # hours, WER points
NEGLIGIBLE = 0.25  # WER points: a smaller difference is not worth choosing by


@dataclass(frozen=True)
class Recommendation:
    """What to start from, and why."""

    choice: str  # "ML", "EN" or "either"
    gap: float  # expected WER(en) - WER(ml), points
    low: float | None
    high: float | None
    basis: str

    def __str__(self) -> str:
        text = f"{self.choice}: expected WER(en) - WER(ml) {self.gap:+.2f} points"
        if self.low is not None:
            text += f" (95 % interval {self.low:+.2f} to {self.high:+.2f})"
        return f"{text}\n{self.basis}"


def choose(expected: float, low: float | None, high: float | None) -> str:
    """Names the better start; "either" when the difference is negligible or may be none."""
    uncertain = low is not None and high is not None and low <= 0 <= high
    if uncertain or abs(expected) < NEGLIGIBLE:
        return "either"
    return "ML" if expected > 0 else "EN"


def from_published(hours: float) -> Recommendation:
    """Rests on the two published points."""
    points, gaps = zip(*PUBLISHED, strict=True)
    law = gap.fit_power_law(points, [numpy.array([value]) for value in gaps])
    expected = law.gap(hours)
    assert expected is not None
    basis = (
        "rests on the published law (arXiv:2606.24169: another architecture, FLEURS at 160 ms, "
        f"mean of eight languages, two points: {points[0]:g} h and {points[1]:g} h), not on a "
        "measurement of yours; no interval was published"
    )
    if not points[0] <= hours <= points[1]:
        basis += f"; {hours_label(hours)} lies outside it, so this is an extrapolation"
    return Recommendation(choose(expected, None, None), expected, None, None, basis)


def from_results(hours: float, path: Path, chunk_ms: int | None) -> Recommendation:
    """Rests on a sweep: its law, or its measurement where it has no law but this very amount.

    Raises:
        ValueError: the results have no gap, not at this latency, or nothing to reach `hours` from.
    """
    results = [r for r in gap.read_results(path) if r.point.precision == "fp32"]
    if chunk_ms is not None:
        results = [r for r in results if r.point.chunk_ms == chunk_ms]
    resampling = gap.Resampling(r.language for r in results) if results else None
    gaps = {}
    if resampling is not None:
        gaps = gap.mean_gaps(gap.collect(results, resampling), resampling)
    if not gaps:
        raise ValueError(f"{path}: no fp32 pair of en and ml results to rest on at this latency")
    amounts = sorted({point.hours for point in gaps})
    means = [
        numpy.mean([draws for point, (draws, _) in gaps.items() if point.hours == amount], axis=0)
        for amount in amounts
    ]
    where = (
        f"{path}: {', '.join(resampling.languages if resampling else [])}; data "
        f"{', '.join(hours_label(amount) for amount in amounts)}"
    )
    nearest = min(range(len(amounts)), key=lambda i: abs(math.log(amounts[i] / hours)))
    if abs(math.log(amounts[nearest] / hours)) < 0.01:
        draws, how = means[nearest], "measured at this amount of data"
    else:
        law = gap.fit_power_law(amounts, means)
        if law.a is None or law.b is None:
            raise ValueError(f"{where}: nothing to reach {hours_label(hours)} from: {law.method}")
        draws = _predictions(hours, amounts, means)
        how = f"power law, exponent {law.b:.2f}: {law.method}"
        if not amounts[0] <= hours <= amounts[-1]:
            how += f"; {hours_label(hours)} lies outside the data: an extrapolation"
    low, high = gap.interval(draws)
    expected = float(draws[0])
    basis = f"rests on {where}; {how}; noise between training runs is not in the interval"
    return Recommendation(choose(expected, low, high), expected, low, high, basis)


def _predictions(hours: float, amounts: list[float], means: list[gap.Array]) -> gap.Array:
    """The law's gap at `hours`, refitted for a part of the resamples."""
    stacked = numpy.stack(means)[:, :301]
    laws = [gap.fit_power_law(amounts, list(column[:, None])) for column in stacked.T]
    found = [law.gap(hours) for law in laws]
    return numpy.array([math.nan if value is None else value for value in found])


def _run() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", required=True, help="training data: 300, 300h or 30min")
    parser.add_argument("--results", type=Path, help="results.csv of a sweep")
    parser.add_argument("--chunk-ms", type=int, help="rest on this latency alone (-1: offline)")
    args = parser.parse_args()

    def run() -> None:
        try:
            hours = float(parse_hours(args.hours))  # type: ignore[arg-type]
        except ValueError:
            hours = math.nan
        if not 0 < hours < math.inf:
            raise ValueError(f"--hours {args.hours}: expected an amount such as 300, 300h or 30min")
        if args.results is None:
            print(from_published(hours))
        else:
            print(from_results(hours, args.results, args.chunk_ms))

    experiment.main(run)


if __name__ == "__main__":
    _run()
