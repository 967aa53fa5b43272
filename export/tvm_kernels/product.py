"""The innermost loop of every product: a register tile of sums.

Each step multiplies one number of every row with one vector of every panel column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, bind
from .schedule import Tile


class Arithmetic(Protocol):
    """The numbers of a product: fp32 (`Lanes`), or quantized (`IntegerDot`)."""

    @property
    def count(self) -> int:
        """Sums in a register."""
        ...

    def zero(self) -> Expr:
        """Zero in all sums."""
        ...

    def load(self, buffer: Buffer, index: Expr) -> Expr:
        """Load a register of sums."""
        ...

    def store(self, buffer: Buffer, index: Expr, value: Expr) -> None:
        """Store a register of sums."""
        ...

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """The expression a * b + c."""
        ...


def product(
    arithmetic: Arithmetic,
    accumulators: Buffer,
    tile: Tile,
    depth: int,
    left: Callable[[int, Expr], Expr],
    right: Callable[[int, Expr], Expr],
    fetch: Callable[[Expr], None] | None = None,
) -> None:
    """Emit accumulators[r, v] = sum over k < depth of left(r, k) * right(v, k).

    Args:
        arithmetic: The numbers.
        accumulators: The sums, tile.rows * tile.vectors registers.
        tile: The size of the register tile; the loop takes `tile.steps` of k at once.
        depth: The number of summands.
        left: The number (r, k) of the rows, in all lanes.
        right: The vector (v, k) of the columns.
        fetch: Called before each `tile.steps` of k, with the number of these steps.
    """
    count = arithmetic.count
    for index in range(tile.rows * tile.vectors):
        arithmetic.store(accumulators, index * count, arithmetic.zero())

    def step(k: Expr) -> None:
        columns = [bind(right(v, k)) for v in range(tile.vectors)]
        for r in range(tile.rows):
            number = bind(left(r, k))
            for v, column in enumerate(columns):
                index = (r * tile.vectors + v) * count
                total = arithmetic.fma(number, column, arithmetic.load(accumulators, index))
                arithmetic.store(accumulators, index, total)

    whole = depth // tile.steps
    if whole:
        with T.serial(0, whole) as k:
            if fetch is not None:
                fetch(k)
            for offset in range(tile.steps):
                step(k * tile.steps + offset)
    for k in range(whole * tile.steps, depth):
        step(k)
