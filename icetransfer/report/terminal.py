"""Reports at the prompt, as wide as it is."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from icetransfer.analysis import gap_report
from icetransfer.config import hours_label
from icetransfer.report import page
from icetransfer.report.tables import error_tables
from icetransfer.stage.command import FILE_WIDTH, printer, slim_table

Row = dict[str, Any]
Lines = Sequence[Sequence[str]]
WIDTH = 80
NARROW = 14  # characters of a column that is not folded
NAMES = ("test set", "language", "precision", "data", "init", "runs", "languages")


def show(tree: Row, results: Path) -> None:
    """Prints the tables and remarks of a report.json; `results` is the folder it lies in."""
    console = printer()
    tables = error_tables(tree["results"], tree["gap"], bold=False)
    if tree["gap"]:
        title = "Gap: WER(EN) − WER(ML) in points; above zero ML is the better start"
        tables[title] = gap_report.gap_table(tree["gap"])
    for title, (header, lines) in tables.items():
        print_table(console, title, header, lines)
    for note in tree["remarks"]:
        console.print(note, markup=False, soft_wrap=not console.is_terminal)
    for failure in tree["failures"]:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    for cell in tree["missing"]:
        console.print(f"missing: {cell}", markup=False, soft_wrap=True)
    if said := _last_gap(tree["gap"]):
        console.print(said, markup=False, soft_wrap=not console.is_terminal)
    here = Path(os.path.relpath(results))
    if tree["gap"]:
        console.print(
            f"next: python -m icetransfer.recommend --hours 100 --results {here / 'results.csv'}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"report: {here / 'report.md'}", markup=False, soft_wrap=True)


def _last_gap(analysis: Row | None) -> str:
    """The gap with most data, at the shortest latency of the first test set and precision."""
    if not analysis or not analysis["mean_gap"]:
        return ""
    hours = max(row["hours"] for row in analysis["mean_gap"])
    rows = [row for row in analysis["mean_gap"] if row["hours"] == hours]
    row = min(rows, key=lambda x: (x["test_set"], x["precision"], x["chunk_ms"] < 0, x["chunk_ms"]))
    where = f"{row['test_set']}, {row['precision']}, {gap_report.tier_label(row['chunk_ms'])}"
    return (
        f"With {hours_label(hours)} of data ({where}): gap "
        f"{gap_report.value(row, 'gap', 'ci')} points"
    )


def print_table(console: Console, title: str, header: Sequence[str], lines: Lines) -> None:
    """Prints a table whole where it fits, else without what is the same in every line, or CER."""
    table = _fill(Table(title=title, title_justify="left"), header, lines)
    wide = console.options.update(max_width=10 * FILE_WIDTH)
    if Measurement.get(console, wide, table).maximum <= console.width:
        console.print(table)
        return
    groups: dict[str, list[Sequence[str]]] = defaultdict(list)
    by = header.index("precision") if "precision" in header else None
    for line in lines:
        groups[line[by] if by is not None else ""].append(line)
    for group in groups.values():
        same = {
            index: group[0][index]
            for index, name in enumerate(header)
            if name in NAMES and len({line[index] for line in group}) == 1
        }
        kept = [i for i in range(len(header)) if i not in same and header[i] != "runs"]
        facts = ", ".join(f"{header[index]} {text}" for index, text in same.items())
        narrow = [[_narrow(header, line, index) for index in kept] for line in group]
        heads = ["lang" if header[index] == "language" else header[index] for index in kept]
        short = title.replace("WER / CER", "WER")
        console.print(_fill(slim_table(f"{short}\n{facts}" if facts else short), heads, narrow))


def _narrow(header: Sequence[str], line: Sequence[str], index: int) -> str:
    """A cell without CER after WER; intervals stand below their value, runs beside their init."""
    if header[index] == "init" and "runs" in header and (runs := line[header.index("runs")]) != "1":
        return f"{line[index]} ×{runs}"
    cell = re.sub(r"(?<=\d) / [\d.]+", "", line[index])
    return cell.replace(" ± ", " ±").replace(" [", "\n[")


def _fill(table: Table, header: Sequence[str], lines: Lines) -> Table:
    for column in header:
        table.add_column(column, justify="left" if column in (*NAMES, "lang") else "right")
    for line in lines:
        table.add_row(*line)
    return table


def show_document(document: page.Document) -> None:
    """Prints a page, its tables shortened, without figures and players; 80 columns suffice."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(document.title, style="bold", markup=False)
    for part in document.parts:
        if isinstance(part, page.Heading):
            console.print(f"\n{part.text}", style="bold", markup=False)
        elif isinstance(part, page.TablePart):
            _show_table(console, part)
        elif isinstance(part, page.Text | page.Code):
            console.print(page.plain(part.text), markup=False)
        elif isinstance(part, page.Answer | page.Bullets):
            if isinstance(part, page.Answer):
                console.print(page.plain(part.text), style="bold", markup=False)
            for line in part.lines:
                console.print(Padding(Text(f"* {page.plain(line)}"), (0, 0, 0, 2)))


def _show_table(console: Console, part: page.TablePart) -> None:
    table = slim_table(None)
    for column, *cells in zip(part.header, *part.rows[: part.first], strict=True):
        narrow = max(len(page.plain(cell)) for cell in (column, *cells)) <= NARROW
        table.add_column(Text(column), no_wrap=narrow, overflow="fold")
    for line in part.rows[: part.first]:
        table.add_row(*(Text(page.plain(cell)) for cell in line))
    console.print(table)
    if part.first is not None and len(part.rows) > part.first:
        console.print(f"and {len(part.rows) - part.first} more on the page", style="italic")
