"""Collects a sweep's results, analyses them, and writes the pages and the data beside them."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icetransfer import experiment, gap
from icetransfer.analysis import gap_report, significance
from icetransfer.analysis.significance import Utterances
from icetransfer.analysis.sweep_results import read_all, read_results
from icetransfer.config import hours_label
from icetransfer.report import PLAN, figures, page
from icetransfer.report.document import document
from icetransfer.report.tables import COLUMNS, remarks
from icetransfer.score import condition_results, planned_runs
from icetransfer.stage import atomic, cost
from icetransfer.stage.json_file import read_json

FIGURES = "figures"
CONDITION_KEYS = (
    *("language", "init", "seed", "test_set", "chunk_ms", "engine", "precision"),
    *("condition", "wer", "clean_wer", "words", "unchanged"),
)
PUBLISHED_DATA = "results-data"  # beside a published report: report.json, results.csv, figures

Row = dict[str, Any]


def collect(plan: Row, results: Path, root: Path) -> tuple[list[Row], list[str], list[Row]]:
    """Reads the results of all planned cells.

    Args:
        plan: the sweep's plan.json.
        results: the report's folder, to which paths are relative.
        root: the repository, in which the experiments lie.

    Returns:
        A row for each wer.json, a line for each cell without all of its results, and what each cell
        cost.
    """
    rows, missing, costs = [], [], []
    for cell in plan["cells"]:
        folder = root / cell["experiment"]
        name = f"{cell['language']} {cell['init']} {hours_label(cell['hours'])} seed {cell['seed']}"
        if not (folder / "config.yaml").is_file():
            missing.append(f"{name}: not begun")
            continue
        opened = experiment.open_experiment(folder)
        runs = planned_runs(opened.config)
        found = [run.folder(opened.decode_dir) / "wer.json" for run in runs]
        there = [path for path in found if path.is_file()]
        if len(there) < len(found):
            missing.append(
                f"{name}: {len(found) - len(there)} of {len(found)} results missing "
                f"({cell['experiment']})"
            )
        own = [_read_result(path, results, cell) for path in there]
        rows += own
        costs.append(_cost(cell, folder, own))
    rows.sort(key=lambda r: [str(r[key]) for key in (*COLUMNS[:6], "engine", "seed")])
    return rows, missing, costs


def collect_conditions(plan: Row, root: Path) -> list[Row]:
    """What `icetransfer.robustness` has found in the planned cells; see `collect`."""
    rows = []
    for cell in plan["cells"]:
        folder = root / cell["experiment"]
        if (folder / "config.yaml").is_file():
            for result in condition_results(experiment.open_experiment(folder)):
                rows.append({key: result[key] for key in CONDITION_KEYS} | {"hours": cell["hours"]})
    return rows


def _read_result(path: Path, results: Path, cell: Row) -> Row:
    """A wer.json, and where its utterances are."""
    result: Row = read_json(path)
    result.pop("provenance", None)  # stands in wer.json; the sweep's own is in the report
    result["hours"] = cell["hours"]
    result["recogs"] = os.path.relpath(path.with_name("recogs.jsonl"), results)
    return result


def add_intervals(rows: list[Row], known: Mapping[Path, Utterances], results: Path) -> None:
    """Gives the rows whose utterances are known the interval of their WER."""
    for row in rows:
        utterances = known.get(results / row["recogs"])
        bounds = significance.wer_interval(utterances) if utterances else None
        if bounds:
            row["wer_ci_low"], row["wer_ci_high"] = bounds


def _cost(cell: Row, folder: Path, results: list[Row]) -> Row:
    """Device hours of a cell: of its training, when it was not resumed, and of its decoding.

    And of every stage, over all its runs, as `cost.jsonl` has them.
    """
    training: Row = {}
    path = folder / "provenance.json"
    if path.is_file():
        training = read_json(path, ()).get("train", {})
    seconds = [r["rtf"] * r["audio_seconds"] for r in results if "audio_seconds" in r]
    return {
        **{key: cell[key] for key in ("language", "init", "hours", "seed")},
        "device": training.get("device"),
        "train_hours": training["seconds"] / 3600 if "seconds" in training else None,
        "resumed_at_step": (training.get("steps") or [0])[0],
        "decode_hours": sum(seconds) / 3600 if seconds else None,
        "stages": cost.read_costs(folder / "log" / "cost.jsonl"),
    }


def results_csv(rows: list[Row]) -> str:
    """The text of results.csv, which `icetransfer.gap` and `icetransfer.recommend` read."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_report(results: Path, root: Path) -> Row:
    """Writes the report of the sweep whose plan lies in `results`.

    Returns:
        What is in report.json.

    Raises:
        ValueError: there is no plan.
    """
    path = results / PLAN
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run ./run_all.sh, which makes it")
    plan = read_json(path, ["sweep", "cells"])
    rows, missing, costs = collect(plan, results, root)
    atomic.write_text(results / "results.csv", results_csv(rows))
    notes = remarks(rows, results)
    analysis = None
    try:
        measured = read_results(results / "results.csv")
        known = read_all(measured)
        add_intervals(rows, known, results)
        analysis = gap.analyse(measured, known)
        gap_report.write(analysis, results)
        notes.append("Noise. " + gap_report.noise_text(analysis["noise"]))
    except ValueError as error:
        notes.append(f"No gap: {error}")
    tree = {
        "sweep": plan["sweep"],
        "provenance": experiment.provenance(sweep=plan["sweep"]),
        "missing": missing,
        "failures": plan["failures"],
        "results": rows,
        "conditions": collect_conditions(plan, root),
        "costs": costs,
        "data_costs": {
            language: cost.read_costs(root / folder / "log" / "cost.jsonl")
            for language, folder in plan.get("data", {}).items()
        },
        "gap": analysis,
        "remarks": notes,
    }
    atomic.write_text(results / "report.json", json.dumps(tree, indent=1) + "\n")
    written = document(tree, "")
    write_figures(written, results / FIGURES)
    atomic.write_text(results / "report.md", page.to_markdown(written, FIGURES))
    atomic.write_text(results / "report.html", page.to_html(written))
    return tree


def write_figures(written: page.Document, folder: Path) -> None:
    """Writes every figure as an SVG file, for Markdown."""
    for drawing in written.drawings:
        atomic.write_text(folder / f"{drawing.name}.svg", figures.standalone(drawing.svg))


def published_markdown(tree: Row) -> str:
    """The text of a published report, from its report.json."""
    folder = PUBLISHED_DATA
    return page.to_markdown(document(tree, f"{folder}/"), folder)


def publish(results: Path, target: Path) -> None:
    """Writes the report as a Markdown file with its data and figures in a folder beside it.

    Raises:
        ValueError: there is no report yet, or cells are missing.
    """
    path = results / "report.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the report without --publish first")
    tree = read_json(path, ["missing", "failures", "gap", "results"])
    holes = [*tree["missing"], *tree["failures"]]
    if holes or tree["gap"] is None:
        raise ValueError(f"{path}: not to be published with {len(holes)} holes: {holes[:3]}")
    for row in tree["results"]:
        row.pop("recogs", None)  # utterances stay where they were made
    folder = target.with_name(PUBLISHED_DATA)
    atomic.write_text(folder / "report.json", json.dumps(tree, indent=1) + "\n")
    atomic.write_text(folder / "results.csv", results_csv(tree["results"]))
    atomic.write_text(folder / "gap.json", json.dumps(tree["gap"], indent=1) + "\n")
    write_figures(document(tree, ""), folder)
    atomic.write_text(target, published_markdown(tree))
