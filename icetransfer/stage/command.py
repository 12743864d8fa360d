"""What command lines have in common: how their --help looks, and how wide they print."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 200  # characters: in a file, no line of a table needs breaking


def command_parser(doc: str | None, reference: str) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring as it is written, under the name one types.

    Args:
        doc: the docstring; its indented lines are the examples.
        reference: the document that says more.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else "icetransfer"
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=doc,
        epilog=f"Reference: {reference}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def printer() -> "Console":
    """A console as wide as the terminal; wide where there is none."""
    from rich.console import Console  # the doctor runs where it is not installed

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def slim_table(title: str | None) -> "Table":
    """A table without lines between its columns, so that more of them fit a terminal."""
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False, show_edge=False,
    )  # fmt: skip
