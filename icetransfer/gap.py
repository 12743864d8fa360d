"""How much better a multilingual start is than an English one: the gap, its decay, its noise.

    python -m icetransfer.gap --results results.csv --out DIR

The gap is WER(en) - WER(ml) in points: above zero, the multilingual start is the better one.  Its
mean over languages is given for every test set, precision, latency and amount of training data,
with intervals from resampling the languages and, where the recognised utterances are at hand
(column `recogs`), the utterances too.  A power law gap = a * hours^-b is fitted on the linear
scale, so that gaps at or below zero take part.

results.csv has the columns language, init, hours, test_set, chunk_ms (-1: offline), precision, wer
(in percent), and may have engine, seed, model_bytes and recogs (a recogs.jsonl, relative to the
file).  Of several engines the first of sherpa, onnxruntime, torch counts; seeds are averaged.
"""

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import kaldialign
import numpy
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from icetransfer import experiment, gap_report
from icetransfer.gap_report import latency_order

REQUIRED = ("language", "init", "hours", "test_set", "chunk_ms", "precision", "wer")
ENGINES = ("sherpa", "onnxruntime", "torch", "")  # the runtime that ships comes first
INITS = ("en", "ml")
REPLICATES = 2000
CONFIDENCE = 95  # percent
EXPONENTS = numpy.arange(-2, 6.001, 0.01)  # where the fit looks for b

Array = NDArray[numpy.float64]
Row = dict[str, Any]


class Point(NamedTuple):
    """Where a gap is measured."""

    test_set: str
    precision: str
    chunk_ms: int
    hours: float


@dataclass(frozen=True)
class Result:
    """One line of results.csv."""

    language: str
    init: str
    point: Point
    wer: float  # percent
    seed: int = 0
    engine: str = ""
    model_bytes: int | None = None
    recogs: Path | None = None


def read_results(path: Path) -> list[Result]:
    """Reads results.csv and keeps one engine for each measurement.

    Raises:
        ValueError: the file or a column is missing, a value is not a number, or two lines are of
            the same measurement.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a CSV file with {', '.join(REQUIRED)}")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        results = [_parse(line, f"{path}:{reader.line_num}", path.parent) for line in reader]
    if not results:
        raise ValueError(f"{path} has no results")
    best: dict[tuple[object, ...], Result] = {}
    for result in results:
        key = (result.language, result.init, result.point, result.seed)
        rival = best.get(key)
        if rival and rival.engine == result.engine:
            raise ValueError(f"{path}: two lines of {result.language}, {result.init}, {key[2]}")
        if not rival or ENGINES.index(result.engine) < ENGINES.index(rival.engine):
            best[key] = result
    return list(best.values())


def _parse(line: dict[str, str], where: str, folder: Path) -> Result:
    try:
        point = Point(
            line["test_set"], line["precision"], int(line["chunk_ms"]), float(line["hours"])
        )
        result = Result(
            language=line["language"],
            init=line["init"],
            point=point,
            wer=float(line["wer"]),
            seed=int(line.get("seed") or 0),
            engine=line.get("engine") or "",
            model_bytes=int(line["model_bytes"]) if line.get("model_bytes") else None,
            recogs=folder / line["recogs"] if line.get("recogs") else None,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected numbers in hours, chunk_ms, wer") from None
    if not (math.isfinite(result.wer) and result.wer >= 0 and 0 < point.hours < math.inf):
        raise ValueError(f"{where}: wer={result.wer} and hours={point.hours} cannot be")
    if result.engine not in ENGINES:
        raise ValueError(f"{where}: engine {result.engine!r} is none of {', '.join(ENGINES[:3])}")
    return result


class Resampling:
    """The same random draws of languages and of utterances for every number of a report.

    Every quantity is an array of 1 + REPLICATES values.  The first is computed from the data as
    they are, the others from resampled data, so that all arithmetic carries its uncertainty along
    and stays paired: both inits, all latencies and all amounts of data see the same draw.
    Utterances are drawn one by one, not in clusters by speaker.
    """

    def __init__(self, languages: Iterable[str], seed: int = 1) -> None:
        self.languages = sorted(set(languages))
        self.seed = seed
        count = len(self.languages)
        rng = numpy.random.default_rng(seed)
        draws = rng.multinomial(count, [1 / count] * count, REPLICATES)
        weights = numpy.vstack([numpy.ones(count), draws]).T.astype(numpy.float64)
        self.language_weights = dict(zip(self.languages, weights, strict=True))
        self.resamples_utterances = False
        self._utterance_weights: dict[tuple[str, str, tuple[str, ...]], Array] = {}

    def wer(self, result: Result) -> Array:
        """The result's WER, in percent, over resampled utterances where they are at hand."""
        if result.recogs is None or not result.recogs.is_file():
            return numpy.full(1 + REPLICATES, result.wer)
        self.resamples_utterances = True
        ids, errors, words = _utterances(result.recogs)
        weights = self._weights_of((result.language, result.point.test_set, ids))
        drawn: Array = 100 * (weights @ errors) / numpy.maximum(weights @ words, 1)
        drawn[0] = result.wer
        return drawn

    def _weights_of(self, key: tuple[str, str, tuple[str, ...]]) -> Array:
        if key not in self._utterance_weights:
            language, test_set, ids = key
            rng = numpy.random.default_rng([self.seed, *f"{language}/{test_set}".encode()])
            draws = rng.multinomial(len(ids), [1 / len(ids)] * len(ids), REPLICATES)
            self._utterance_weights[key] = numpy.vstack([numpy.ones(len(ids)), draws]).astype(
                numpy.float64
            )
        return self._utterance_weights[key]

    def mean(self, by_language: dict[str, Array]) -> Array:
        """The mean over languages; nan in draws that hold none of them."""
        weights = sum(self.language_weights[name] for name in by_language)
        total = sum(self.language_weights[name] * by_language[name] for name in by_language)
        with numpy.errstate(invalid="ignore", divide="ignore"):
            result: Array = numpy.asarray(total) / numpy.asarray(weights)
        return result


def _utterances(recogs: Path) -> tuple[tuple[str, ...], Array, Array]:
    """Ids, word errors and reference words of a recogs.jsonl."""
    rows = [json.loads(line) for line in recogs.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: str(row["id"]))
    errors = [kaldialign.edit_distance(r["ref"].split(), r["hyp"].split())["total"] for r in rows]
    words = [len(row["ref"].split()) for row in rows]
    return (
        tuple(str(row["id"]) for row in rows),
        numpy.array(errors, numpy.float64),
        numpy.array(words, numpy.float64),
    )


def interval(draws: Array) -> tuple[float | None, float | None]:
    """The percentile interval of the resampled values; None when nothing was resampled."""
    replicates = draws[1:][numpy.isfinite(draws[1:])]
    if replicates.size == 0 or numpy.ptp(replicates) == 0:
        return None, None
    low, high = numpy.percentile(replicates, [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2])
    return float(low), float(high)


def _with_interval(name: str, draws: Array) -> Row:
    low, high = interval(draws)
    prefix = "ci" if name in ("gap", "spread") else f"{name}_ci"
    return {name: float(draws[0]), f"{prefix}_low": low, f"{prefix}_high": high}


Wers = dict[Point, dict[str, dict[tuple[str, int], Array]]]  # init -> (language, seed) -> WER


def collect(results: Sequence[Result], resampling: Resampling) -> Wers:
    """Sorts the WERs by where they were measured."""
    wers: Wers = defaultdict(lambda: defaultdict(dict))
    for result in results:
        wers[result.point][result.init][result.language, result.seed] = resampling.wer(result)
    return wers


def language_gaps(by_init: dict[str, dict[tuple[str, int], Array]]) -> dict[str, Array]:
    """WER(en) - WER(ml) by language, over the seeds that both have."""
    english, multilingual = (by_init.get(init, {}) for init in INITS)
    pairs = defaultdict(list)
    for key in sorted(english.keys() & multilingual.keys()):
        pairs[key[0]].append(english[key] - multilingual[key])
    return {language: numpy.mean(gaps, axis=0) for language, gaps in pairs.items()}


def mean_gaps(wers: Wers, resampling: Resampling) -> dict[Point, tuple[Array, int]]:
    """The mean gap and the number of languages in it, at every point that has one."""
    gaps = {}
    for point in sorted(wers):
        by_language = language_gaps(wers[point])
        if by_language:
            gaps[point] = resampling.mean(by_language), len(by_language)
    return gaps


@dataclass(frozen=True)
class PowerLaw:
    """gap = a * hours^-b, fitted to one or more points; a and b None where that says nothing."""

    a: float | None
    b: float | None
    b_low: float | None
    b_high: float | None
    n_points: int
    method: str

    @property
    def factor_per_doubling(self) -> float | None:
        """What a doubling of the hours multiplies the gap by."""
        return None if self.b is None else float(2**-self.b)

    def gap(self, hours: float) -> float | None:
        """The gap expected at `hours`, in WER points."""
        return None if self.a is None or self.b is None else float(self.a * hours**-self.b)


def fit_power_law(hours: Sequence[float], gaps: Sequence[Array]) -> PowerLaw:
    """Fits gap = a * hours^-b by least squares on the linear scale.

    For a given b the best a is a projection, so b alone is searched, first on a grid and then
    between its neighbours (Golub and Pereyra 1973, variable projection).

    Args:
        hours: amounts of training data.
        gaps: the gap at each of them: the estimate, then the resampled values.
    """
    count = len(hours)
    if count < 2:
        return PowerLaw(None, None, None, None, count, "one amount of data: no decay to be seen")
    x = numpy.asarray(hours, numpy.float64)
    # hours relative to their geometric mean: without it, steep laws lose all digits
    centre = float(numpy.exp(numpy.log(x).mean()))
    curves = (x / centre)[:, None] ** -EXPONENTS[None, :]
    norms = (curves**2).sum(0)
    stacked = numpy.stack(gaps).T  # (1 + replicates, points)
    explained = (stacked @ curves) ** 2 / norms
    best = explained.argmax(1)
    at_edge = (best == 0) | (best == len(EXPONENTS) - 1)
    estimate = stacked[0]
    if at_edge[0] or not estimate.any():
        reason = "no power law with an exponent of -2 to 6 is nearest: the gap changes its sign"
        return PowerLaw(None, None, None, None, count, reason)

    def unexplained(b: float) -> float:
        curve = (x / centre) ** -b
        return float(estimate @ estimate - (estimate @ curve) ** 2 / (curve @ curve))

    middle = float(EXPONENTS[best[0]])
    bounds = (middle - 0.01, middle + 0.01)
    b = float(minimize_scalar(unexplained, bounds=bounds, options={"xatol": 1e-9}).x)
    curve = (x / centre) ** -b
    a = float(estimate @ curve / (curve @ curve) * centre**b)
    finite = numpy.isfinite(stacked).all(1)
    low, high = interval(numpy.where(finite, EXPONENTS[best], numpy.nan))
    method = "least squares on the linear scale"
    if count == 2:
        method += "; two points: they fix the law and cannot test it"
    if at_edge[1:][finite[1:]].any():
        method += (
            f"; {100 * at_edge[1:].mean():.0f} % of the resamples reach the edge of the search "
            f"(-2 to 6), where the interval of b is cut"
        )
    return PowerLaw(a, b, low, high, count, method)


def power_laws(gaps: dict[Point, tuple[Array, int]]) -> list[Row]:
    """A law for every test set, precision and latency."""
    rows = []
    for series in sorted({point[:3] for point in gaps}):
        points = [point for point in gaps if point[:3] == series]
        law = fit_power_law([p.hours for p in points], [gaps[p][0] for p in points])
        names = dict(zip(("test_set", "precision", "chunk_ms"), series, strict=True))
        rows.append(
            names
            | {
                "a": law.a,
                "b": law.b,
                "b_ci_low": law.b_low,
                "b_ci_high": law.b_high,
                "factor_per_doubling": law.factor_per_doubling,
                "n_points": law.n_points,
                "method": law.method,
            }
        )
    return rows


def latency_rows(gaps: dict[Point, tuple[Array, int]]) -> list[Row]:
    """Whether the gap depends on the latency.

    `spread` is the largest less the smallest gap over the tiers; noise alone keeps it above zero.
    `trend` is the gap at the shortest latency less that at the longest, zero but for noise when
    latency does not matter.
    """
    rows = []
    for test_set, precision, hours in sorted({(p.test_set, p.precision, p.hours) for p in gaps}):
        tiers = [
            p for p in gaps if (p.test_set, p.precision, p.hours) == (test_set, precision, hours)
        ]
        if len(tiers) < 2:
            continue
        tiers.sort(key=lambda p: latency_order(p.chunk_ms))
        stacked = numpy.stack([gaps[point][0] for point in tiers])
        rows.append(
            {"test_set": test_set, "precision": precision, "hours": hours}
            | {"chunk_ms": [point.chunk_ms for point in tiers]}
            | _with_interval("spread", stacked.max(0) - stacked.min(0))
            | _with_interval("trend", stacked[0] - stacked[-1])
        )
    return rows


def quantisation_rows(results: Sequence[Result], wers: Wers, resampling: Resampling) -> list[Row]:
    """What each precision costs against fp32, and whether it costs one init more."""
    sizes = {(r.language, r.init, r.point, r.seed): r.model_bytes for r in results if r.model_bytes}
    rows = []
    for precision in sorted({point.precision for point in wers} - {"fp32"}):
        changes: dict[str, dict[str, list[Array]]] = {init: defaultdict(list) for init in INITS}
        ratios = []
        for point in wers:
            full = point._replace(precision="fp32")
            if point.precision != precision or full not in wers:
                continue
            for init in INITS:
                for key, wer in wers[point].get(init, {}).items():
                    if key not in wers[full].get(init, {}):
                        continue
                    changes[init][key[0]].append(wer - wers[full][init][key])
                    small = sizes.get((key[0], init, point, key[1]))
                    large = sizes.get((key[0], init, full, key[1]))
                    if small and large:
                        ratios.append(large / small)
        rows.append(_quantisation_row(precision, changes, ratios, resampling))
    return rows


def _quantisation_row(
    precision: str,
    changes: dict[str, dict[str, list[Array]]],
    ratios: list[float],
    resampling: Resampling,
) -> Row:
    by_init = {
        init: {name: numpy.mean(found, axis=0) for name, found in languages.items()}
        for init, languages in changes.items()
    }
    pooled: dict[str, list[Array]] = defaultdict(list)
    for languages in by_init.values():
        for name, change in languages.items():
            pooled[name].append(change)
    both = by_init["en"].keys() & by_init["ml"].keys()
    row: Row = {
        "precision": precision,
        "n": sum(len(f) for c in changes.values() for f in c.values()),
    }
    row["size_ratio"] = float(numpy.mean(ratios)) if ratios else None
    if pooled:
        mean = resampling.mean({name: numpy.mean(found, axis=0) for name, found in pooled.items()})
        row |= _with_interval("wer_change", mean)
    if both:
        differences = {name: by_init["ml"][name] - by_init["en"][name] for name in both}
        row |= _with_interval("ml_minus_en", resampling.mean(differences))
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
                    "wer_sd": {i: float(numpy.std(v, ddof=1)) for i, v in repeated.items()},
                    "gaps": gaps,
                    "gap_sd": float(numpy.std(gaps, ddof=1)) if len(gaps) > 1 else None,
                }
            )
    return rows


def analyse(results: Sequence[Result]) -> Row:
    """All of gap.json.

    Raises:
        ValueError: no measurement has both an EN and an ML result.
    """
    resampling = Resampling(result.language for result in results)
    wers = collect(results, resampling)
    gaps = mean_gaps(wers, resampling)
    if not gaps:
        raise ValueError("no language has both an en and an ml result of the same kind: no gap")
    return {
        "mean_gap": [
            point._asdict() | {"n_languages": count} | _with_interval("gap", draws)
            for point, (draws, count) in gaps.items()
        ],
        "power_law": power_laws(gaps),
        "latency": latency_rows(gaps),
        "quantisation": quantisation_rows(results, wers, resampling),
        "noise": noise_rows(wers),
        "method": {
            "gap": "WER(en) - WER(ml), points; mean over languages",
            "languages": resampling.languages,
            "resampled": (["languages"] if len(resampling.languages) > 1 else [])
            + (["utterances"] if resampling.resamples_utterances else []),
            "replicates": REPLICATES,
            "confidence_percent": CONFIDENCE,
            "seed": resampling.seed,
        },
    }


def _run() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="results.csv")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for gap.json, gap.md, plots"
    )
    args = parser.parse_args()

    def run() -> None:
        analysis = analyse(read_results(args.results))
        gap_report.write(analysis, args.out)
        experiment.log.info("-> %s", args.out / "gap.md")

    experiment.main(run)


if __name__ == "__main__":
    _run()
