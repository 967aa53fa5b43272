"""How kernels loop: rows and vectors in register tiles, tiles over threads, sweeps over one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, Lanes, bind


def row_behind(number: Expr, prefix: int, gaps: tuple[int, ...]) -> Expr:
    """The row of patch `number` behind `prefix` rows, where other rows stand between patches.

    Args:
        number: The patch.
        prefix: Rows before all patches.
        gaps: For each row between patches the number of patches before it, rising.
    """
    row = number + prefix
    for before in gaps:
        row = row + T.if_then_else(number >= before, 1, 0)
    return row


def rows_between(prefix: int, gaps: tuple[int, ...]) -> tuple[int, ...]:
    """The rows that are no patches: those before all, and those in the gaps."""
    between = (prefix + before + number for number, before in enumerate(gaps))
    return (*range(prefix), *between)


@dataclass(frozen=True)
class Run:
    """`count` pieces of equal `size`, from `start` on; `index` pieces precede them."""

    start: int
    size: int
    count: int
    index: int

    @property
    def length(self) -> int:
        """The length of all pieces."""
        return self.size * self.count


def split_evenly(total: int, most: int) -> tuple[Run, ...]:
    """Split a length into as few pieces of at most `most` as possible, all nearly equal.

    197 rows in tiles of at most 8 are 22 of 8 and 3 of 7: nothing is padded, and no tile is so
    small that latency dominates.

    Returns:
        At most two runs, the larger pieces first.
    """
    pieces = -(-total // most)
    size, extra = divmod(total, pieces)
    runs = (
        Run(0, size + 1, extra, 0),
        Run(extra * (size + 1), size, pieces - extra, extra),
    )
    return tuple(run for run in runs if run.count)


def largest(runs: Iterable[Run]) -> int:
    """The size of the largest piece."""
    return max(run.size for run in runs)


def tile_buffer(
    lanes: Lanes, rows: Iterable[Run], vectors: Iterable[Run], dtype: str = "float32"
) -> Buffer:
    """A local buffer for the accumulators of the largest tile.

    Args:
        lanes: The vectors.
        rows: How the rows are split into tiles.
        vectors: How the vectors of the columns are split into tiles.
        dtype: Of the accumulators.
    """
    size = largest(rows) * largest(vectors) * lanes.count
    return T.alloc_buffer((size,), dtype, scope="local")


def pieces(runs: tuple[Run, ...]) -> Iterator[tuple[int, int]]:
    """(start, size) of each piece."""
    for run in runs:
        for number in range(run.count):
            yield run.start + number * run.size, run.size


@dataclass(frozen=True)
class ThreadGrid:
    """Threads as a grid over a product's panels and rows."""

    panels: int
    rows: int

    @property
    def threads(self) -> int:
        """The number of threads."""
        return self.panels * self.rows


def thread_grid(threads: int, panels: tuple[Run, ...], rows: tuple[Run, ...]) -> ThreadGrid:
    """The grid whose largest share of the work is smallest.

    Of equal grids the one that splits panels wins, since one thread then reads a panel of weights.
    """
    grids = [
        ThreadGrid(across, threads // across)
        for across in range(threads, 0, -1)
        if threads % across == 0
    ]
    return min(
        grids,
        key=lambda grid: _largest(panels, grid.panels) * _largest(rows, grid.rows),
    )


def _largest(runs: tuple[Run, ...], parts: int) -> int:
    return sum(-(-run.count // parts) * run.size for run in runs)


def share_bounds(count: int, part: Expr, parts: int) -> tuple[Expr, Expr]:
    """The first piece and the end of share `part` of `parts`, among `count` pieces."""
    if parts == 1:
        return 0, count
    return part * count // parts, (part + 1) * count // parts


def over_threads(share: Callable[[Expr, int], None], threads: int) -> None:
    """Emit `share(part, parts)` for every part: a parallel loop, or none for one thread."""
    if threads == 1:
        share(0, 1)
    else:
        with T.parallel(0, threads) as part:
            share(part, threads)


def accumulator_count(lanes: Lanes, width: int, most: int = 4) -> int:
    """How many independent accumulators a sweep over `width` columns uses.

    Several, since each operation of one chain waits for the one before.
    """
    return max(1, min(most, width // lanes.count))


def sweep(lanes: Lanes, width: int, ways: int, visit: Callable[[int, Expr, int], None]) -> None:
    """Emit `visit` for each vector of a row.

    Args:
        lanes: The vectors.
        width: Columns of the row.
        ways: The number of accumulators.
        visit: Called with (accumulator, first column, number of lanes that the row fills).
    """
    count = lanes.count
    full, tail = divmod(width, count)
    with T.serial(0, full // ways) as group:
        for way in range(ways):
            visit(way, (group * ways + way) * count, count)
    for vector in range(full // ways * ways, full):
        visit(vector % ways, vector * count, count)
    if tail:
        visit(0, full * count, tail)


def sum_over(lanes: Lanes, width: int, term: Callable[[Expr], Expr]) -> Expr:
    """The sum of term(column) over `width` columns."""
    count, ways = lanes.count, accumulator_count(lanes, width)
    parts = T.alloc_buffer((ways * count,), "float32", scope="local")
    for way in range(ways):
        lanes.store(parts, way * count, lanes.splat(0.0))

    def add(way: int, column: Expr, valid: int) -> None:
        index = way * count
        value = lanes.load(parts, index) + lanes.first(valid, term(column), 0.0)
        lanes.store(parts, index, value)

    sweep(lanes, width, ways, add)
    total = lanes.load(parts, 0)
    for way in range(1, ways):
        total = total + lanes.load(parts, way * count)
    return bind(lanes.total(bind(total)))
