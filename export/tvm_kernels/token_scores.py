"""Scores of patches, larger for those to keep: by attention, and sums that a predictor needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import ACTIVATIONS
from .attention import Attend, AttendBuffers, TileWriter, powers
from .key_packing import HeadColumns
from .lanes import Buffer, Expr, Lanes, RowLayout, bind
from .loops import largest, over_threads, share_bounds, split_evenly, sum_over
from .schedule import Schedule

# Rows of weights, or tokens, that a sweep over the columns takes at once.
_ROWS = 4


@dataclass(frozen=True)
class FoldedQueries:
    """A query of each head, times the weights of its keys: q·(x Wk) = (Wk q)·x.

    Attributes:
        images: Batch size; each has one query a head.
        heads: Number of attention maps.
        each: Columns of one head's query.
        width: Columns of x, a multiple of the vector width.
        source: Columns of a row of queries.
    """

    images: int
    heads: int
    each: int
    width: int
    source: int


def fold_queries(spec: FoldedQueries, lanes: Lanes, threads: int) -> Any:
    """The kernel: (queries, weights (heads, each, width)) -> (images, heads, width), all flat."""
    width, count = spec.width, lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        queries = T.arg("queries", T.buffer((spec.images * spec.source,), "float32"))
        weights = T.arg("weights", T.buffer((spec.heads * spec.each * width,), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.heads * width,), "float32"))

        def add(head: Expr, image: Expr, first: Expr, rows: int) -> None:
            """Add `rows` rows of a head's weights, each times a number of its query."""
            column = bind(head * spec.each + first)
            factors = [
                bind(lanes.splat(queries[image * spec.source + column + row]))
                for row in range(rows)
            ]
            start = bind(column * width)
            target = bind((image * spec.heads + head) * width)
            with T.serial(0, width // count) as vector:
                total = lanes.load(out, target + vector * count)
                for row, factor in enumerate(factors):
                    value = lanes.load(weights, start + row * width + vector * count)
                    total = lanes.fma(factor, value, total)
                lanes.store(out, target + vector * count, total)

        def share(part: Expr, parts: int) -> None:
            # A head's weights stay in the cache while all images pass.
            with (
                T.serial(*share_bounds(spec.heads, part, parts)) as head,
                T.serial(0, spec.images) as image,
            ):
                with T.serial(0, width // count) as vector:
                    target = (image * spec.heads + head) * width + vector * count
                    lanes.store(out, target, lanes.zero())
                for run in split_evenly(spec.each, _ROWS):
                    with T.serial(0, run.count) as number:
                        add(head, image, run.start + number * run.size, run.size)

        over_threads(share, threads)
    return builder.get()


@dataclass(frozen=True)
class RowWeights:
    """The attention of one query a head to rows: softmax over the products with each row.

    The queries contain the scale and the logarithm of e to base 2.

    Attributes:
        images: Batch size.
        heads: Number of attention maps.
        tokens: Rows of each image.
        source: Where the rows are; all columns are multiplied, those that fill a vector are zero
            in the queries.
    """

    images: int
    heads: int
    tokens: int
    source: RowLayout


def row_weights(spec: RowWeights, lanes: Lanes, threads: int) -> Any:
    """The kernel: (rows, queries (images, heads, width)) -> (images, heads, whole vectors), flat.

    The last dimension is that of the tokens.
    """
    width, stride = spec.source.width, lanes.up(spec.tokens)
    runs = split_evenly(spec.tokens, _ROWS)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.source.size(spec.images, spec.tokens),), "float32"))
        queries = T.arg("queries", T.buffer((spec.images * spec.heads * width,), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.heads * stride,), "float32"))

        def share(part: Expr, parts: int) -> None:
            sums = T.alloc_buffer((largest(runs) * lanes.count,), "float32", scope="local")
            with T.serial(*share_bounds(spec.images * spec.heads, part, parts)) as pair:
                query, target = bind(pair * width), bind(pair * stride)
                image = bind(pair // spec.heads)
                for run in runs:
                    with T.serial(0, run.count) as number:
                        token = bind(run.start + number * run.size)
                        starts = [
                            bind(spec.source.start(image, token + row)) for row in range(run.size)
                        ]
                        _dot_products(lanes, (queries, query), (x, starts), width, sums)
                        for row in range(run.size):
                            total = lanes.total(bind(lanes.load(sums, row * lanes.count)))
                            T.buffer_store(out, total, [target + token + row])
                total = powers(lanes, out, target, spec.tokens)
                _scale(lanes, out, target, stride, T.float32(1) / total)

        over_threads(share, threads)
    return builder.get()


def _dot_products(
    lanes: Lanes,
    vector: tuple[Buffer, Expr],
    rows: tuple[Buffer, list[Expr]],
    width: int,
    sums: Buffer,
) -> None:
    """The sums, lane by lane, of a vector's products with several rows."""
    (buffer, start), (x, starts) = vector, rows
    for row in range(len(starts)):
        lanes.store(sums, row * lanes.count, lanes.zero())
    with T.serial(0, width // lanes.count) as part:
        column = part * lanes.count
        factor = bind(lanes.load(buffer, start + column))
        for row, first in enumerate(starts):
            total = lanes.load(sums, row * lanes.count)
            total = lanes.fma(factor, lanes.load(x, first + column), total)
            lanes.store(sums, row * lanes.count, total)


def _scale(lanes: Lanes, buffer: Buffer, start: Expr, length: int, factor: Expr) -> None:
    """Multiply whole vectors, in place."""
    splat = bind(lanes.splat(bind(factor)))
    with T.serial(0, length // lanes.count) as vector:
        index = start + vector * lanes.count
        lanes.store(buffer, index, lanes.load(buffer, index) * splat)


def column_sums(spec: Attend, lanes: Lanes, schedule: Schedule) -> Any:
    """The kernel: (rows of queries, packed keys, [biases]) -> sums over the queries, all flat.

    The result has the shape (images, heads, tokens in whole vectors): how much all queries of a
    head attend to each token. Values are not read.
    """
    tile = schedule.tile(spec.shape)
    runs, stride = split_evenly(spec.query_rows, tile.rows), lanes.up(spec.tokens)
    pairs = spec.images * spec.heads
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x_size = spec.source.size(spec.images, spec.query_rows)
        x = T.arg("x", T.buffer((x_size,), "float32"))
        packed_size = spec.packing(tile.vectors).size(lanes)
        packed = T.arg("packed", T.buffer((packed_size,), "float32"))
        bias = None
        if spec.biased:
            bias = T.arg("bias", T.buffer((spec.bias_size(lanes),), "float32"))
        out = T.arg("out", T.buffer((pairs * stride,), "float32"))
        operands = AttendBuffers(x, packed, bias, None, out, columns=out)

        def share(part: Expr, parts: int) -> None:
            writer = TileWriter(spec, lanes, tile, operands, runs, mixes=False)
            with T.serial(*share_bounds(pairs, part, parts)) as pair:
                writer.clear_columns(pair)
                for run in runs:
                    with T.serial(0, run.count) as number:
                        writer.weights(pair, run.start + number * run.size, run.size)
                        writer.add_to_columns(pair, run.size)

        over_threads(share, schedule.threads)
    return builder.get()


def row_lengths(
    images: int, rows: int, source: RowLayout, columns: HeadColumns, lanes: Lanes
) -> Any:
    """The kernel: rows -> the Euclidean lengths of some columns (images, rows), flat.

    Args:
        images: Batch size.
        rows: Rows of each image.
        source: Where they are.
        columns: The columns; their number is a multiple of the vector width.
        lanes: The vectors.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((source.size(images, rows),), "float32"))
        out = T.arg("out", T.buffer((images * rows,), "float32"))
        with T.serial(0, images) as image, T.serial(0, rows) as row:
            start = bind(source.start(image, row) + columns.first)

            def square(column: Expr) -> Expr:
                value = bind(lanes.load(x, start + column))
                return value * value

            T.buffer_store(out, T.sqrt(sum_over(lanes, columns.each, square)), [image * rows + row])
    return builder.get()


@dataclass(frozen=True)
class JoinMaps:
    """The weighted sum over the heads of how much they attend to each patch.

    Attributes:
        images: Batch size.
        heads: Number of attention maps.
        tokens: Tokens of a map; its rows are whole vectors.
        first: The token of the first patch.
        patches: Number of patches.
        lengths: Whether each sum is multiplied with a number of its token.
    """

    images: int
    heads: int
    tokens: int
    first: int
    patches: int
    lengths: bool


def join_maps(spec: JoinMaps, lanes: Lanes) -> Any:
    """The kernel: (maps, factors (heads,), [lengths (images, tokens)]) -> (images, patches)."""
    stride = lanes.up(spec.tokens)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        maps = T.arg("maps", T.buffer((spec.images * spec.heads * stride,), "float32"))
        factors = T.arg("factors", T.buffer((spec.heads,), "float32"))
        lengths = None
        if spec.lengths:
            lengths = T.arg("lengths", T.buffer((spec.images * spec.tokens,), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.patches,), "float32"))
        with T.serial(0, spec.images) as image, T.serial(0, spec.patches) as patch:
            index = image * spec.patches + patch
            T.buffer_store(out, T.float32(0), [index])
            token = bind(spec.first + patch)
            with T.serial(0, spec.heads) as head:
                value = maps[(image * spec.heads + head) * stride + token] * factors[head]
                T.buffer_store(out, out[index] + value, [index])
            if lengths is not None:
                value = out[index] * lengths[image * spec.tokens + token]
                T.buffer_store(out, value, [index])
    return builder.get()


def add_shared(images: int, rows: int, source: RowLayout, act: str, lanes: Lanes) -> Any:
    """The kernel: (x, one row an image) -> act(x + that row), (images, rows, width), flat.

    Args:
        images: Batch size.
        rows: Rows of each image.
        source: Where x is.
        act: The activation.
        lanes: The vectors; the width is a multiple of them.
    """
    width, count = source.width, lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((source.size(images, rows),), "float32"))
        shared = T.arg("shared", T.buffer((images * width,), "float32"))
        out = T.arg("out", T.buffer((images * rows * width,), "float32"))
        with (
            T.serial(0, images) as image,
            T.serial(0, rows) as row,
            T.serial(0, width // count) as part,
        ):
            value = lanes.load(x, source.start(image, row) + part * count)
            value = bind(value + lanes.load(shared, image * width + part * count))
            target = (image * rows + row) * width + part * count
            lanes.store(out, target, ACTIVATIONS[act](lanes, value))
    return builder.get()
