"""How rows and vectors are cut into register tiles, and tiles into shares of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """`count` equal pieces of `size`, from `start` on; `index` pieces lie before them."""

    start: int
    size: int
    count: int
    index: int

    @property
    def length(self) -> int:
        """What the run covers."""
        return self.size * self.count


def even(total: int, most: int) -> tuple[Run, ...]:
    """`total` cut into as few pieces of at most `most` as there can be, all nearly equal: at most
    two runs, the larger pieces first.

    197 rows in tiles of at most 8 are 22 of 8 and 3 of 7: nothing is padded, and no tile is so
    small that latency shows.
    """
    pieces = -(-total // most)
    size, extra = divmod(total, pieces)
    runs = (Run(0, size + 1, extra, 0), Run(extra * (size + 1), size, pieces - extra, extra))
    return tuple(run for run in runs if run.count)


@dataclass(frozen=True)
class Shares:
    """Threads as a grid over a product's panels and rows."""

    panels: int
    rows: int

    @property
    def threads(self) -> int:
        """All of them."""
        return self.panels * self.rows


def shares(threads: int, panels: tuple[Run, ...], rows: tuple[Run, ...]) -> Shares:
    """The grid whose largest share of work is smallest; panels are cut rather than rows, since a
    panel of weights is then read by one thread.
    """
    grids = [
        Shares(across, threads // across)
        for across in range(threads, 0, -1)
        if threads % across == 0
    ]
    return min(grids, key=lambda grid: _largest(panels, grid.panels) * _largest(rows, grid.rows))


def _largest(runs: tuple[Run, ...], parts: int) -> int:
    return sum(-(-run.count // parts) * run.size for run in runs)


def bounds(count: int, part: Any, parts: int) -> tuple[Any, Any]:
    """Where share `part` of `parts` begins and ends among `count` pieces."""
    if parts == 1:
        return 0, count
    return part * count // parts, (part + 1) * count // parts


def pieces(runs: tuple[Run, ...]) -> Iterator[tuple[int, int]]:
    """(start, size) of each piece."""
    for run in runs:
        for number in range(run.count):
            yield run.start + number * run.size, run.size
