"""Attention with positive random features, whose cost is linear in the tokens.

With features φ of queries and keys the result is φ(q) (φ(k)ᵀ v) / (φ(q) Σφ(k) + ε): two products
whose weights come from the image. Choromanski et al. 2021, "Rethinking Attention with Performers".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import exp
from .lanes import Buffer, Expr, Lanes, bind
from .loops import largest, over_threads, pieces, share_bounds, split_evenly, sum_over, tile_buffer

# Accumulators of a tile: rows, and vectors of columns.
_ROWS, _VECTORS = 4, 4


@dataclass(frozen=True)
class LinearAttention:
    """The sizes of one linear attention of one head.

    Attributes:
        images: Batch size.
        tokens: Rows of each image.
        width: Columns of queries, keys and values; a row has whole vectors, the rest zeros.
        features: How many random features there are.
        eps: Added to the divisor.
    """

    images: int
    tokens: int
    width: int
    features: int
    eps: float


def random_features(spec: LinearAttention, lanes: Lanes, threads: int) -> Any:
    """The kernel: (x, x W) -> exp(x W - |x|² / 2) / √features, rows of whole vectors, flat."""
    width, columns, rows = lanes.up(spec.width), lanes.up(spec.features), spec.images * spec.tokens
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows * width,), "float32"))
        projected = T.arg("projected", T.buffer((rows * columns,), "float32"))
        out = T.arg("out", T.buffer((rows * columns,), "float32"))

        def share(part: Expr, parts: int) -> None:
            with T.serial(*share_bounds(rows, part, parts)) as row:
                start, first = bind(row * width), bind(row * columns)

                def square(column: Expr) -> Expr:
                    value = bind(lanes.load(x, start + column))
                    return value * value

                half = bind(sum_over(lanes, spec.width, square) * T.float32(0.5))
                for column in range(0, columns, lanes.count):
                    exponent = lanes.load(projected, first + column) - lanes.splat(half)
                    value = exp(lanes, exponent) * lanes.splat(spec.features**-0.5)
                    valid = min(lanes.count, spec.features - column)
                    lanes.store(out, first + column, lanes.first(valid, value, 0.0))

        over_threads(share, threads)
    return builder.get()


def summarize_values(spec: LinearAttention, lanes: Lanes, threads: int) -> Any:
    """The kernel: (φ(k), v) -> φ(k)ᵀ v, (images, features, width in whole vectors), flat."""
    width, columns = lanes.up(spec.width), lanes.up(spec.features)
    rows = spec.images * spec.tokens
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        keys = T.arg("keys", T.buffer((rows * columns,), "float32"))
        values = T.arg("values", T.buffer((rows * width,), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.features * width,), "float32"))
        down = split_evenly(spec.features, _ROWS)
        across = split_evenly(width // lanes.count, _VECTORS)

        def share(part: Expr, parts: int) -> None:
            totals = tile_buffer(lanes, down, across)
            with T.serial(*share_bounds(spec.images, part, parts)) as image:
                token, into = bind(image * spec.tokens), bind(image * spec.features * width)
                for feature, height in pieces(down):
                    for vector, count in pieces(across):
                        tile = _Tile(lanes, totals, height, count)
                        tile.clear()
                        with T.serial(0, spec.tokens) as number:
                            row = bind(token + number)
                            at = bind(row * columns + feature)
                            tile.add(
                                keys,
                                [at + i for i in range(height)],
                                values,
                                row * width + vector * lanes.count,
                            )
                        for i, j, total in tile.totals():
                            place = into + (feature + i) * width + (vector + j) * lanes.count
                            lanes.store(out, place, total)

        over_threads(share, threads)
    return builder.get()


def weigh_values(spec: LinearAttention, lanes: Lanes, threads: int) -> Any:
    """The kernel: (φ(q), φ(k)ᵀ v, mean of φ(k)) -> the attention's rows of whole vectors, flat."""
    width, columns = lanes.up(spec.width), lanes.up(spec.features)
    rows = spec.images * spec.tokens
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        queries = T.arg("queries", T.buffer((rows * columns,), "float32"))
        summary = T.arg("summary", T.buffer((spec.images * spec.features * width,), "float32"))
        mean = T.arg("mean", T.buffer((spec.images * columns,), "float32"))
        out = T.arg("out", T.buffer((rows * width,), "float32"))
        runs = split_evenly(spec.tokens, _ROWS)
        across = split_evenly(width // lanes.count, _VECTORS)

        def share(part: Expr, parts: int) -> None:
            totals = tile_buffer(lanes, runs, across)
            inverses = T.alloc_buffer((largest(runs),), "float32", scope="local")
            for run in runs:
                with T.serial(*share_bounds(spec.images * run.count, part, parts)) as index:
                    image = bind(index // run.count)
                    token = bind(image * spec.tokens + run.start + index % run.count * run.size)
                    for i in range(run.size):
                        start = bind((token + i) * columns)

                        def product(column: Expr, start: Expr = start, image: Expr = image) -> Expr:
                            factors = lanes.load(mean, image * columns + column)
                            return lanes.load(queries, start + column) * factors

                        # The columns after the features are zero.
                        share_of_mean = sum_over(lanes, columns, product)
                        divisor = share_of_mean * T.float32(spec.tokens) + T.float32(spec.eps)
                        T.buffer_store(inverses, T.float32(1) / divisor, [i])
                    for vector, count in pieces(across):
                        tile = _Tile(lanes, totals, run.size, count)
                        tile.clear()
                        with T.serial(0, spec.features) as feature:
                            row = image * spec.features + feature
                            places = [(token + i) * columns + feature for i in range(run.size)]
                            tile.add(queries, places, summary, row * width + vector * lanes.count)
                        for i, j, total in tile.totals():
                            place = (token + i) * width + (vector + j) * lanes.count
                            lanes.store(out, place, total * lanes.splat(inverses[i]))

        over_threads(share, threads)
    return builder.get()


@dataclass(frozen=True)
class _Tile:
    """Accumulators of `rows` numbers times `vectors` vectors."""

    lanes: Lanes
    buffer: Buffer
    rows: int
    vectors: int

    def clear(self) -> None:
        for place in range(self.rows * self.vectors):
            self.lanes.store(self.buffer, place * self.lanes.count, self.lanes.zero())

    def add(self, numbers: Buffer, places: list[Expr], values: Buffer, start: Expr) -> None:
        """Add the product of each number with the vectors that begin at `start`."""
        lanes = self.lanes
        loaded = [bind(lanes.load(values, start + j * lanes.count)) for j in range(self.vectors)]
        for i, place in enumerate(places):
            factor = bind(lanes.splat(numbers[place]))
            for j, value in enumerate(loaded):
                at = (i * self.vectors + j) * lanes.count
                lanes.store(self.buffer, at, lanes.fma(factor, value, lanes.load(self.buffer, at)))

    def totals(self) -> Iterator[tuple[int, int, Expr]]:
        """Row, vector and value of each accumulator."""
        for i in range(self.rows):
            for j in range(self.vectors):
                yield i, j, self.lanes.load(self.buffer, (i * self.vectors + j) * self.lanes.count)
