"""What command lines have in common: how their --help looks, and how wide they print."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

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
