"""Which stage of an export is at work, and for how long: one line on a person's terminal, gone when
it is done; nothing for short work.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE_S = 2.0


class StageLine:
    """The line of one export: it appears after `patience_s` and tells the newest stage, and the
    time since that began.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._lock = threading.Lock()
        self._patience_s, self._there = patience_s, False
        # The stream itself: converters are run with sys.stderr pointing elsewhere. Nothing is
        # redirected, for results go to standard output meanwhile.
        console = Console(file=sys.stderr)
        self._line: Progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._line.add_task("exporting", total=None)
        self.show()

    def tell(self, name: str) -> None:
        """A stage begins."""
        self._line.reset(self._task, description=name, total=None)

    def show(self) -> None:
        """Let the line appear once the work has lasted."""
        self._wanted = True
        self._timer = threading.Timer(self._patience_s, self._appear)
        self._timer.daemon = True
        self._timer.start()

    def hide(self) -> None:
        """Take the line away."""
        self._timer.cancel()
        with self._lock:
            self._wanted = False
            if self._there:
                self._line.stop()
            self._there = False

    def _appear(self) -> None:
        with self._lock:
            # A terminal that cannot move its cursor would get lines instead of one.
            if self._wanted and self._line.console.is_interactive:
                self._line.start()
                self._there = True


_shown: ContextVar[StageLine | None] = ContextVar("shown", default=None)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def stages_shown(*, quiet: bool = False, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Show the stages that begin within this block, if standard error is a terminal. Within another
    such block, that one's line goes on.

    quiet: show nothing, whatever blocks within this one say.
    """
    if quiet:
        silence = _quiet.set(True)
        try:
            yield
        finally:
            _quiet.reset(silence)
        return
    if _quiet.get() or _shown.get() is not None or not sys.stderr.isatty():
        yield
        return
    line = StageLine(patience_s)
    token = _shown.set(line)
    try:
        yield
    finally:
        _shown.reset(token)
        line.hide()


def stage(name: str) -> None:
    """A stage of the export begins, such as `simplifying`; the one before it is over."""
    line = _shown.get()
    if line is not None:
        line.tell(name)


@contextlib.contextmanager
def stages_hidden() -> Iterator[None]:
    """Take the line away for this block, which shows a bar of its own."""
    line = _shown.get()
    if line is not None:
        line.hide()
    try:
        yield
    finally:
        if line is not None:
            line.show()
