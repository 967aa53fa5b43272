"""Rotary positions: pairs of query or key columns turned by their token's angle, inside rows whose
other columns stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .threads import over_threads
from .tiles import bounds


@dataclass(frozen=True)
class Turn:
    """`rows` rows for each image, the first `prefix` of which stay. Head h has `each` columns from
    first + h * each on; `tables` is 1, or one a head.
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


def turn_heads(spec: Turn, threads: int) -> Any:
    """The kernel: (x, table (tables, 2, patches, each / 2) of cosines and sines) -> out, all flat.
    Su et al. 2021, eq. 34.
    """
    pairs = spec.each // 2
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        size = spec.images * spec.rows * spec.width
        x = T.arg("x", T.buffer((size,), "float32"))
        table = T.arg("table", T.buffer((spec.tables * 2 * spec.patches * pairs,), "float32"))
        out = T.arg("out", T.buffer((size,), "float32"))

        def share(part: Any, parts: int) -> None:
            with T.serial(*bounds(spec.images * spec.rows, part, parts)) as row:
                with T.serial(0, spec.width) as column:
                    T.buffer_store(out, x[row * spec.width + column], [row * spec.width + column])
                patch = row % spec.rows - spec.prefix
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
                    near, far = (
                        (start + 2 * pair, start + 2 * pair + 1)
                        if spec.layout == "interleaved"
                        else (start + pair, start + pairs + pair)
                    )
                    cosine, sine = T.Bind(table[angle]), T.Bind(table[angle + spec.patches * pairs])
                    T.buffer_store(out, x[near] * cosine - x[far] * sine, [near])
                    T.buffer_store(out, x[far] * cosine + x[near] * sine, [far])

        over_threads(share, threads)
    return builder.get()
