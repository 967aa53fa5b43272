"""Quantized rows: x ≈ base + step * (code - low), with codes of eight bits.

Dynamic: each row has its own step and base, computed from its smallest and largest number.
They are stored after the row's codes, so that a product reads one buffer. Static: all rows have
the same step and base, found beforehand on calibration images.

The base need not be a multiple of the step: a product adds it exactly, as base times the sum of
each column's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .integer_dot import IntegerDot
from .lanes import ROUNDING, Buffer, Expr, Lanes, RowLayout, bind
from .loops import accumulator_count, over_threads, share_bounds, sweep

LEVELS = 255
# The step of a row of equal numbers, which needs none.
_LEAST_STEP = 1e-20
_RANGE_BYTES = 8
_HUGE = 3e38


@dataclass(frozen=True)
class Range:
    """The smallest and the largest number that a code represents."""

    low: float
    high: float

    @property
    def step(self) -> float:
        """The difference of neighbouring codes."""
        return max((self.high - self.low) / LEVELS, _LEAST_STEP)

    def base(self, dot: IntegerDot) -> float:
        """The number that code 0 represents."""
        return self.low - dot.low * self.step

    def operand(self, dot: IntegerDot) -> NDArray[np.float32]:
        """The operand of kernels that quantize statically: (1 / step, unrounded code of zero)."""
        return np.array([1 / self.step, -self.base(dot) / self.step], np.float32)


@dataclass(frozen=True)
class Quantizer:
    """How rows are quantized.

    Attributes:
        dot: The multiplication, which determines the type of codes.
        static: Whether all rows share one range, which kernels get as `Range.operand`.
    """

    dot: IntegerDot
    static: bool

    def row_length(self, width: int) -> int:
        """Elements from one row of `width` columns to the next."""
        lanes = self.dot.lanes
        if self.static:
            return lanes.up(width)
        return lanes.up(lanes.up(width) + _RANGE_BYTES)

    def range_offset(self, row_length: int) -> int:
        """The index within a row of its step, which its base follows."""
        return row_length - _RANGE_BYTES

    def read_range(self, buffer: Buffer, start: Expr, row_length: int) -> tuple[Expr, Expr]:
        """(step, base) of the row that begins at `start`."""
        step, base = (
            T.reinterpret("float32", buffer[T.Ramp(index, 1, size)])
            for index, size in self._range_indices(start, row_length)
        )
        return step, base

    def write_range(
        self, buffer: Buffer, start: Expr, row_length: int, values: tuple[Expr, Expr]
    ) -> None:
        """Store a row's (step, base) after its codes.

        Args:
            buffer: The rows.
            start: Index of the row's first code.
            row_length: Elements from one row to the next.
            values: (step, base).
        """
        for (index, size), value in zip(
            self._range_indices(start, row_length), values, strict=True
        ):
            stored = T.reinterpret(f"{self.dot.stored}x{size}", value)
            T.buffer_store(buffer, stored, [T.Ramp(index, 1, size)])

    def _range_indices(self, start: Expr, row_length: int) -> list[tuple[Expr, int]]:
        first, size = start + self.range_offset(row_length), _RANGE_BYTES // 2
        return [(first, size), (first + size, size)]

    def affine(self, static_range: Buffer) -> tuple[Expr, Expr]:
        """(factor, summand) that map a number to its unrounded code, in all lanes."""
        lanes = self.dot.lanes
        return bind(lanes.splat(static_range[0])), bind(lanes.splat(static_range[1]))

    def quantize(self, value: Expr, affine: tuple[Expr, Expr]) -> Expr:
        """Quantize a vector statically; numbers outside the range are clamped."""
        lanes, low = self.dot.lanes, float(self.dot.low)
        code = T.max(
            T.min(lanes.fma(value, *affine), lanes.splat(low + LEVELS)),
            lanes.splat(low),
        )
        return self.dot.as_codes(lanes.bits(code + lanes.splat(ROUNDING)))


def store_function(
    lanes: Lanes, quantizer: Quantizer | None, static_range: Buffer | None
) -> Callable[[Buffer, Expr, Expr], None]:
    """The function (buffer, index, vector) that stores a vector, quantized if there is a quantizer.

    The factors of the range are loaded here, once.
    """
    if quantizer is None:
        return lanes.store
    affine = quantizer.affine(static_range)
    return lambda buffer, index, value: lanes.store(
        buffer, index, quantizer.quantize(bind(value), affine)
    )


@dataclass(frozen=True)
class Quantize:
    """Quantize the rows of a stream.

    Attributes:
        images: Batch size.
        rows: Rows of each image.
        used: Columns of a row that have a meaning.
        source: Where the rows are.
        quantizer: How they are quantized.
    """

    images: int
    rows: int
    used: int
    source: RowLayout
    quantizer: Quantizer


def quantize_rows(spec: Quantize, threads: int) -> Any:
    """The kernel: (x, [range]) -> codes (images, rows, row_length), all flat."""
    quantizer = spec.quantizer
    lanes = quantizer.dot.lanes
    length = quantizer.row_length(spec.used)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.source.size(spec.images, spec.rows),), "float32"))
        static_range = T.arg("range", T.buffer((2,), "float32")) if quantizer.static else None
        out = T.arg("out", T.buffer((spec.images * spec.rows * length,), quantizer.dot.stored))

        def share(part: Expr, parts: int) -> None:
            with T.serial(*share_bounds(spec.images * spec.rows, part, parts)) as row:
                image, within = (row // spec.rows, row % spec.rows) if spec.images > 1 else (0, row)
                start = bind(spec.source.start(image, within))
                quantize_row(
                    quantizer,
                    spec.used,
                    lambda column: lanes.load(x, start + column),
                    out,
                    bind(row * length),
                    static_range,
                )

        over_threads(share, threads)
    return builder.get()


def quantize_row(
    quantizer: Quantizer,
    used: int,
    load: Callable[[Expr], Expr],
    out: Buffer,
    target: Expr,
    static_range: Buffer | None,
) -> None:
    """Emit the codes of one row, and its step and base if it has its own.

    Args:
        quantizer: How the row is quantized.
        used: Columns of the row.
        load: The vector from a column on.
        out: Where the codes are stored.
        target: Index of the row's first code.
        static_range: The range of all rows; None: the row's own.
    """
    lanes = quantizer.dot.lanes
    count = lanes.count
    full, tail = divmod(used, count)
    code_of = (
        _dynamic_codes(quantizer, used, load, out, target)
        if static_range is None
        else _static_codes(quantizer, static_range)
    )
    with T.serial(0, full) as vector:
        lanes.store(out, target + vector * count, code_of(bind(load(vector * count)), count))
    if tail:
        # The codes after the last column are multiplied with zero weights, so any code will do.
        lanes.store(out, target + full * count, code_of(bind(load(full * count)), tail))


def _static_codes(quantizer: Quantizer, static_range: Buffer) -> Callable[[Expr, int], Expr]:
    affine = quantizer.affine(static_range)
    return lambda value, valid: quantizer.quantize(value, affine)


def _dynamic_codes(
    quantizer: Quantizer,
    used: int,
    load: Callable[[Expr], Expr],
    out: Buffer,
    target: Expr,
) -> Callable[[Expr, int], Expr]:
    """Emit the row's step and base, and return what maps a vector to codes."""
    dot = quantizer.dot
    lanes = dot.lanes
    smallest, largest = _extremes(lanes, used, load)
    step = bind(T.max((largest - smallest) * T.float32(1 / LEVELS), T.float32(_LEAST_STEP)))
    inverse, least = (
        bind(lanes.splat(bind(T.float32(1) / step))),
        bind(lanes.splat(smallest)),
    )
    low = lanes.splat(ROUNDING + dot.low)
    base = bind(smallest - step * T.float32(dot.low))
    quantizer.write_range(out, target, quantizer.row_length(used), (step, base))

    def code_of(value: Expr, valid: int) -> Expr:
        # Within the range by construction; the difference is zero in a row of equal numbers.
        value = lanes.first(valid, value, least)
        return dot.as_codes(lanes.bits(lanes.fma(value - least, inverse, low)))

    return code_of


def _extremes(lanes: Lanes, used: int, load: Callable[[Expr], Expr]) -> tuple[Expr, Expr]:
    """(smallest, largest) number of a row."""
    count, ways = lanes.count, accumulator_count(lanes, used)
    low, high = (T.alloc_buffer((ways * count,), "float32", scope="local") for _ in range(2))
    for way in range(ways):
        lanes.store(low, way * count, lanes.splat(_HUGE))
        lanes.store(high, way * count, lanes.splat(-_HUGE))

    def update(way: int, column: Expr, valid: int) -> None:
        value, index = bind(load(column)), way * count
        smaller = T.min(lanes.load(low, index), lanes.first(valid, value, _HUGE))
        lanes.store(low, index, smaller)
        larger = T.max(lanes.load(high, index), lanes.first(valid, value, -_HUGE))
        lanes.store(high, index, larger)

    sweep(lanes, used, ways, update)
    smallest, largest = lanes.load(low, 0), lanes.load(high, 0)
    for way in range(1, ways):
        smallest = T.min(smallest, lanes.load(low, way * count))
        largest = T.max(largest, lanes.load(high, way * count))
    return bind(lanes.smallest(bind(smallest))), bind(lanes.largest(bind(largest)))
