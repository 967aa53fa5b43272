"""The innermost loop of every product: a register tile of sums, a number of a row times a vector of
columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tvm.tirx.script import builder as T

from .activations import named
from .lanes import Buffer, Expr


class Arithmetic(Protocol):
    """What a product's numbers are: fp32 (`Lanes`), or codes of eight bits (`Dot`)."""

    @property
    def count(self) -> int:
        """Sums in a register."""
        ...

    def zero(self) -> Expr:
        """No sum yet."""
        ...

    def load(self, buffer: Buffer, index: Expr) -> Expr:
        """A register of sums."""
        ...

    def store(self, buffer: Buffer, index: Expr, value: Expr) -> None:
        """A register of sums back."""
        ...

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a * b + c."""
        ...


def product(
    arithmetic: Arithmetic,
    accumulators: Buffer,
    rows: int,
    vectors: int,
    depth: int,
    steps: int,
    left: Callable[[int, Expr], Expr],
    right: Callable[[int, Expr], Expr],
) -> None:
    """accumulators[r, v] = sum over k < depth of left(r, k) * right(v, k), both vectors; the loop
    takes `steps` k at once.
    """
    count = arithmetic.count
    for index in range(rows * vectors):
        arithmetic.store(accumulators, index * count, arithmetic.zero())

    def step(k: Expr) -> None:
        across = [named(right(v, k)) for v in range(vectors)]
        for r in range(rows):
            one = named(left(r, k))
            for v in range(vectors):
                index = (r * vectors + v) * count
                arithmetic.store(
                    accumulators,
                    index,
                    arithmetic.fma(one, across[v], arithmetic.load(accumulators, index)),
                )

    whole = depth // steps
    if whole:
        with T.serial(0, whole) as k:
            for offset in range(steps):
                step(k * steps + offset)
    for k in range(whole * steps, depth):
        step(k)
