"""Rotary position embedding: pairs of query or key columns rotated by their token's angle.

The other columns of the rows stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Expr, bind
from .loops import over_threads, share_bounds


@dataclass(frozen=True)
class Rotate:
    """Rows in which head h has `each` columns from first + h * each on.

    Attributes:
        images: Batch size.
        rows: Rows of each image.
        width: Columns of a row.
        first: The first column of the first head.
        heads: Number of heads.
        each: Columns of one head.
        prefix: The first rows of each image, which are not rotated.
        patches: Positions in the tables.
        tables: 1, or one a head.
        layout: Which columns form a pair: neighbours, or those half a head apart.
        positions: Rows of each image whose numbers in the tables are given, prefix rows first;
            None: each row has its own number.
    """

    images: int
    rows: int
    width: int
    first: int
    heads: int
    each: int
    prefix: int
    patches: int
    tables: int
    layout: Literal["interleaved", "half"]
    positions: int | None = None


def rotate_heads(spec: Rotate, threads: int) -> Any:
    """The kernel: (x, table, [positions]) -> out, all flat.

    The table has the shape (tables, 2, patches, each / 2): cosines, then sines.

    References:
        Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", eq. 34.
    """
    pairs = spec.each // 2
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        size = spec.images * spec.rows * spec.width
        x = T.arg("x", T.buffer((size,), "float32"))
        table = T.arg("table", T.buffer((spec.tables * 2 * spec.patches * pairs,), "float32"))
        positions = None
        if spec.positions is not None:
            positions = T.arg("positions", T.buffer((spec.images * spec.positions,), "int32"))
        out = T.arg("out", T.buffer((size,), "float32"))

        def share(part: Expr, parts: int) -> None:
            with T.serial(*share_bounds(spec.images * spec.rows, part, parts)) as row:
                with T.serial(0, spec.width) as column:
                    T.buffer_store(out, x[row * spec.width + column], [row * spec.width + column])
                place = row % spec.rows
                if positions is not None:
                    place = bind(positions[row // spec.rows * spec.positions + place])
                patch = place - spec.prefix
                with (
                    T.If(patch >= 0),
                    T.Then(),
                    T.serial(0, spec.heads) as head,
                    T.serial(0, pairs) as pair,
                ):
                    start = row * spec.width + spec.first + head * spec.each
                    angle = (
                        (head if spec.tables > 1 else 0) * 2 * spec.patches + patch
                    ) * pairs + pair
                    one, other = (
                        (start + 2 * pair, start + 2 * pair + 1)
                        if spec.layout == "interleaved"
                        else (start + pair, start + pairs + pair)
                    )
                    cosine, sine = (
                        T.Bind(table[angle]),
                        T.Bind(table[angle + spec.patches * pairs]),
                    )
                    T.buffer_store(out, x[one] * cosine - x[other] * sine, [one])
                    T.buffer_store(out, x[other] * cosine + x[one] * sine, [other])

        over_threads(share, threads)
    return builder.get()
