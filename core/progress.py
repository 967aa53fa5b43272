"""The progress of long work: a bar on the terminal, or one line for each step."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

# Called with the share done (0 to 1) and what is being done.
Progress = Callable[[float, str], None]
PATIENCE_S = 2.0
LINE_INTERVAL_S = 2.0


@contextlib.contextmanager
def progress_bar(
    *, quiet: bool = False, replacement: Progress | None = None, patience_s: float = PATIENCE_S
) -> Iterator[Progress]:
    """Yield the function that reports progress, `report(share, text)`.

    A bar appears on standard error once `patience_s` seconds have passed, and only on a terminal;
    `replacement`, where given, is yielded in place of it.
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

    def report(share: float, text: str) -> None:
        nonlocal shown
        bar.update(task, completed=share, description=text)
        if not shown and time.perf_counter() - start > patience_s:
            bar.start()
            shown = True

    try:
        yield report
    finally:
        if shown:
            bar.stop()


def step_lines(stream: TextIO) -> Progress:
    """Return progress that writes a line for each step, and every two seconds of a long one.

    The step is the text up to its first colon.
    """
    current: str | None = None
    last_line_s = 0.0

    def report(share: float, text: str) -> None:
        nonlocal current, last_line_s
        step, now_s = text.split(":")[0], time.monotonic()
        if step == current and now_s - last_line_s < LINE_INTERVAL_S:
            return
        current, last_line_s = step, now_s
        stream.write(f"{100 * share:3.0f} %  {text}\n")
        stream.flush()

    return report
