"""What a person sees between the steps of a run: short lines on standard error."""

from __future__ import annotations

from rich.console import Console

# Standard error, so that a command's own output can be piped.
_console = Console(stderr=True, highlight=False)


def say(text: str, *, quiet: bool = False) -> None:
    """One line; markup of rich is allowed."""
    if not quiet:
        _console.print(text, soft_wrap=True)


def unit_count(count: float) -> str:
    """836746 -> '837 k'; three significant digits with k, M, G."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}{letter}"
    return f"{count:g}"
