"""The report of a sweep: every WER and CER, the gap, what its noise is, and what is missing.

    python -m icetransfer.report --results results/mini

Reads the sweep's plan.json and the wer.json files of its cells; writes results.csv, report.md,
report.json, gap.json, gap.md and a plot into the same folder, and prints the tables.
"""

import argparse
import csv
import io
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from icetransfer import atomic, experiment, gap, gap_report
from icetransfer.config import hours_label
from icetransfer.gap_report import latency_order, markdown_table, tier_label
from icetransfer.score import planned_runs

PLAN = "plan.json"
COLUMNS = (
    *("language", "init", "hours", "test_set", "chunk_ms", "precision", "wer", "cer"),
    *("engine", "seed", "words", "errors", "utterances", "failed", "rtf", "model_bytes", "recogs"),
)
INITS = ("en", "ml", "random")

Row = dict[str, Any]
TableData = tuple[list[str], list[list[str]]]


def collect(plan: Row, results: Path, root: Path) -> tuple[list[Row], list[str]]:
    """Reads the results of all planned cells.

    Args:
        plan: the sweep's plan.json.
        results: the report's folder, to which paths are relative.
        root: the repository, in which the experiments lie.

    Returns:
        A row for each wer.json, and a line for each cell without all of its results.
    """
    rows, missing = [], []
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
                f"{name}: {len(found) - len(there)} of {len(found)} results missing ({folder})"
            )
        for path in there:
            result = json.loads(path.read_text(encoding="utf-8"))
            result["recogs"] = os.path.relpath(path.with_name("recogs.jsonl"), results)
            result["hours"] = cell["hours"]
            rows.append(result)
    rows.sort(key=lambda r: [str(r[key]) for key in (*COLUMNS[:6], "engine", "seed")])
    return rows, missing


def results_csv(rows: list[Row]) -> str:
    """The text of results.csv, which `icetransfer.gap` and `icetransfer.recommend` read."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shipped(rows: list[Row]) -> list[Row]:
    """One engine for each measurement, by the same preference as the gap's."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda r: gap.ENGINES.index(r["engine"]), reverse=True):
        best[_measurement(row)] = row
    return list(best.values())


def _measurement(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in (*COLUMNS[:6], "seed"))


def error_table(rows: list[Row], precision: str) -> TableData:
    """WER and CER: a line for each language, init and amount of data, a column for each tier.

    A cell repeated with several seeds stands as their mean, with its number of runs.
    """
    groups: dict[tuple[Any, ...], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in shipped(rows):
        if row["precision"] == precision:
            key = (row["test_set"], row["language"], row["hours"], INITS.index(row["init"]))
            groups[key][row["chunk_ms"]].append(row)
    tiers = sorted({tier for found in groups.values() for tier in found}, key=latency_order)
    lines = []
    for test_set, language, hours, init in sorted(groups):
        found = groups[test_set, language, hours, init]
        count = max(len(repeats) for repeats in found.values())
        cells = [
            f"{_mean(found[tier], 'wer'):.1f} / {_mean(found[tier], 'cer'):.1f}"
            if tier in found
            else ""
            for tier in tiers
        ]
        lines.append([test_set, language, hours_label(hours), INITS[init], str(count), *cells])
    return ["test set", "language", "data", "init", "runs", *map(tier_label, tiers)], lines


def _mean(rows: list[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def remarks(rows: list[Row]) -> list[str]:
    """What a reader should know besides the tables."""
    lines = []
    failed = sum(row["failed"] for row in rows)
    if failed:
        lines.append(f"{failed} recordings could not be recognised; each counts as all deleted.")
    full: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        full[_measurement(row)][row["engine"]] = row["wer"]
    spreads = [
        max(found.values()) - min(found.values()) for found in full.values() if len(found) > 1
    ]
    if spreads:
        lines.append(
            f"Engines agree to {max(spreads):.2f} WER points where several decoded the same model."
        )
    control = _control(rows)
    if control:
        lines.append(control)
    return lines


def _control(rows: list[Row]) -> str:
    """How far either seed is from random initialisation, fp32, mean over tiers and languages."""
    wers: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in shipped(rows):
        if row["precision"] == "fp32":
            wers[row["hours"], row["language"], row["test_set"]][row["init"]].append(row["wer"])
    margins: dict[tuple[float, str], list[float]] = defaultdict(list)
    for (hours, _, _), by_init in wers.items():
        for init in ("en", "ml"):
            if init in by_init and "random" in by_init:
                pair = [sum(by_init[name]) / len(by_init[name]) for name in ("random", init)]
                margins[hours, init].append(pair[0] - pair[1])
    texts = [
        f"{init} by {sum(found) / len(found):+.1f} points at {hours_label(hours)}"
        for (hours, init), found in sorted(margins.items())
    ]
    if not texts:
        return ""
    return f"Better than random initialisation (fp32, mean over latencies): {', '.join(texts)}."


def write(results: Path, root: Path) -> None:
    """Writes and prints the report of the sweep whose plan lies in `results`.

    Raises:
        ValueError: there is no plan.
    """
    path = results / PLAN
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run ./run_all.sh, which makes it")
    plan = json.loads(path.read_text(encoding="utf-8"))
    rows, missing = collect(plan, results, root)
    atomic.write_text(results / "results.csv", results_csv(rows))
    precisions = sorted({row["precision"] for row in rows})
    tables = {
        f"WER / CER in percent, {precision}": error_table(rows, precision)
        for precision in precisions
    }
    notes = remarks(rows)
    analysis = None
    try:
        analysis = gap.analyse(gap.read_results(results / "results.csv"))
        gap_report.write(analysis, results)
        title = "Gap: WER(EN) − WER(ML) in points; above zero ML is the better start"
        tables[title] = gap_report.gap_table(analysis)
        notes.append("Noise. " + gap_report.noise_text(analysis["noise"]).split("\n")[0])
    except ValueError as error:
        notes.append(f"No gap: {error}")
    origin = experiment.provenance(sweep=plan["sweep"])
    tree = {"provenance": origin, "missing": missing, "failures": plan["failures"]}
    tree |= {"results": rows, "gap": analysis, "remarks": notes}
    atomic.write_text(results / "report.json", json.dumps(tree, indent=1) + "\n")
    text = _markdown(plan, tables, notes, missing, origin, analysis is not None)
    atomic.write_text(results / "report.md", text)
    _print(tables, notes, missing, plan["failures"], results)


def _markdown(
    plan: Row,
    tables: dict[str, TableData],
    notes: list[str],
    missing: list[str],
    origin: Row,
    has_gap: bool,
) -> str:
    parts = [f"# Sweep {plan['sweep']}"]
    for heading, found in (("Failed", plan["failures"]), ("Missing", missing)):
        if found:
            parts += [f"## {heading}", "\n".join(f"* {line}" for line in found)]
    for title, table in tables.items():
        parts += [f"## {title}", markdown_table(*table).rstrip()]
    parts += ["## Remarks", "\n".join(f"* {line}" for line in notes)]
    if has_gap:
        parts.append("Decay, latency, quantisation and noise: [gap.md](gap.md), with plots.")
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    dirty = " with changes" if origin["git_dirty"] else ""
    parts += [
        "## Provenance",
        f"Commit {origin['git_commit']}{dirty}; {origin['time']}; {origin['host']}, "
        f"{origin['cpus']} CPUs, {origin['platform']}; {versions}. The config, provenance and "
        f"checksums of each cell lie in its experiment folder.",
    ]
    return "\n\n".join(parts) + "\n"


def _print(
    tables: dict[str, TableData],
    notes: list[str],
    missing: list[str],
    failures: list[str],
    results: Path,
) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # in a file, no line needs breaking
    for title, (header, lines) in tables.items():
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(header):
            table.add_column(column, justify="left" if index < 4 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    for cell in missing:
        console.print(f"missing: {cell}", markup=False, soft_wrap=True)
    console.print(f"report: {results / 'report.md'}", markup=False, soft_wrap=True)


def _run() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="as results/mini")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    experiment.main(lambda: write(args.results, root))


if __name__ == "__main__":
    _run()
