"""Console output: status lines and progress on standard error, results on standard output.

`spelled_out` makes all of it safe for terminals that lack some characters, such as those of the
locale C or Latin-1.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
import unicodedata
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Standard error, so that a command's own output can be piped.
_console = Console(stderr=True, highlight=False)
# Wide enough that no table is folded where standard output is a file or a pipe.
_FILE_COLUMNS = 200


# What a terminal without these characters shows.
_SPELLINGS = {
    **{
        "±": "+-",
        "→": "->",
        "×": "x",
        "µ": "u",
        "μ": "u",
        "·": "*",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
    },
    **{"–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"'},
}
_ERRORS = "vitrim.spelling"


@contextlib.contextmanager
def spelled_out() -> Iterator[None]:
    """Write characters that standard output or error cannot encode in ASCII, or as `?`."""
    codecs.register_error(_ERRORS, _spelled)
    # Other streams that a caller put in place have no encoding.
    streams = [each for each in (sys.stdout, sys.stderr) if isinstance(each, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_ERRORS)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(ValueError):  # A closed pipe.
                stream.reconfigure(errors=errors)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_spelling, text)), error.end


def _spelling(letter: str) -> str:
    plain = _SPELLINGS.get(letter, unicodedata.normalize("NFKC", letter))
    found = "".join(_SPELLINGS.get(each, each) for each in plain)
    return found if found.isascii() else "?"


def echo(text: str, *, err: bool = False) -> None:
    """Print a line on standard output, or on standard error, in the encoding of that stream."""
    # click's echo writes UTF-8 where the encoding is ASCII.
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def status(text: str, *, quiet: bool = False) -> None:
    """Print one status line on standard error.

    Args:
        text: The line; rich markup is allowed.
        quiet: Print nothing.
    """
    if not quiet:
        _console.print(text, soft_wrap=True)


def show(*parts: RenderableType, markup: bool = False) -> None:
    """Print results on standard output, folded to the width of a terminal only.

    Args:
        parts: Text or rich tables, one below the other.
        markup: Whether brackets are rich markup; a path may contain brackets.
    """
    console = Console(highlight=False, markup=markup)
    if not console.is_terminal:
        console = Console(highlight=False, markup=markup, width=_FILE_COLUMNS)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def unit_count(count: float) -> str:
    """Format a number with three significant digits and k, M or G: 836746 -> '837 k'.

    Numbers below a thousand are printed without a unit.
    """
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}{letter}"
    return f"{count:g}"


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
