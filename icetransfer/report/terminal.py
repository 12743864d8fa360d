"""The report at the prompt."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from icetransfer.analysis import gap_report
from icetransfer.report.tables import error_tables

Row = dict[str, Any]


def show(tree: Row, results: Path) -> None:
    """Prints the tables and remarks of a report.json; `results` is the folder it lies in."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # in a file, no line needs breaking
    tables = error_tables(tree["results"], tree["gap"], bold=False)
    if tree["gap"]:
        title = "Gap: WER(EN) − WER(ML) in points; above zero ML is the better start"
        tables[title] = gap_report.gap_table(tree["gap"])
    for title, (header, lines) in tables.items():
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(header):
            table.add_column(column, justify="left" if index < 4 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for note in tree["remarks"]:
        console.print(note, markup=False, soft_wrap=True)
    for failure in tree["failures"]:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    for cell in tree["missing"]:
        console.print(f"missing: {cell}", markup=False, soft_wrap=True)
    console.print(f"report: {results / 'report.md'}", markup=False, soft_wrap=True)
