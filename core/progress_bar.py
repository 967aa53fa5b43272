"""A progress bar for long counts, shown on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, quiet: bool = False, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Count up to `total` with a bar that appears at the first call of the yielded function.

    Args:
        title: The text left of the bar.
        total: The count at which the bar is full.
        quiet: Show nothing.
        console: Where to draw, by default standard error. Without a terminal nothing is drawn.

    Yields:
        `advance(done)`, which sets the count.
    """
    console = console or Console(stderr=True)
    bar: Progress | None = None
    row = None

    def advance(done: int) -> None:
        nonlocal bar, row
        if quiet or not console.is_terminal:
            return
        if bar is None:
            bar = make_bar(console, MofNCompleteColumn(), transient=True)
            bar.start()
            row = bar.add_task(title, total=total)
        assert row is not None
        bar.update(row, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def make_bar(console: Console, last: ProgressColumn, *, transient: bool = False) -> Progress:
    """A bar with its title, the column `last`, and the elapsed and remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        last,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=transient)
