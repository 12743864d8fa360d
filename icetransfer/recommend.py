"""Which start for this much data: ML, EN, or either.

    python -m icetransfer.recommend --hours 300
    python -m icetransfer.recommend --hours 300 --language de --chunk-ms 160 --results results.csv
    python -m icetransfer.recommend --plan plan.csv [--results results.csv] [--full]
    python -m icetransfer.recommend --design 2 --results results.csv

With the results of a sweep of one's own the answer rests on them: on the language's own gaps where
it was in the sweep, else on the mean over the languages that were.  Without, or for an amount of
data out of the sweep's reach, it rests on the published law, and says so.  plan.csv has the columns
language and hours, and may have chunk_ms (-1: offline); the answer is a table.

"ML" or "EN" is said where the expected difference matters (0.25 points) and one of the other sign
is ruled out at the 5 % level, one-sided; else "either".  The interval printed is two-sided, 95 %.

`--design` says how many languages, seeds and test recordings a sweep needs to see a gap of this
size in points, from the noise of the sweep given, and which gaps that sweep itself could see.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.table import Table

from icetransfer import experiment
from icetransfer.analysis import design, hierarchy, laws, study
from icetransfer.analysis.bootstrap import Resampling, interval, one_sided_interval
from icetransfer.analysis.gap_report import tier_label
from icetransfer.analysis.significance import LEVEL, Array
from icetransfer.analysis.sweep_results import (
    COMPARED,
    FULL,
    collect,
    collect_gaps,
    read_results,
    without_collapsed,
)
from icetransfer.config import hours_label
from icetransfer.gap import NEGLIGIBLE, choose
from icetransfer.settings.section import parse_hours
from icetransfer.stage.command import command_parser, printer, slim_table
from icetransfer.stage.text import read_text

SAME_AMOUNT = 0.01  # relative: closer than that, an amount counts as measured
REACH = 10.0  # times the amounts of a sweep: farther out it says nothing
MINI_HOURS = 5.0  # a sweep with less data than that is a miniature

OWN, MINI, PUBLISHED = "own sweep", "own mini sweep", "published law"


@dataclass(frozen=True)
class Recommendation:
    """What to start from, and why."""

    choice: str  # "ML", "EN" or "either"
    gap: float  # expected WER(en) - WER(ml), points
    low: float | None
    high: float | None
    source: str  # OWN, MINI or PUBLISHED
    basis: str
    more_data: str  # what twice the data would buy
    caution: str = ""  # how little is known, where that is so

    @property
    def bounds(self) -> str:
        """The interval, or nothing."""
        return "" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"

    def __str__(self) -> str:
        about = f"about {self.gap:+.0f}" if self.caution else f"{self.gap:+.2f}"
        text = f"{self.choice}: expected WER(en) - WER(ml) {about} points"
        if self.bounds:
            text += f" (95 % interval {self.bounds})"
        parts = [text, self.caution, f"{self.source}: {self.basis}", self.more_data]
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    hours: float
    language: str | None = None
    chunk_ms: int | None = None  # None: the mean over latencies


@dataclass(frozen=True)
class Evidence:
    """The gaps and WERs of a sweep in fp32, means over test sets and the latencies asked for.

    Attributes:
        gaps: language -> hours -> gap, (D,).
        wers: init -> language -> hours -> WER, (D,).
    """

    path: Path
    resampling: Resampling
    gaps: dict[str, dict[float, Array]]
    wers: dict[str, dict[str, dict[float, Array]]]

    @property
    def amounts(self) -> list[float]:
        """All amounts of data that have a gap."""
        return sorted({hours for by_hours in self.gaps.values() for hours in by_hours})


def from_published(hours: float) -> Recommendation:
    """Rests on the two published points."""
    law = study.law()
    amounts = [point[0] for point in study.POINTS]
    # The law has no end: of minutes it would say hundreds of points, which no WER can differ by.
    least = amounts[0] / REACH
    expected, doubled = law.gap(max(hours, least)), law.gap(max(2 * hours, least))
    under = laws.threshold(law, NEGLIGIBLE, amounts)
    assert expected is not None and doubled is not None and under is not None
    caution = ""
    basis = (
        f"rests on {study.SETTING}, two points: {amounts[0]:g} h and {amounts[1]:g} h, which "
        f"cannot test the law; not on a measurement of yours; no interval was published"
    )
    if not amounts[0] <= hours <= amounts[1]:
        basis += f"; {hours_label(hours)} lies outside it, so this is an extrapolation"
        caution = (
            f"Little is known here: nobody has measured {hours_label(hours)}, and the size of the "
            f"gap is a guess. Measure it: ./run_all.sh --hours ... runs a sweep of your own, and "
            f"--results FILE rests on it."
        )
    if hours < least:
        basis += f", and not carried below {hours_label(least)}, of which the gap given here is"
    more = f"twice the data ({hours_label(2 * hours)}): expected gap {doubled:+.2f}"
    if under.hours is not None and hours < under.hours:
        more += f"; it falls under {NEGLIGIBLE:g} at about {under.hours:.0f}h"
    return Recommendation(
        choose(expected, None, None), expected, None, None, PUBLISHED, basis, more, caution
    )


@lru_cache(maxsize=8)
def read_evidence(path: Path, chunk_ms: int | None) -> Evidence:
    """Reads a sweep's results.csv.

    Raises:
        ValueError: it has no gap in fp32 at this latency.
    """
    results, _ = without_collapsed(read_results(path))
    results = [result for result in results if result.point.precision == FULL]
    tiers = sorted({r.point.chunk_ms for r in results})
    if chunk_ms is not None:
        results = [r for r in results if r.point.chunk_ms == chunk_ms]
    resampling = Resampling(r.language for r in results) if results else None
    collected = collect(results, resampling) if resampling else {}
    gaps: dict[str, dict[float, list[Array]]] = defaultdict(lambda: defaultdict(list))
    for point, by_language in collect_gaps(collected).items():
        for language, draws in by_language.items():
            gaps[language][point.hours].append(draws)
    if not gaps or resampling is None:
        there = ", ".join(map(tier_label, tiers)) or "none"
        raise ValueError(
            f"{path}: no fp32 pair of en and ml results to rest on at this latency; there are "
            f"{there}"
        )
    wers: dict[str, dict[str, dict[float, list[Array]]]] = {
        init: defaultdict(lambda: defaultdict(list)) for init in COMPARED
    }
    for point, by_init in collected.items():
        for init in COMPARED:
            for (language, _), draws in by_init.get(init, {}).items():
                wers[init][language][point.hours].append(draws)
    means = {init: {name: _means(found) for name, found in wers[init].items()} for init in COMPARED}
    return Evidence(path, resampling, {name: _means(gaps[name]) for name in sorted(gaps)}, means)


def _means(by_hours: dict[float, list[Array]]) -> dict[float, Array]:
    return {hours: np.mean(found, axis=0) for hours, found in sorted(by_hours.items())}


def from_results(
    hours: float, path: Path, chunk_ms: int | None, language: str | None = None
) -> Recommendation:
    """Rests on a sweep: its measurement at this amount of data, or its law.

    Raises:
        ValueError: the results have no gap, not at this latency, or nothing to reach `hours` from.
    """
    evidence = read_evidence(path, chunk_ms)
    amounts = evidence.amounts
    if not amounts[0] / REACH <= hours <= amounts[-1] * REACH:
        found = from_published(hours)
        basis = (
            f"{path} has {hours_label(amounts[0])} to {hours_label(amounts[-1])}: too far from "
            f"{hours_label(hours)} to say anything; {found.basis}"
        )
        return replace(found, basis=basis)
    by_hours, count, whose = _gaps_for(evidence, hours, language)
    draws, how = _gap_at(hours, by_hours, count, str(path))
    low, high = interval(draws, count)
    choice = choose(float(draws[0]), *one_sided_interval(draws, count))
    basis = f"rests on {path}: {whose}; data {_listed(sorted(by_hours))}; {how}"
    if count == 1:
        basis += "; noise between training runs is not in the interval"
    source = MINI if amounts[-1] < MINI_HOURS else OWN
    more = _more_data(evidence, hours, by_hours, count, choice, language)
    caution = ""
    if not min(by_hours) <= hours <= max(by_hours):
        caution = (
            f"Little is known here: {hours_label(hours)} lies outside what {path} measured, "
            f"{hours_label(min(by_hours))} to {hours_label(max(by_hours))}, and the size of the "
            f"gap is a guess."
        )
    return Recommendation(choice, float(draws[0]), low, high, source, basis, more, caution)


def _listed(amounts: Sequence[float]) -> str:
    return ", ".join(map(hours_label, amounts))


def _gaps_for(
    evidence: Evidence, hours: float, language: str | None
) -> tuple[dict[float, Array], int, str]:
    """The gaps to rest on by amount of data, the number of languages in them, and whose they are.

    For a language that was not in the sweep the languages' own differences count in full: it is
    one more draw from them, and the mean over n of them is known by 1/n besides.
    """
    own = evidence.gaps.get(language or "", {})
    if len(own) > 1 or any(_is_measured(hours, amount) for amount in own):
        return own, 1, f"{language} itself"
    names = sorted(evidence.gaps)
    means = {}
    for amount in evidence.amounts:
        at = {name: found[amount] for name, found in evidence.gaps.items() if amount in found}
        draws = evidence.resampling.mean(at)
        if language is not None:
            half = 1 + evidence.resampling.resamples
            draws[1:half] = draws[0] + (draws[1:half] - draws[0]) * math.sqrt(len(at) + 1)
        means[amount] = draws
    whose = f"mean of {', '.join(names)}"
    if language is not None:
        whose += f" ({language} was not in the sweep)" if not own else f" ({language}: one amount)"
        if len(names) == 1:
            whose += "; how far languages differ is not known"
    return means, len(names), whose


def _is_measured(hours: float, amount: float) -> bool:
    return abs(math.log(amount / hours)) < SAME_AMOUNT


def _gap_at(
    hours: float, by_hours: dict[float, Array], languages: int, where: str
) -> tuple[Array, str]:
    """The gap at an amount of data, (D,), and how it is known."""
    amounts = sorted(by_hours)
    for amount in amounts:
        if _is_measured(hours, amount):
            return by_hours[amount], "measured at this amount of data"
    law = laws.fit_power_law(amounts, [by_hours[amount] for amount in amounts], languages)
    inside = amounts[0] <= hours <= amounts[-1]
    if law.fitted is None:
        if not inside:
            raise ValueError(f"{where}: nothing to reach {hours_label(hours)} from: {law.method}")
        return _between(hours, by_hours), "between the two nearest amounts, as no power law fits"
    how = f"power law, exponent {law.b:.2f}: {law.method}"
    if not inside:
        how += f"; {hours_label(hours)} lies outside the data: an extrapolation"
    return law.fitted.gaps(hours), how


def _between(hours: float, by_hours: dict[float, Array]) -> Array:
    """Straight over log hours between the nearest amounts, or on from the last two, (D,)."""
    amounts = sorted(by_hours)
    right = min(max(int(np.searchsorted(amounts, hours)), 1), len(amounts) - 1)
    first, second = amounts[right - 1], amounts[right]
    part = math.log(hours / first) / math.log(second / first)
    return by_hours[first] * (1 - part) + by_hours[second] * part


def _more_data(
    evidence: Evidence,
    hours: float,
    by_hours: dict[float, Array],
    languages: int,
    choice: str,
    language: str | None,
) -> str:
    """What twice the data would do to the gap and to the WER of the start chosen."""
    double = 2 * hours
    text = f"twice the data ({hours_label(double)})"
    try:
        draws, _ = _gap_at(double, by_hours, languages, "")
    except ValueError:
        text += ": its gap cannot be told"
    else:
        text += f": expected gap {draws[0]:+.2f}"
    init = "en" if choice == "EN" else "ml"
    curves = evidence.wers[init]
    names = [language] if language in curves else sorted(curves)
    changes = [
        _between(double, curves[name]) - _between(hours, curves[name])
        for name in names
        if len(curves[name]) > 1
    ]
    if changes:
        change = float(np.mean([draws[0] for draws in changes]))
        text += f", WER of the {init} start {change:+.2f} points"
        if double > evidence.amounts[-1]:
            text += " (extrapolated from the last two amounts)"
    return text


def recommend(request: Request, results: Path | None) -> Recommendation:
    """Answers a request from a sweep, or from the published law where there is none."""
    if results is None:
        return from_published(request.hours)
    return from_results(request.hours, results, request.chunk_ms, request.language)


def read_plan(path: Path) -> list[Request]:
    """Reads plan.csv.

    Raises:
        ValueError: the file or a column is missing, or a value cannot be.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a CSV file with language and hours")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    lacking = [name for name in ("language", "hours") if name not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}")
    requests = []
    for line in reader:
        try:
            tier = int(line["chunk_ms"]) if line.get("chunk_ms") else None
            requests.append(Request(_hours(line["hours"] or ""), line["language"], tier))
        except ValueError as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from None
    if not requests:
        raise ValueError(f"{path} has no line below its header")
    return requests


def plan_table(
    requests: Sequence[Request], results: Path | None, full: bool
) -> tuple[Table, list[str]]:
    """A row for each request.

    Args:
        requests: of a plan.
        results: what to rest on; None: the published law.
        full: whether what twice the data buys has a column too.

    Returns:
        The table, and a line for each request that has no answer or a doubtful one.
    """
    table = slim_table("EN or ML start; gap: expected WER(en) - WER(ml) in points")
    for column in ("language", "data", "latency", "start"):
        table.add_column(column)
    for column in ("gap", "95 % interval"):
        table.add_column(column, justify="right")
    for column in ("rests on", *(("twice the data",) if full else ())):
        table.add_column(column)
    notes = []
    for request in requests:
        tier = "mean" if request.chunk_ms is None else tier_label(request.chunk_ms)
        names = [request.language or "", hours_label(request.hours), tier]
        try:
            found = recommend(request, results)
        except ValueError as error:
            table.add_row(*names, "–")
            notes.append(f"{', '.join(names)}: {error}")
            continue
        gap = f"≈ {found.gap:+.0f}" if found.caution else f"{found.gap:+.2f}"
        more = [found.more_data.partition(": ")[2]] if full else []
        table.add_row(*names, found.choice, gap, found.bounds, found.source, *more)
        if found.caution:
            notes.append(f"{', '.join(names)}: {found.caution}")
    return table, notes


def design_table(gap: float, path: Path) -> Table:
    """What a sweep needs to see a gap, a row for each number of seeds and length of the test set.

    Raises:
        ValueError: the results cannot tell their own noise.
    """
    results, _ = without_collapsed(read_results(path))
    results = [result for result in results if result.point.precision == FULL]
    test_set = min(result.point.test_set for result in results)
    wers = collect(results, Resampling(result.language for result in results))
    measured = hierarchy.measured_gaps(wers, test_set)
    if not any(m.noise.any() for m in measured):
        raise ValueError(
            f"{path}: the utterances of {test_set} are not at hand, so the noise of its length is "
            f"not known; give the results.csv of a sweep in its own folder, with the column recogs"
        )
    noise = design.noise_of(hierarchy.fit(measured), measured)
    seen = design.smallest_gap(noise.of_language(1, 1))
    table = Table(
        title=f"To see a gap of {gap:g} points ({100 * design.POWER:.0f} % of the time, at the "
        f"{100 * LEVEL:.0f} % level)",
        caption=f"From {path}, {test_set}. Standard deviations in points: languages "
        f"{noise.language:.1f}, runs {noise.run:.1f}, utterances {noise.utterances:.1f}, rest "
        f"{noise.rest:.1f}. With one seed and this test set, one language alone shows a gap from "
        f"{seen:.1f} points on.",
    )
    for column in ("seeds", "test set", "languages for the mean", "one language shows"):
        table.add_column(column, justify="right")
    for seeds in design.SEEDS:
        for longer in design.LONGER:
            count = design.languages_needed(noise, gap, seeds, longer)
            own = design.smallest_gap(noise.of_language(seeds, longer))
            languages = f"over {design.MOST_LANGUAGES}" if count is None else str(count)
            as_long = "as it is" if longer == 1 else f"{longer} times"
            table.add_row(str(seeds), as_long, languages, f"{own:.1f} points")
    return table


def _hours(text: str) -> float:
    try:
        hours = float(parse_hours(text))  # type: ignore[arg-type]
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise ValueError(f"hours {text}: expected an amount such as 300, 300h or 30min")
    return hours


def _run() -> None:
    parser = command_parser(__doc__, "docs/statistics.md")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--hours", help="training data: 300, 300h or 30min")
    asked.add_argument("--plan", type=Path, help="CSV file with language, hours and chunk_ms")
    asked.add_argument(
        "--design",
        type=float,
        metavar="POINTS",
        help="what a sweep needs to see a gap of this many points; with --results",
    )
    parser.add_argument("--language", help="of the recogniser, as in results.csv")
    parser.add_argument("--chunk-ms", type=int, help="rest on this latency alone (-1: offline)")
    parser.add_argument("--results", type=Path, help="results.csv of a sweep")
    parser.add_argument("--full", action="store_true", help="with --plan: every column")
    args = parser.parse_args()

    def run() -> None:
        console = printer()
        if args.design is not None:
            if not 0 < args.design < math.inf or args.results is None:
                raise ValueError(
                    "--design: expected points above 0, and --results with a sweep's results.csv"
                )
            console.print(design_table(args.design, args.results))
            return
        if args.plan is None:
            request = Request(_hours(args.hours), args.language, args.chunk_ms)
            found = str(recommend(request, args.results))
            console.print(found, markup=False, soft_wrap=not console.is_terminal)
            return
        table, notes = plan_table(read_plan(args.plan), args.results, args.full)
        console.print(table)
        for note in notes:
            console.print(note, markup=False, soft_wrap=not console.is_terminal)

    experiment.main(run)


if __name__ == "__main__":
    _run()
