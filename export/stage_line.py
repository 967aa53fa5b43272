"""The running stage of an export and its time, as one line on a terminal.

The line is erased when the export is done, and does not appear for short work.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar

DELAY_S = 2.0


class StageLine:
    """The line of one export: it appears after `delay_s`, with the newest stage and its time."""

    def __init__(self, delay_s: float = DELAY_S) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._lock = threading.Lock()
        self._delay_s, self._visible = delay_s, False
        # The stream itself, since converters run with sys.stderr redirected. Standard output stays
        # untouched, since results are written to it meanwhile.
        self._line = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._line.add_task("exporting", total=None)
        self.show()

    def update(self, name: str) -> None:
        """Show that a stage begins."""
        self._line.reset(self._task, description=name, total=None)

    def show(self) -> None:
        """Let the line appear after the delay."""
        self._enabled = True
        self._timer = threading.Timer(self._delay_s, self._appear)
        self._timer.daemon = True
        self._timer.start()

    def hide(self) -> None:
        """Erase the line."""
        self._timer.cancel()
        with self._lock:
            self._enabled = False
            if self._visible:
                self._line.stop()
            self._visible = False

    def _appear(self) -> None:
        with self._lock:
            # A terminal that cannot move its cursor would get many lines instead of one.
            if self._enabled and self._line.console.is_interactive:
                self._line.start()
                self._visible = True


_shown: ContextVar[StageLine | None] = ContextVar("shown", default=None)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def stages_shown(*, quiet: bool = False, delay_s: float = DELAY_S) -> Iterator[None]:
    """Show the stages that begin within this block, if standard error is a terminal.

    Inner blocks share the line of the outer one. With `quiet`, neither this block nor inner ones
    show anything.
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
    line = StageLine(delay_s)
    token = _shown.set(line)
    try:
        yield
    finally:
        _shown.reset(token)
        line.hide()


def stage(name: str) -> None:
    """Begin a stage of the export, such as `simplifying`, and end the one before it."""
    line = _shown.get()
    if line is not None:
        line.update(name)


@contextlib.contextmanager
def stages_hidden() -> Iterator[None]:
    """Hide the line within this block, which shows a progress bar of its own."""
    line = _shown.get()
    if line is not None:
        line.hide()
    try:
        yield
    finally:
        if line is not None:
            line.show()
