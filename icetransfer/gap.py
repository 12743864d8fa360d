"""How much better a multilingual start is than an English one: the gap, its decay, its noise.

    python -m icetransfer.gap --results results.csv --out DIR
    python -m icetransfer.gap --results egs/nl/exp --out DIR    every wer.json in a folder

The gap is WER(en) - WER(ml) in points: above zero, the multilingual start is the better one.  Its
mean over languages is given for every test set, precision, latency and amount of training data,
with intervals from resampling the languages and, where the recognised utterances are at hand
(column `recogs`), the utterances too (`bootstrap.py`).  A power law gap = a * hours^-b is fitted on
the linear scale, so that gaps at or below zero take part, and held against other laws (`laws.py`).
Each language's own verdict, ML, EN or a tie, comes from a hierarchical model (`hierarchy.py`).
Whether the gap is the same at every latency, what quantisation costs and how many hours ML saves
stand beside it, and what such results cannot say.

results.csv has the columns language, init, hours, test_set, chunk_ms (-1: offline), precision, wer
(in percent), and may have engine, seed, model_bytes and recogs (a recogs.jsonl, relative to the
file).  A folder may be given instead: every wer.json under it counts, with the recogs.jsonl beside
it.  Of several engines the first of sherpa, onnxruntime, torch counts; seeds are averaged.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from icetransfer import experiment
from icetransfer.analysis import gap_report, laws, verdict
from icetransfer.analysis.bootstrap import (
    RESAMPLES,
    Contrasts,
    Interval,
    Resampling,
    contrasts,
    interval,
    one_sided_interval,
    p_value,
    uncertainty,
)
from icetransfer.analysis.gap_report import latency_order
from icetransfer.analysis.significance import (
    CONFIDENCE,
    LEVEL,
    Array,
    Utterances,
    percentile_interval,
    student_factor,
)
from icetransfer.analysis.sweep_results import (
    COMPARED,
    FULL,
    Gaps,
    Point,
    Result,
    Row,
    Wers,
    collect,
    collect_gaps,
    language_gaps,
    read_results,
    without_collapsed,
)
from icetransfer.config import hours_label
from icetransfer.stage.command import command_parser

MARGIN = 0.5  # WER points: gaps at two latencies that are closer count as the same
NEGLIGIBLE = 0.25  # WER points: a smaller gap is not worth choosing by
FEW = 5  # languages that say little about others
BAND_POINTS = 25  # of a law's line in figures


def series_of(points: Iterable[Point]) -> dict[tuple[str, str, int], list[Point]]:
    """Points by test set, precision and latency (offline last), with rising amounts of data."""
    found = defaultdict(list)
    for point in sorted(points, key=lambda p: (*p[:2], latency_order(p.chunk_ms), p.hours)):
        found[point[:3]].append(point)
    return dict(found)


def _named(series: tuple[str, str, int]) -> Row:
    return dict(zip(("test_set", "precision", "chunk_ms"), series, strict=True))


def _bounds(name: str, found: Interval) -> Row:
    return {f"{name}_low": found[0], f"{name}_high": found[1]}


def _with_interval(name: str, draws: Array, languages: int) -> Row:
    prefix = "ci" if name == "gap" else f"{name}_ci"
    return {name: float(draws[0])} | _bounds(prefix, interval(draws, languages))


def choose(expected: float, low: float | None, high: float | None) -> str:
    """Names the better start; "either" when the difference is negligible or may be none."""
    uncertain = low is not None and high is not None and low <= 0 <= high
    if uncertain or abs(expected) < NEGLIGIBLE:
        return "either"
    return "ML" if expected > 0 else "EN"


def gap_rows(gaps: Gaps, resampling: Resampling) -> tuple[list[Row], list[Row]]:
    """The mean gap at every point, and every language's own."""
    means, own = [], []
    for point, by_language in gaps.items():
        count = len(by_language)
        draws = resampling.mean(by_language)
        mean: Row = {"n_languages": count} | _with_interval("gap", draws, count)
        mean["start"] = choose(float(draws[0]), *one_sided_interval(draws, count))
        means.append(point._asdict() | mean)
        own += [
            point._asdict() | {"language": language} | _with_interval("gap", draws, 1)
            for language, draws in by_language.items()
        ]
    return means, own


def power_laws(gaps: Gaps, resampling: Resampling, threshold: float) -> list[Row]:
    """A law for every test set, precision and latency, and how it fares beside others."""
    rows = []
    for series, points in series_of(gaps).items():
        hours = [point.hours for point in points]
        languages = len({language for point in points for language in gaps[point]})
        means = [resampling.mean(gaps[point]) for point in points]
        law = laws.fit_power_law(hours, means, languages)
        choice = laws.compare(hours, np.array([draws[0] for draws in means]))
        under = laws.threshold(law, threshold, hours, languages)
        rows.append(
            _named(series)
            | {"a": law.a, "a_ci_low": law.a_low, "a_ci_high": law.a_high}
            | {"b": law.b, "b_ci_low": law.b_low, "b_ci_high": law.b_high}
            | {"factor_per_doubling": law.factor_per_doubling}
            | _bounds("factor_ci", law.factor_interval)
            | {"n_points": law.n_points, "n_languages": languages, "method": law.method}
            | {"threshold": threshold, "hours_under_threshold": asdict(under) if under else None}
            | {"candidates": [asdict(candidate) for candidate in choice.candidates]}
            | {"chosen": choice.chosen, "choice": choice.reason}
            | {"band": _band(law, hours, languages)}
        )
    return rows


def _band(law: laws.PowerLaw, hours: Sequence[float], languages: int) -> list[Row]:
    """The law with its interval along the amounts measured, for figures."""
    if law.fitted is None:
        return []
    amounts = [float(x) for x in np.geomspace(min(hours), max(hours), BAND_POINTS)]
    drawn = [law.fitted.gaps(amount) for amount in amounts]
    known = [uncertainty(draws, languages) for draws in drawn]
    # one factor for the whole band: from amount to amount it would leap
    factor = max((student_factor(u.freedom) for u in known if u), default=1.0)
    rows = []
    for amount, draws, found in zip(amounts, drawn, known, strict=True):
        middle = float(draws[0])
        ends = percentile_interval(found.deviations * factor) if found else (None, None)
        bounds = [None if end is None else middle + end for end in ends]
        rows.append({"hours": amount, "gap": middle, "ci_low": bounds[0], "ci_high": bounds[1]})
    return rows


def latency_rows(gaps: Gaps, resampling: Resampling, margin: float) -> list[Row]:
    """Whether the gap is the same at every latency, at each amount of data.

    `spread` is the largest less the smallest gap over the tiers; noise alone keeps it above zero,
    which its interval allows for.  `trend` is the gap at the shortest latency less that at the
    longest.  `difference_p` speaks against all gaps being the same, `equivalence_p` against any two
    of them being `margin` points apart.  All are of languages that were measured at both tiers.
    """
    rows = []
    for test_set, precision, hours in sorted({(p.test_set, p.precision, p.hours) for p in gaps}):
        tiers = [
            p for p in gaps if (p.test_set, p.precision, p.hours) == (test_set, precision, hours)
        ]
        tiers.sort(key=lambda p: latency_order(p.chunk_ms))
        pairs = {}
        for first, second in itertools.combinations(tiers, 2):
            shared = sorted(gaps[first].keys() & gaps[second].keys())
            if shared:
                differences = {name: gaps[first][name] - gaps[second][name] for name in shared}
                pairs[first, second] = resampling.mean(differences), len(shared)
        if not pairs:
            continue
        found = contrasts(list(pairs.values()), margin)
        row: Row = {"test_set": test_set, "precision": precision, "hours": hours}
        row |= {"chunk_ms": [point.chunk_ms for point in tiers]}
        row |= {"spread": found.spread, "ci_low": found.low, "ci_high": found.high}
        if (tiers[0], tiers[-1]) in pairs:
            row |= _with_interval("trend", *pairs[tiers[0], tiers[-1]])
        row |= {"margin": margin, "difference_p": found.difference_p}
        row |= {"equivalence_p": found.equivalence_p, "verdict": _latency_verdict(found, margin)}
        rows.append(row)
    return rows


def _latency_verdict(found: Contrasts, margin: float) -> str:
    if found.difference_p is None or found.equivalence_p is None:
        return "cannot be tested: no languages or utterances to resample"
    same, differs = found.equivalence_p < LEVEL, found.difference_p < LEVEL
    if same and differs:
        return f"differs, by less than {margin:g} points"
    if same:
        return f"the same within {margin:g} points"
    return "differs" if differs else "cannot be told"


def quantisation_rows(results: Sequence[Result], wers: Wers, resampling: Resampling) -> list[Row]:
    """What each precision costs against fp32, and whether it costs one init more."""
    sizes = {(r.language, r.init, r.point, r.seed): r.model_bytes for r in results if r.model_bytes}
    rows = []
    for precision in sorted({point.precision for point in wers} - {FULL}):
        changes: Changes = defaultdict(list)
        ratios = []
        for point in wers:
            full = point._replace(precision=FULL)
            if point.precision != precision or full not in wers:
                continue
            for init in COMPARED:
                for key, wer in wers[point].get(init, {}).items():
                    if key not in wers[full].get(init, {}):
                        continue
                    changes[init, point.chunk_ms, key[0]].append(wer - wers[full][init][key])
                    small = sizes.get((key[0], init, point, key[1]))
                    large = sizes.get((key[0], init, full, key[1]))
                    if small and large:
                        ratios.append(large / small)
        rows.append(
            {"precision": precision, "n": sum(map(len, changes.values()))}
            | {"size_ratio": float(np.mean(ratios)) if ratios else None}
            | _changes_row(changes, resampling)
        )
    return rows


Changes = dict[tuple[str, int, str], list[Array]]  # init, chunk_ms, language -> WER changes


def _changes_row(changes: Changes, resampling: Resampling) -> Row:
    """The mean change, that of each init, their difference, and the change at each latency."""

    def by_language(init: str, chunk_ms: int | None = None) -> dict[str, Array]:
        pooled: dict[str, list[Array]] = defaultdict(list)
        for (own, tier, language), found in changes.items():
            if own == init and chunk_ms in (None, tier):
                pooled[language] += found
        return {language: np.mean(found, axis=0) for language, found in pooled.items()}

    def mean(name: str, found: dict[str, Array]) -> Row:
        return _with_interval(name, resampling.mean(found), len(found)) if found else {}

    def of_both(chunk_ms: int | None = None) -> dict[str, Array]:
        inits = [by_language(init, chunk_ms) for init in COMPARED]
        names = sorted({name for found in inits for name in found})
        return {
            name: np.mean([found[name] for found in inits if name in found], axis=0)
            for name in names
        }

    row = mean("wer_change", of_both())
    english, multilingual = (by_language(init) for init in COMPARED)
    row |= mean("en_change", english) | mean("ml_change", multilingual)
    both = sorted(english.keys() & multilingual.keys())
    if both:
        differences = {name: multilingual[name] - english[name] for name in both}
        draws = resampling.mean(differences)
        row |= _with_interval("ml_minus_en", draws, len(both))
        row["ml_minus_en_p"] = p_value(draws, len(both))
    row["by_chunk_ms"] = [
        {"chunk_ms": tier} | mean("wer_change", of_both(tier))
        for tier in sorted({key[1] for key in changes}, key=latency_order)
    ]
    return row


def noise_rows(wers: Wers) -> list[Row]:
    """What changing the seed alone does, where cells were repeated with several seeds."""
    rows = []
    for point in sorted(wers):
        for language in sorted({key[0] for cells in wers[point].values() for key in cells}):
            found = {
                init: {seed: wer[0] for (name, seed), wer in cells.items() if name == language}
                for init, cells in wers[point].items()
            }
            repeated = {init: list(cells.values()) for init, cells in found.items()}
            repeated = {init: values for init, values in repeated.items() if len(values) > 1}
            if not repeated:
                continue
            seeds = sorted(found.get("en", {}).keys() & found.get("ml", {}).keys())
            gaps = [float(found["en"][seed] - found["ml"][seed]) for seed in seeds]
            rows.append(
                point._asdict()
                | {
                    "language": language,
                    "wer_sd": {i: float(np.std(v, ddof=1)) for i, v in repeated.items()},
                    "gaps": gaps,
                    "gap_sd": float(np.std(gaps, ddof=1)) if len(gaps) > 1 else None,
                }
            )
    return rows


def curve_rows(wers: Wers, resampling: Resampling) -> tuple[list[Row], list[Row]]:
    """WER against hours for each init, and how much more data EN needs to reach ML's WER.

    Both are means over the languages that have every amount of data from both inits.

    Returns:
        The curves' points, and a row for each amount of data with `ratio`: EN's hours for the WER
        that ML has there, divided by ML's hours.
    """
    curves, savings = [], []
    for series, points in series_of(wers).items():
        shared = set.intersection(*(set(language_gaps(wers[point])) for point in points))
        if not shared:
            continue
        means: dict[str, list[Array]] = {}
        for init in COMPARED:
            means[init] = [
                resampling.mean(_mean_over_seeds(wers[point][init], shared)) for point in points
            ]
            curves += [
                _named(series)
                | {"init": init, "hours": point.hours, "n_languages": len(shared)}
                | _with_interval("wer", draws, len(shared))
                for point, draws in zip(points, means[init], strict=True)
            ]
        if len(points) > 1:
            hours = [point.hours for point in points]
            english, multilingual = (np.stack(means[init]) for init in COMPARED)
            savings += [
                _named(series) | row for row in _savings(hours, english, multilingual, len(shared))
            ]
    return curves, savings


def _mean_over_seeds(cells: dict[tuple[str, int], Array], shared: set[str]) -> dict[str, Array]:
    by_language = defaultdict(list)
    for (language, _), wer in sorted(cells.items()):
        if language in shared:
            by_language[language].append(wer)
    return {language: np.mean(found, axis=0) for language, found in by_language.items()}


def _savings(hours: list[float], english: Array, multilingual: Array, languages: int) -> list[Row]:
    """Reads EN's curve, straight between its points over log hours, at ML's WERs.

    A WER that EN reaches nowhere in the amounts measured gives `at_least`: the largest amount
    divided by ML's; one that EN's smallest amount already has gives `at_most`.

    Args:
        hours: rising, P of them.
        english: WERs, (P, D).
        multilingual: the same.
        languages: in the means.
    """
    logs = np.log(hours)
    # more data that seems to hurt is noise: EN needs no more than the amount that did it before
    english = np.minimum.accumulate(english, axis=0)
    rows = []
    for index, amount in enumerate(hours):
        target = multilingual[index]
        needed = np.where(target >= english[0], logs[0], logs[-1])
        for left in range(len(hours) - 1):
            top, bottom = english[left], english[left + 1]
            inside = (bottom <= target) & (target < top)
            with np.errstate(invalid="ignore", divide="ignore"):
                part = (top - target) / (top - bottom)
            needed = np.where(inside, logs[left] + part * (logs[left + 1] - logs[left]), needed)
        draws = needed - logs[index]
        low, high = interval(draws, languages)
        beyond = bool(target[0] < english[-1, 0])
        before = bool(target[0] >= english[0, 0])
        # the most that can be seen: beyond it a bound is open
        ends = float(logs[0] - logs[index]), float(logs[-1] - logs[index])
        rows.append(
            {
                "hours": amount,
                "ratio": float(np.exp(draws[0])),
                "bound": "at_least" if beyond else "at_most" if before else None,
                "ratio_ci_low": None if low is None or low <= ends[0] else math.exp(low),
                "ratio_ci_high": None if high is None or high >= ends[1] else math.exp(high),
            }
        )
    return rows


def conclusions(results: Sequence[Result], gaps: Gaps, resampling: Resampling) -> list[str]:
    """What these results cannot say, in sentences; the shape of the sweep alone decides."""
    said = []
    languages = sorted({name for by_language in gaps.values() for name in by_language})
    if len(languages) == 1:
        said.append(
            f"One language ({languages[0]}): nothing can be concluded about others; intervals are "
            f"of its test sets alone."
        )
    elif len(languages) < FEW:
        said.append(
            f"{len(languages)} languages: the intervals allow for so few, but as they were not "
            f"drawn at random, other languages may differ more."
        )
    amounts = sorted({point.hours for point in gaps})
    if len(amounts) == 1:
        said.append("One amount of data: whether and how the gap decays cannot be concluded.")
    elif len(amounts) == 2:
        said.append(
            "Two amounts of data: they fix a power law and cannot test it; any other falling law "
            "fits as well."
        )
    elif len(amounts) < 5:
        said.append(
            f"{len(amounts)} amounts of data: a power law can be fitted, but laws cannot be told "
            f"apart by AICc, which needs five."
        )
    if len({point.chunk_ms for point in gaps}) == 1:
        said.append("One latency: whether the gap depends on it cannot be concluded.")
    if len({point.precision for point in gaps}) == 1:
        said.append("One precision: what quantisation costs cannot be concluded.")
    if not resampling.resamples_utterances:
        said.append(
            "No recognised utterances at hand: the noise of the test sets is seen only as far as "
            "it makes languages differ."
        )
    repeated = {(r.language, r.init, r.point) for r in results if r.seed != results[0].seed}
    if not repeated:
        said.append(
            "One seed: the noise between training runs cannot be told from a true difference"
            + (
                "."
                if len(languages) == 1
                else "; intervals hold it only as far as it makes languages differ."
            )
        )
    return said + _holes(gaps, languages)


def _collapsed_text(left_out: Sequence[Result]) -> list[str]:
    """Names the results that are in no mean, a cell at a time."""
    if not left_out:
        return []
    cells = Counter((r.language, r.init, r.point.hours) for r in left_out)
    named = [
        f"{language} {init} {hours_label(hours)} ({count})"
        for (language, init, hours), count in sorted(cells.items())
    ]
    return [
        f"{len(left_out)} results are in no mean, because their models say next to nothing (WER "
        f"over 90 %, mostly deletions): {', '.join(named)}. Such a training has collapsed or not "
        f"begun to recognise; of its start it says nothing."
    ]


def _holes(gaps: Gaps, languages: list[str]) -> list[str]:
    lacking: dict[str, list[Point]] = defaultdict(list)
    for point, by_language in gaps.items():
        for language in languages:
            if language not in by_language:
                lacking[language].append(point)
    if not lacking:
        return []
    texts = [
        f"{language} ({len(points)} of {len(gaps)}, as at {hours_label(points[0].hours)})"
        for language, points in sorted(lacking.items())
    ]
    return [
        f"Gaps are missing of {', '.join(texts)}: means at different points are not over the same "
        f"languages, so that a step between them may be the languages' own."
    ]


def analyse(
    results: Sequence[Result],
    utterances: Mapping[Path, Utterances] | None = None,
    margin: float = MARGIN,
    threshold: float = NEGLIGIBLE,
    resamples: int = RESAMPLES,
) -> Row:
    """All of gap.json.

    Args:
        results: of a sweep.
        utterances: by the results' `recogs`; read from there when not given.
        margin: of the latency equivalence test, WER points.
        threshold: a gap that does not matter, WER points.
        resamples: R, of languages and of utterances each.

    Raises:
        ValueError: no measurement has both an EN and an ML result.
    """
    results, left_out = without_collapsed(results)
    resampling = Resampling((result.language for result in results), resamples)
    wers = collect(results, resampling, utterances)
    gaps = collect_gaps(wers)
    if not gaps:
        raise ValueError("no language has both an en and an ml result of the same kind: no gap")
    means, own = gap_rows(gaps, resampling)
    curves, savings = curve_rows(wers, resampling)
    verdicts, models = verdict.verdicts(wers)
    return {
        "verdict": verdicts,
        "hierarchy": models,
        "mean_gap": means,
        "language_gap": own,
        "power_law": power_laws(gaps, resampling, threshold),
        "latency": latency_rows(gaps, resampling, margin),
        "quantisation": quantisation_rows(results, wers, resampling),
        "noise": noise_rows(wers),
        "wer_curve": curves,
        "hours_saved": savings,
        "left_out": [
            {"language": r.language, "init": r.init, "seed": r.seed, "wer": r.wer}
            | r.point._asdict()
            for r in left_out
        ],
        "cannot_conclude": _collapsed_text(left_out) + conclusions(results, gaps, resampling),
        "method": {
            "gap": "WER(en) - WER(ml), points; mean over languages",
            "languages": resampling.languages,
            "resampled": (["languages"] if len(resampling.languages) > 1 else [])
            + (["utterances"] if resampling.resamples_utterances else []),
            "clusters": sorted(resampling.units),
            "replicates": resamples,
            "confidence_percent": CONFIDENCE,
            "seed": resampling.seed,
        },
    }


def _run() -> None:
    parser = command_parser(__doc__, "docs/statistics.md")
    parser.add_argument(
        "--results", type=Path, required=True, help="results.csv, or a folder of wer.json"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for gap.json, gap.md, plots"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="WER points within which gaps count as the same at all latencies (%(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=NEGLIGIBLE,
        help="WER points under which a gap does not matter (%(default)s)",
    )
    args = parser.parse_args()

    def run() -> None:
        for name in ("margin", "threshold"):
            if not 0 < getattr(args, name) < math.inf:
                raise ValueError(f"--{name} {getattr(args, name)}: expected WER points above 0")
        results = read_results(args.results)
        analysis = analyse(results, margin=args.margin, threshold=args.threshold)
        gap_report.write(analysis, args.out)
        experiment.log.info("-> %s", args.out / "gap.md")
        if args.results.is_file():
            experiment.log.info(
                "next: python -m icetransfer.recommend --hours 100 --results %s", args.results
            )

    experiment.main(run)


if __name__ == "__main__":
    _run()
