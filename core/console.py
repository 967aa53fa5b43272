"""What a person sees: short lines between the steps on standard error, results on standard
output.
"""

from __future__ import annotations

from rich.console import Console, RenderableType

# Standard error, so that a command's own output can be piped.
_console = Console(stderr=True, highlight=False)


def say(text: str, *, quiet: bool = False) -> None:
    """One line; markup of rich is allowed."""
    if not quiet:
        _console.print(text, soft_wrap=True)


def show(*parts: RenderableType) -> None:
    """Print results on standard output. Where that is no terminal nothing is folded or cut to a
    width that nobody asked for.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def unit_count(count: float) -> str:
    """836746 -> '837 k'; three significant digits with k, M, G."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}{letter}"
    return f"{count:g}"
