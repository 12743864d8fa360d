"""The bar of what takes longer than some seconds: on stderr, with the time that is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def progress_bar(amount: ProgressColumn | None = None, by_hand: bool = False) -> Progress:
    """Returns a bar to be used as a context, and told of its tasks.

    Args:
        amount: what stands behind the bar; None for "done/all" in whole numbers.
        by_hand: no thread redraws it, as processes are to be forked; `refresh=True` does.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), amount or MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=not by_hand)


def minutes_of() -> ProgressColumn:
    """Done and all of it, of what is counted in minutes."""
    return TextColumn("{task.completed:.1f}/{task.total:.1f} min")
