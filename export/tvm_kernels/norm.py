"""LayerNorm and RMSNorm of rows, in one visit to each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import named
from .codes import Coding, encode_row
from .lanes import Buffer, Expr, Lanes
from .place import Rows
from .sweep import sweep, ways_over
from .threads import over_threads
from .tiles import bounds


@dataclass(frozen=True)
class Normalise:
    """out = (x - mean) / sqrt(variance + eps) over the first `width` columns, or x / sqrt(mean of
    squares + eps) where not centred.

    Weight and bias are no part of it unless `affine`: whatever multiplies afterwards holds them.
    gather: the columns come by an index list. The columns behind `width` that fill the last vector
    become zero. writes: the rows become codes.
    """

    images: int
    rows: int
    width: int
    source: Rows
    centred: bool
    eps: float
    affine: bool = False
    gather: bool = False
    writes: Coding | None = None


def normalise(spec: Normalise, lanes: Lanes, threads: int) -> Any:
    """The kernel: (x, [columns], [weight], [bias], [range]) -> out (images, rows, whole vectors),
    all flat.
    """
    stride = lanes.up(spec.width)
    source = spec.source
    if source.per_image == spec.rows and not source.first:
        images, rows = 1, spec.images * spec.rows
    else:
        images, rows = spec.images, spec.rows
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.images * source.per_image * source.width,), "float32"))
        columns = T.arg("columns", T.buffer((spec.width,), "int32")) if spec.gather else None
        weight = T.arg("weight", T.buffer((stride,), "float32")) if spec.affine else None
        bias = T.arg("bias", T.buffer((stride,), "float32")) if spec.affine else None
        known = (
            T.arg("range", T.buffer((2,), "float32"))
            if spec.writes is not None and spec.writes.static
            else None
        )
        length = stride if spec.writes is None else spec.writes.row_length(spec.width)
        out = T.arg(
            "out",
            T.buffer(
                (images * rows * length,),
                "float32" if spec.writes is None else spec.writes.dot.stored,
            ),
        )

        def rows_of(part: Expr, parts: int) -> None:
            aside = (
                None if spec.writes is None else T.alloc_buffer((stride,), "float32", scope="local")
            )
            with T.serial(*bounds(images * rows, part, parts)) as row:
                start = (
                    source.start(row // rows, row % rows) if images > 1 else source.start(0, row)
                )
                into, target = (out, named(row * stride)) if aside is None else (aside, 0)
                if columns is not None:
                    for column in range(spec.width, stride):
                        T.buffer_store(into, T.float32(0), [target + column])
                    with T.serial(0, spec.width) as column:
                        T.buffer_store(into, x[start + columns[column]], [target + column])
                    normalise_row(
                        lanes,
                        spec.width,
                        spec.centred,
                        spec.eps,
                        into,
                        target,
                        into,
                        target,
                        weight,
                        bias,
                    )
                else:
                    normalise_row(
                        lanes,
                        spec.width,
                        spec.centred,
                        spec.eps,
                        x,
                        named(start),
                        into,
                        target,
                        weight,
                        bias,
                    )
                if spec.writes is not None:
                    encode_row(
                        lanes,
                        spec.writes,
                        spec.width,
                        lambda column: lanes.load(into, column),
                        out,
                        named(row * length),
                        known,
                    )

        over_threads(rows_of, threads)
    return builder.get()


def normalise_row(
    lanes: Lanes,
    width: int,
    centred: bool,
    eps: float,
    x: Buffer,
    start: Expr,
    out: Buffer,
    target: Expr,
    weight: Buffer | None,
    bias: Buffer | None,
) -> None:
    """One row: its mean, the mean square of what differs from it, and the result."""
    mean = None
    if centred:
        total = sum_over(lanes, width, lambda column: lanes.load(x, start + column))
        mean = named(lanes.splat(named(total * T.float32(1 / width))))

    def difference(column: Expr) -> Expr:
        value = lanes.load(x, start + column)
        return named(value if mean is None else value - mean)

    def square(column: Expr) -> Expr:
        value = difference(column)
        return value * value

    squares = sum_over(lanes, width, square)
    scale = named(
        lanes.splat(named(T.float32(1) / T.sqrt(squares * T.float32(1 / width) + T.float32(eps))))
    )

    def write(column: Expr, wanted: int) -> None:
        value = difference(column) * scale
        if weight is not None:
            value = value * lanes.load(weight, column)
        if bias is not None:
            value = value + lanes.load(bias, column)
        lanes.store(out, target + column, lanes.first(wanted, value, 0.0))

    full, tail = divmod(width, lanes.count)
    with T.serial(0, full) as vector:
        write(vector * lanes.count, lanes.count)
    if tail:
        write(full * lanes.count, tail)


def sum_over(lanes: Lanes, width: int, term: Callable[[Expr], Expr]) -> Expr:
    """The sum of term(column) over `width` columns."""
    count, ways = lanes.count, ways_over(lanes, width)
    parts = T.alloc_buffer((ways * count,), "float32", scope="local")
    for way in range(ways):
        lanes.store(parts, way * count, lanes.splat(0.0))

    def add(way: int, column: Expr, wanted: int) -> None:
        lanes.store(
            parts,
            way * count,
            lanes.load(parts, way * count) + lanes.first(wanted, term(column), 0.0),
        )

    sweep(lanes, width, ways, add)
    total = lanes.load(parts, 0)
    for way in range(1, ways):
        total = total + lanes.load(parts, way * count)
    return named(lanes.total(named(total)))
