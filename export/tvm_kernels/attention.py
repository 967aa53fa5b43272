"""Attention of one head at a time: scores, softmax and the sum of values, with the scores of a few
queries in the nearest cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import exp2, named
from .codes import Coding, store_function
from .keys import Heads, key_panels, packed_size
from .lanes import Buffer, Expr, Lanes
from .norm import sum_over
from .place import Rows
from .product import product
from .schedule import Schedule, Shape, Tile
from .threads import over_threads
from .tiles import Run, bounds, even

# Below any score, and far from overflow.
_NOTHING = -1e30


@dataclass(frozen=True)
class Attend:
    """softmax(q kᵀ) v for the first `queries` of `tokens` tokens. The scale, and the logarithm of e
    to base 2, are in the queries already.

    source: where the queries' rows lie; queries, keys, values: the heads within rows. The result
    has heads * values.each columns.
    """

    images: int
    heads: int
    tokens: int
    asked: int
    source: Rows
    queries: Heads
    keys: Heads
    values: Heads
    # A number added to each score, (heads, asked, whole vectors of tokens).
    biased: bool = False
    # The result becomes codes of a range known beforehand.
    writes: Coding | None = None

    @property
    def shape(self) -> Shape:
        """What a schedule knows it by."""
        return Shape("attention", (self.asked, self.tokens, self.keys.each, self.values.each))


def attend(spec: Attend, lanes: Lanes, schedule: Schedule) -> Any:
    """The kernel: (queries' rows, packed keys and values, [biases], [range]) -> out (images, asked,
    heads * values.each), all flat.
    """
    count = lanes.count
    tile = schedule.tile(spec.shape)
    row_runs = even(spec.asked, tile.rows)
    size = packed_size(spec.tokens, spec.keys, spec.values, lanes)
    pairs = spec.images * spec.heads
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.source.size(spec.images, spec.asked),), "float32"))
        packed = T.arg("packed", T.buffer((pairs * size,), "float32"))
        stride = lanes.up(spec.tokens)
        bias = (
            T.arg("bias", T.buffer((spec.heads * spec.asked * stride,), "float32"))
            if spec.biased
            else None
        )
        known = None if spec.writes is None else T.arg("range", T.buffer((2,), "float32"))
        stored = "float32" if spec.writes is None else spec.writes.dot.stored
        out = T.arg(
            "out", T.buffer((spec.images * spec.asked * spec.heads * spec.values.each,), stored)
        )

        def share(part: Expr, parts: int) -> None:
            most = max(run.size for run in row_runs)
            scores = T.alloc_buffer((most * lanes.up(spec.tokens),), "float32", scope="local")
            accumulators = T.alloc_buffer((most * tile.vectors * count,), "float32", scope="local")
            inverses = T.alloc_buffer((most,), "float32", scope="local")
            for run in row_runs:
                # All tiles of all heads in one row, so that shares are equal although heads are
                # few.
                with T.serial(*bounds(pairs * run.count, part, parts)) as index:
                    pair = named(index // run.count)
                    row = named(run.start + index % run.count * run.size)
                    _tile(
                        spec,
                        lanes,
                        tile,
                        x,
                        packed,
                        bias,
                        known,
                        out,
                        scores,
                        accumulators,
                        inverses,
                        pair,
                        row,
                        run.size,
                    )

        over_threads(share, schedule.threads)
    return builder.get()


def _tile(
    spec: Attend,
    lanes: Lanes,
    tile: Tile,
    x: Buffer,
    packed: Buffer,
    bias: Buffer | None,
    known: Buffer | None,
    out: Buffer,
    scores: Buffer,
    accumulators: Buffer,
    inverses: Buffer,
    pair: Expr,
    row: Expr,
    rows: int,
) -> None:
    """One head and `rows` queries from `row`."""
    count, tokens = lanes.count, spec.tokens
    stride = lanes.up(tokens)
    image, head = named(pair // spec.heads), named(pair % spec.heads)
    start = named(pair * packed_size(tokens, spec.keys, spec.values, lanes))
    queries = [
        named(spec.source.start(image, row + r) + spec.queries.first + head * spec.queries.each)
        for r in range(rows)
    ]

    def score(run: Run, panel: Expr) -> None:
        place = named(start + (run.start + panel * run.size) * count * spec.keys.each)
        product(
            lanes,
            accumulators,
            rows,
            run.size,
            spec.keys.each,
            tile.steps,
            lambda r, k: lanes.splat(x[queries[r] + k]),
            lambda v, k: lanes.load(packed, place + k * (run.size * count) + v * count),
        )
        for r in range(rows):
            for v in range(run.size):
                target = r * stride + (run.start + panel * run.size + v) * count
                value = lanes.load(accumulators, (r * run.size + v) * count)
                if bias is not None:
                    column = (run.start + panel * run.size + v) * count
                    value = value + lanes.load(
                        bias, (head * spec.asked + row + r) * stride + column
                    )
                lanes.store(scores, target, value)

    for run in key_panels(tokens, lanes, tile):
        with T.serial(0, run.count) as panel:
            score(run, panel)
    with T.serial(0, rows) as r:
        _softmax(lanes, tokens, scores, named(r * stride), inverses, r)

    values = named(start + stride * spec.keys.each)
    target = [
        named(
            (image * spec.asked + row + r) * (spec.heads * spec.values.each)
            + head * spec.values.each
        )
        for r in range(rows)
    ]

    store = store_function(lanes, spec.writes, known)

    def mix(run: Run, panel: Expr) -> None:
        column = named((run.start + panel * run.size) * count)
        product(
            lanes,
            accumulators,
            rows,
            run.size,
            tokens,
            tile.steps,
            lambda r, k: lanes.splat(scores[r * stride + k]),
            lambda v, k: lanes.load(packed, values + k * spec.values.each + column + v * count),
        )
        for r in range(rows):
            for v in range(run.size):
                value = lanes.load(accumulators, (r * run.size + v) * count) * lanes.splat(
                    inverses[r]
                )
                store(out, target[r] + column + v * count, value)

    for run in even(spec.values.each // count, tile.vectors):
        with T.serial(0, run.count) as panel:
            mix(run, panel)


def _softmax(
    lanes: Lanes, tokens: int, scores: Buffer, start: Expr, inverses: Buffer, r: Expr
) -> None:
    """scores[r] becomes 2^(score - largest), and inverses[r] one over their sum."""
    count = lanes.count
    full, tail = divmod(tokens, count)
    if tail:
        place = start + full * count
        lanes.store(scores, place, lanes.first(tail, lanes.load(scores, place), _NOTHING))
    vectors = full + bool(tail)
    ways = min(4, vectors)
    tops = T.alloc_buffer((ways * count,), "float32", scope="local")
    for way in range(ways):
        lanes.store(tops, way * count, lanes.load(scores, start + way * count))
    for vector in range(ways, vectors):
        place = vector % ways * count
        lanes.store(
            tops, place, T.max(lanes.load(tops, place), lanes.load(scores, start + vector * count))
        )
    top = lanes.load(tops, 0)
    for way in range(1, ways):
        top = T.max(top, lanes.load(tops, way * count))
    top = named(lanes.splat(named(lanes.largest(named(top)))))

    def power(column: Expr) -> Expr:
        value = named(exp2(lanes, lanes.load(scores, start + column) - top))
        lanes.store(scores, start + column, value)
        return value

    # Lanes behind the last token hold 2^-126, which the sum does not feel.
    total = sum_over(lanes, vectors * count, power)
    T.buffer_store(inverses, T.float32(1) / total, [r])
