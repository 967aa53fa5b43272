"""Once over a row, with several results side by side, since one chain of operations waits for
itself.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from .lanes import Expr, Lanes


def ways_over(lanes: Lanes, width: int, most: int = 4) -> int:
    """How many results a row of `width` columns has vectors for."""
    return max(1, min(most, width // lanes.count))


def sweep(lanes: Lanes, width: int, ways: int, visit: Callable[[int, Expr, int], None]) -> None:
    """visit(way, column, wanted) for each vector of the row: into which result it goes, where it
    begins, and how many of its numbers are the row's.
    """
    count = lanes.count
    full, tail = divmod(width, count)
    with T.serial(0, full // ways) as turn:
        for way in range(ways):
            visit(way, (turn * ways + way) * count, count)
    for vector in range(full // ways * ways, full):
        visit(vector % ways, vector * count, count)
    if tail:
        visit(0, full * count, tail)
