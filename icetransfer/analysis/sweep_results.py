"""The WERs of a sweep as the analysis takes them: read, resampled, and as gaps by language.

`python -m icetransfer.gap --help` says what results.csv holds.
"""

import csv
import io
import math
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icetransfer.analysis.bootstrap import Resampling
from icetransfer.analysis.collapse import has_collapsed
from icetransfer.analysis.significance import Array, Utterances, read_utterances
from icetransfer.stage.json_file import read_json
from icetransfer.stage.parent import work_for_parent
from icetransfer.stage.text import read_text

REQUIRED = ("language", "init", "hours", "test_set", "chunk_ms", "precision", "wer")
ENGINES = ("sherpa", "onnxruntime", "torch", "")  # the runtime that ships comes first
COMPARED = ("en", "ml")  # the inits whose gap it is
FULL = "fp32"  # what other precisions are compared with
ROUNDED = 0.06  # WER points by which a hand-made results.csv may differ from its utterances
MANY_FILES = 1000  # that are worth starting processes for

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
    errors: int | None = None
    deletions: int | None = None

    @property
    def collapsed(self) -> bool:
        """Whether it measures a model that says next to nothing, and so no gap."""
        return has_collapsed(vars(self))


def read_results(path: Path) -> list[Result]:
    """Reads results.csv, or all wer.json under a folder; keeps one engine for each measurement.

    Raises:
        ValueError: the file or a column is missing, a value is not a number, or two lines are of
            the same measurement.
    """
    results = _from_folder(path) if path.is_dir() else _from_csv(path)
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


def _from_csv(path: Path) -> list[Result]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a CSV file with {', '.join(REQUIRED)}")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    return [_parse(line, f"{path}:{reader.line_num}", path.parent) for line in reader]


def _from_folder(folder: Path) -> list[Result]:
    results = []
    for path in sorted(folder.rglob("wer.json")):
        found = read_json(path, ())
        if "condition" in found:  # no gap is measured on recordings that were changed
            continue
        missing = [name for name in REQUIRED if found.get(name) is None]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        line = {name: str(value) for name, value in found.items() if value is not None}
        line["recogs"] = "recogs.jsonl"
        results.append(_parse(line, str(path), path.parent))
    return results


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
            errors=_count(line.get("errors")),
            deletions=_count(line.get("deletions")),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected numbers in hours, chunk_ms, wer") from None
    if not (math.isfinite(result.wer) and result.wer >= 0 and 0 < point.hours < math.inf):
        raise ValueError(f"{where}: wer={result.wer} and hours={point.hours} cannot be")
    if result.engine not in ENGINES:
        raise ValueError(f"{where}: engine {result.engine!r} is none of {', '.join(ENGINES[:3])}")
    return result


def _count(text: str | None) -> int | None:
    return int(text) if text else None


def without_collapsed(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """The results that measure something, and those that are of a collapsed training.

    Raises:
        ValueError: all of them are.
    """
    kept = [result for result in results if not result.collapsed]
    left_out = [result for result in results if result.collapsed]
    if results and not kept:
        raise ValueError(
            f"all {len(results)} results are of models that say next to nothing (WER over 90 %, "
            f"mostly deletions): nothing was measured; see docs/troubleshooting.md"
        )
    return kept, left_out


Wers = dict[Point, dict[str, dict[tuple[str, int], Array]]]  # init -> (language, seed) -> WER
Gaps = dict[Point, dict[str, Array]]  # language -> gap


def read_all(results: Sequence[Result]) -> dict[Path, Utterances]:
    """Reads the utterances of all results that have them, on all cores when there are many."""
    paths = sorted({r.recogs for r in results if r.recogs is not None and r.recogs.is_file()})
    if len(paths) < MANY_FILES:
        return {path: read_utterances(path) for path in paths}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=context, initializer=work_for_parent
    ) as pool:
        return dict(zip(paths, pool.map(read_utterances, paths, chunksize=16), strict=True))


def collect(
    results: Sequence[Result],
    resampling: Resampling,
    utterances: Mapping[Path, Utterances] | None = None,
) -> Wers:
    """Sorts the WERs by where they were measured, resampled where the utterances are at hand.

    Raises:
        ValueError: a result is not the WER of its utterances.
    """
    known = read_all(results) if utterances is None else utterances
    wers: Wers = defaultdict(lambda: defaultdict(dict))
    of_test_set: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.recogs is None or result.recogs not in known:
            draws = resampling.constant(result.wer)
            wers[result.point][result.init][result.language, result.seed] = draws
            continue
        found = known[result.recogs].wer
        if abs(found - result.wer) > ROUNDED:
            raise ValueError(
                f"{result.recogs}: WER {found:.2f} %, but the results say {result.wer:.2f} % of "
                f"{result.language}, {result.init}, {result.point}: not of the same decoding"
            )
        of_test_set[result.language, result.point.test_set].append(result)
    for (language, test_set), members in sorted(of_test_set.items()):
        systems = [known[r.recogs] for r in members if r.recogs is not None]
        for result, draws in zip(
            members, resampling.wers(language, test_set, systems), strict=True
        ):
            wers[result.point][result.init][language, result.seed] = draws
    return wers


def language_gaps(by_init: dict[str, dict[tuple[str, int], Array]]) -> dict[str, Array]:
    """WER(en) - WER(ml) by language, over the seeds that both have."""
    english, multilingual = (by_init.get(init, {}) for init in COMPARED)
    pairs = defaultdict(list)
    for key in sorted(english.keys() & multilingual.keys()):
        pairs[key[0]].append(english[key] - multilingual[key])
    return {language: np.mean(gaps, axis=0) for language, gaps in pairs.items()}


def collect_gaps(wers: Wers) -> Gaps:
    """The gap of every language, at every point that has one."""
    gaps = {point: language_gaps(wers[point]) for point in sorted(wers)}
    return {point: by_language for point, by_language in gaps.items() if by_language}
