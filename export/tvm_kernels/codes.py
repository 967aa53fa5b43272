"""Rows of numbers as rows of codes of eight bits: x ≈ base + step * (code - low).

Each row may have a base and a step of its own, found from its smallest and largest number
(dynamic); then they lie behind the row's codes, so that one buffer holds what a product reads. Or
all rows have the same, found beforehand from a user's images (static). The base need not be a
multiple of the step: a product adds it back exactly, base times the sum of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import named
from .dot import Dot
from .lanes import Buffer, Expr, Lanes
from .place import Rows
from .sweep import sweep, ways_over
from .threads import over_threads
from .tiles import bounds

LEVELS = 255
# A row of equal numbers has no step; any number that is not zero does.
_LEAST_STEP = 1e-20
_RANGE_BYTES = 8


@dataclass(frozen=True)
class Coding:
    """How rows become codes. static: all rows have one range, known beforehand, which a kernel gets
    as an operand (`Range.operand`).
    """

    dot: Dot
    static: bool

    def row_length(self, width: int) -> int:
        """Elements from one row of `width` columns to the next."""
        lanes = self.dot.lanes
        return (
            lanes.up(width)
            if self.static
            else lanes.up(lanes.up(width) + _RANGE_BYTES // self.dot.stored_bytes)
        )

    def place(self, row_length: int) -> int:
        """Where in a row its own step and base lie."""
        return row_length - _RANGE_BYTES // self.dot.stored_bytes

    def read_range(self, buffer: Buffer, start: Expr, row_length: int) -> tuple[Expr, Expr]:
        """(step, what code 0 means) of the row that begins at `start`."""
        step, base = (
            T.reinterpret("float32", buffer[T.Ramp(index, 1, size)])
            for index, size in self._range_places(start, row_length)
        )
        return step, base

    def write_range(
        self, buffer: Buffer, start: Expr, row_length: int, step: Expr, base: Expr
    ) -> None:
        """Behind the codes of the row that begins at `start`."""
        for (index, size), value in zip(
            self._range_places(start, row_length), (step, base), strict=True
        ):
            T.buffer_store(
                buffer, T.reinterpret(f"{self.dot.stored}x{size}", value), [T.Ramp(index, 1, size)]
            )

    def _range_places(self, start: Expr, row_length: int) -> list[tuple[Expr, int]]:
        size = 4 // self.dot.stored_bytes
        first = start + self.place(row_length)
        return [(first, size), (first + size, size)]

    def ends(self, known: Buffer) -> tuple[Expr, Expr]:
        """(factor, summand) that turn a number into its code: `Range.operand`, in all lanes."""
        lanes = self.dot.lanes
        return named(lanes.splat(known[0])), named(lanes.splat(known[1]))

    def encoded(self, value: Expr, ends: tuple[Expr, Expr]) -> Expr:
        """A vector as codes of a range known beforehand."""
        lanes, low = self.dot.lanes, float(self.dot.low)
        code = T.max(T.min(lanes.fma(value, *ends), lanes.splat(low + LEVELS)), lanes.splat(low))
        return self.dot.as_codes(lanes.whole(lanes.round(code)))


def store_function(
    lanes: Lanes, coding: Coding | None, known: Buffer | None
) -> Callable[[Buffer, Expr, Expr], None]:
    """What stores a vector at an index: as it is, or as codes of the range known beforehand, whose
    ends are looked up here, once.
    """
    if coding is None:
        return lanes.store
    ends = coding.ends(known)
    return lambda buffer, index, value: lanes.store(
        buffer, index, coding.encoded(named(value), ends)
    )


@dataclass(frozen=True)
class Range:
    """The smallest and the largest number that have a code of their own."""

    low: float
    high: float

    @property
    def step(self) -> float:
        """From one code to the next."""
        return max((self.high - self.low) / LEVELS, _LEAST_STEP)

    def base(self, dot: Dot) -> float:
        """What code 0 means."""
        return self.low - dot.low * self.step

    def operand(self, dot: Dot) -> NDArray[np.float32]:
        """What a kernel that writes codes needs: (1 / step, the code of zero before rounding)."""
        return np.array([1 / self.step, -self.base(dot) / self.step], np.float32)


@dataclass(frozen=True)
class Encode:
    """Rows of a stream, of which `used` columns mean something, as rows of codes."""

    images: int
    rows: int
    used: int
    source: Rows
    coding: Coding


def encode_rows(spec: Encode, threads: int) -> Any:
    """The kernel: (x, [range]) -> codes (images, rows, row_length), all flat."""
    lanes, coding = spec.coding.dot.lanes, spec.coding
    length = coding.row_length(spec.used)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.source.size(spec.images, spec.rows),), "float32"))
        known = T.arg("range", T.buffer((2,), "float32")) if coding.static else None
        out = T.arg("out", T.buffer((spec.images * spec.rows * length,), coding.dot.stored))

        def share(part: Expr, parts: int) -> None:
            with T.serial(*bounds(spec.images * spec.rows, part, parts)) as row:
                image, within = (row // spec.rows, row % spec.rows) if spec.images > 1 else (0, row)
                start = named(spec.source.start(image, within))
                encode_row(
                    lanes,
                    coding,
                    spec.used,
                    lambda column: lanes.load(x, start + column),
                    out,
                    named(row * length),
                    known,
                )

        over_threads(share, threads)
    return builder.get()


def encode_row(
    lanes: Lanes,
    coding: Coding,
    used: int,
    load: Callable[[Expr], Expr],
    out: Buffer,
    target: Expr,
    known: Buffer | None,
) -> None:
    """One row's codes, and its range behind them where it has its own. load(column): the vector
    from a column on. known: the range that all have.
    """
    count = lanes.count
    full, tail = divmod(used, count)
    if known is not None:
        ends = coding.ends(known)

        def code_of(value: Expr, wanted: int) -> Expr:
            return coding.encoded(value, ends)

    else:
        smallest, largest = _range(lanes, used, load)
        step = named(T.max((largest - smallest) * T.float32(1 / LEVELS), T.float32(_LEAST_STEP)))
        inverse, least = (
            named(lanes.splat(named(T.float32(1) / step))),
            named(lanes.splat(smallest)),
        )
        low = lanes.splat(float(coding.dot.low))
        coding.write_range(
            out,
            target,
            coding.row_length(used),
            step,
            named(smallest - step * T.float32(coding.dot.low)),
        )

        def code_of(value: Expr, wanted: int) -> Expr:
            # By construction within range, and the difference is zero where a row's numbers are all
            # equal.
            value = lanes.first(wanted, value, least)
            return coding.dot.as_codes(
                lanes.whole(lanes.round(lanes.fma(value - least, inverse, low)))
            )

    with T.serial(0, full) as vector:
        lanes.store(out, target + vector * count, code_of(named(load(vector * count)), count))
    if tail:
        # What lies behind the last column meets weights of zero, and must only be a code.
        lanes.store(out, target + full * count, code_of(named(load(full * count)), tail))


def _range(lanes: Lanes, used: int, load: Callable[[Expr], Expr]) -> tuple[Expr, Expr]:
    """(smallest, largest) of a row."""
    count, ways = lanes.count, ways_over(lanes, used)
    low, high = (T.alloc_buffer((ways * count,), "float32", scope="local") for _ in range(2))
    for way in range(ways):
        lanes.store(low, way * count, lanes.splat(3e38))
        lanes.store(high, way * count, lanes.splat(-3e38))

    def meet(way: int, column: Expr, wanted: int) -> None:
        value = named(load(column))
        lanes.store(
            low, way * count, T.min(lanes.load(low, way * count), lanes.first(wanted, value, 3e38))
        )
        lanes.store(
            high,
            way * count,
            T.max(lanes.load(high, way * count), lanes.first(wanted, value, -3e38)),
        )

    sweep(lanes, used, ways, meet)
    smallest, largest = lanes.load(low, 0), lanes.load(high, 0)
    for way in range(1, ways):
        smallest, largest = (
            T.min(smallest, lanes.load(low, way * count)),
            T.max(largest, lanes.load(high, way * count)),
        )
    return named(lanes.smallest(named(smallest))), named(lanes.largest(named(largest)))
