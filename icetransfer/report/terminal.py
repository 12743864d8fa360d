"""Reports at the prompt."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from icetransfer.analysis import gap_report
from icetransfer.report import page
from icetransfer.report.tables import error_tables

Row = dict[str, Any]

WIDTH = 80
NARROW = 14  # characters of a column that is not folded


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
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for column, *cells in zip(part.header, *part.rows[: part.first], strict=True):
        narrow = max(len(page.plain(cell)) for cell in (column, *cells)) <= NARROW
        table.add_column(Text(column), no_wrap=narrow, overflow="fold")
    for line in part.rows[: part.first]:
        table.add_row(*(Text(page.plain(cell)) for cell in line))
    console.print(table)
    if part.first is not None and len(part.rows) > part.first:
        console.print(f"and {len(part.rows) - part.first} more on the page", style="italic")
