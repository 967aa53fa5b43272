"""A bar on the terminal for work that lasts; nothing at all for work that is soon over."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[float, str], None]
PATIENCE_S = 2.0


@contextlib.contextmanager
def progress_bar(
    *, quiet: bool = False, replacement: Progress | None = None, patience_s: float = PATIENCE_S
) -> Iterator[Progress]:
    """Yield `tell(share, text)`; the bar appears on standard error once `patience_s` have passed,
    and only on a terminal.
    """
    if replacement is not None:
        yield replacement
        return
    if quiet or not sys.stderr.isatty():
        yield lambda share, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    start = time.perf_counter()
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("measuring", total=1.0)
    shown = False

    def tell(share: float, text: str) -> None:
        nonlocal shown
        bar.update(task, completed=share, description=text)
        if not shown and time.perf_counter() - start > patience_s:
            bar.start()
            shown = True

    try:
        yield tell
    finally:
        if shown:
            bar.stop()
