"""Attention head by head: scores, softmax and the sum of values.

The scores of a few queries stay in the nearest cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import exp2
from .key_packing import HeadColumns, KeyPacking, key_panels
from .lanes import Buffer, Expr, Lanes, RowLayout, bind
from .loops import Run, largest, over_threads, share_bounds, split_evenly, sum_over, tile_buffer
from .product import product
from .quantization import Quantizer, store_function
from .schedule import Schedule, Shape, Tile

# The softmax uses powers of two; this factor of the scores makes them powers of e.
LOG2_E = math.log2(math.e)
# Below any score, and far from overflow.
_LOWEST_SCORE = -1e30


@dataclass(frozen=True)
class Attend:
    """softmax(q kᵀ) v for the first `query_rows` of `tokens` tokens.

    The queries contain the scale and the logarithm of e to base 2. The result has heads *
    values.each columns.

    Attributes:
        images: Batch size.
        heads: Number of attention maps.
        tokens: Rows of keys and values.
        query_rows: Rows of queries.
        source: Where the queries are.
        queries: Their columns.
        keys: The columns of the keys, before they were packed.
        values: The columns of the values, before they were packed.
        biased: A number is added to each score: (heads, query_rows, tokens rounded up to
            whole vectors).
        bias_by_image: There are such numbers for each image.
        output_quantizer: The result is quantized statically.
        columns: There is a second result: how much all queries of a head together attend to each
            token, (images, heads, tokens rounded up to whole vectors).
    """

    images: int
    heads: int
    tokens: int
    query_rows: int
    source: RowLayout
    queries: HeadColumns
    keys: HeadColumns
    values: HeadColumns
    biased: bool = False
    bias_by_image: bool = False
    output_quantizer: Quantizer | None = None
    columns: bool = False

    def bias_size(self, lanes: Lanes) -> int:
        """The number of biases."""
        images = self.images if self.bias_by_image else 1
        return images * self.heads * self.query_rows * lanes.up(self.tokens)

    @property
    def shape(self) -> Shape:
        """The shape that selects the tile."""
        sizes = (self.query_rows, self.tokens, self.keys.each, self.values.each)
        return Shape("attention", sizes)

    def packing(self, vectors: int) -> KeyPacking:
        """How its keys and values are packed, for tiles of `vectors` vectors."""
        return KeyPacking(self.images, self.heads, self.tokens, self.keys, self.values, vectors)


class AttendBuffers(NamedTuple):
    """The operands of the kernel, and the local buffers of one thread."""

    x: Buffer
    packed: Buffer
    bias: Buffer | None
    static_range: Buffer | None
    out: Buffer
    columns: Buffer | None = None
    scores: Buffer = None
    accumulators: Buffer = None
    inverses: Buffer = None


def attend(spec: Attend, lanes: Lanes, schedule: Schedule) -> Any:
    """The kernel: (rows of queries, packed keys and values, [biases], [range]) -> out, [columns].

    All are flat; out has the shape (images, query_rows, heads * values.each).
    """
    tile = schedule.tile(spec.shape)
    row_runs = split_evenly(spec.query_rows, tile.rows)
    pairs = spec.images * spec.heads
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        operands = _operands(spec, lanes, tile)

        def share(part: Expr, parts: int) -> None:
            writer = TileWriter(spec, lanes, tile, operands, row_runs)
            if spec.columns:
                # A thread sums the columns of whole heads.
                with T.serial(*share_bounds(pairs, part, parts)) as pair:
                    writer.clear_columns(pair)
                    for run in row_runs:
                        with T.serial(0, run.count) as number:
                            writer.tile(pair, run.start + number * run.size, run.size)
                return
            for run in row_runs:
                # One loop over the tiles of all heads: equal shares although heads are few.
                with T.serial(*share_bounds(pairs * run.count, part, parts)) as index:
                    pair = bind(index // run.count)
                    row = bind(run.start + index % run.count * run.size)
                    writer.tile(pair, row, run.size)

        over_threads(share, schedule.threads)
    return builder.get()


def _operands(spec: Attend, lanes: Lanes, tile: Tile) -> AttendBuffers:
    x_size = spec.source.size(spec.images, spec.query_rows)
    x = T.arg("x", T.buffer((x_size,), "float32"))
    packed_size = spec.packing(tile.vectors).size(lanes)
    packed = T.arg("packed", T.buffer((packed_size,), "float32"))
    bias, static_range, stored = None, None, "float32"
    if spec.biased:
        bias = T.arg("bias", T.buffer((spec.bias_size(lanes),), "float32"))
    if spec.output_quantizer is not None:
        static_range = T.arg("range", T.buffer((2,), "float32"))
        stored = spec.output_quantizer.dot.stored
    out_size = spec.images * spec.query_rows * spec.heads * spec.values.each
    out = T.arg("out", T.buffer((out_size,), stored))
    columns = None
    if spec.columns:
        columns_size = spec.images * spec.heads * lanes.up(spec.tokens)
        columns = T.arg("columns", T.buffer((columns_size,), "float32"))
    return AttendBuffers(x, packed, bias, static_range, out, columns)


class TileWriter:
    """Emits tiles of attention, one head and a few queries each, with a thread's local buffers.

    Args:
        spec: The attention.
        lanes: The vectors.
        tile: The largest register tile.
        operands: The kernel's buffers, to which the local ones are added.
        row_runs: How the queries are split into tiles.
        mixes: Whether the weights are applied to the values, too.
    """

    def __init__(
        self,
        spec: Attend,
        lanes: Lanes,
        tile: Tile,
        operands: AttendBuffers,
        row_runs: tuple[Run, ...],
        *,
        mixes: bool = True,
    ) -> None:
        self.spec, self.lanes, self.sizes = spec, lanes, tile
        # From the scores of one query to the next.
        self.stride = lanes.up(spec.tokens)
        self.key_panels = key_panels(spec.tokens, lanes, tile.vectors)
        columns = spec.values.each // lanes.count
        self.value_panels = split_evenly(columns, tile.vectors) if mixes else ()
        rows = largest(row_runs)
        self.buffers = operands._replace(
            scores=T.alloc_buffer((rows * self.stride,), "float32", scope="local"),
            accumulators=tile_buffer(lanes, row_runs, (*self.key_panels, *self.value_panels)),
            inverses=T.alloc_buffer((rows,), "float32", scope="local"),
        )

    def tile(self, pair: Expr, row: Expr, rows: int) -> None:
        """The queries from `row` on, for a pair (image, head), counted over both."""
        spec = self.spec
        values = bind(self.weights(pair, row, rows) + self.stride * spec.keys.each)
        if spec.columns:
            self.add_to_columns(pair, rows)
        image, head = bind(pair // spec.heads), bind(pair % spec.heads)
        width = spec.values.each
        targets = [
            bind((image * spec.query_rows + row + r) * (spec.heads * width) + head * width)
            for r in range(rows)
        ]
        self.mix(values, targets)

    def clear_columns(self, pair: Expr) -> None:
        """Set the sums of a pair (image, head) to zero."""
        lanes, target = self.lanes, bind(pair * self.stride)
        with T.serial(0, self.stride // lanes.count) as vector:
            lanes.store(self.buffers.columns, target + vector * lanes.count, lanes.zero())

    def add_to_columns(self, pair: Expr, rows: int) -> None:
        """Add the normalized weights of the tile's queries to the sums of a pair."""
        lanes, buffers, target = self.lanes, self.buffers, bind(pair * self.stride)
        with T.serial(0, self.stride // lanes.count) as vector:
            column = vector * lanes.count
            total = lanes.load(buffers.columns, target + column)
            for row in range(rows):
                weight = lanes.load(buffers.scores, row * self.stride + column)
                total = lanes.fma(weight, lanes.splat(buffers.inverses[row]), total)
            lanes.store(buffers.columns, target + column, total)

    def weights(self, pair: Expr, row: Expr, rows: int) -> Expr:
        """The weights of the values, before they are multiplied with the inverses.

        Returns:
            The index of the pair's packed keys.
        """
        spec, lanes = self.spec, self.lanes
        image, head = bind(pair // spec.heads), bind(pair % spec.heads)
        start = bind(pair * spec.packing(self.sizes.vectors).head_size(lanes))
        self.scores(start, image, head, row, rows)
        with T.serial(0, rows) as r:
            self.softmax(bind(r * self.stride), r)
        return start

    def scores(self, start: Expr, image: Expr, head: Expr, row: Expr, rows: int) -> None:
        """The products of queries with all keys, plus the bias.

        Args:
            start: Index of the head's packed keys.
            image: The image.
            head: The head.
            row: The first query.
            rows: Number of queries.
        """
        spec, lanes, buffers = self.spec, self.lanes, self.buffers
        count, each = lanes.count, spec.keys.each
        queries = [
            bind(spec.source.start(image, row + r) + spec.queries.first + head * spec.queries.each)
            for r in range(rows)
        ]

        def panel_scores(run: Run, panel: Expr) -> None:
            first = bind(start + (run.start + panel * run.size) * count * each)
            product(
                lanes,
                buffers.accumulators,
                Tile(rows, run.size, self.sizes.steps),
                each,
                lambda r, k: lanes.splat(buffers.x[queries[r] + k]),
                lambda v, k: lanes.load(buffers.packed, first + k * (run.size * count) + v * count),
            )
            for r in range(rows):
                for v in range(run.size):
                    column = (run.start + panel * run.size + v) * count
                    value = lanes.load(buffers.accumulators, (r * run.size + v) * count)
                    if buffers.bias is not None:
                        maps = image * spec.heads + head if spec.bias_by_image else head
                        index = (maps * spec.query_rows + row + r) * self.stride + column
                        value = value + lanes.load(buffers.bias, index)
                    lanes.store(buffers.scores, r * self.stride + column, value)

        for run in self.key_panels:
            with T.serial(0, run.count) as panel:
                panel_scores(run, panel)

    def softmax(self, start: Expr, r: Expr) -> None:
        """The scores from `start` become 2^(score - largest); inverses[r] is 1 over their sum."""
        total = powers(self.lanes, self.buffers.scores, start, self.spec.tokens)
        T.buffer_store(self.buffers.inverses, T.float32(1) / total, [r])

    def mix(self, values: Expr, targets: list[Expr]) -> None:
        """The sums of values, weighted by the scores, stored from `targets` on."""
        spec, lanes, buffers = self.spec, self.lanes, self.buffers
        count, each, rows = lanes.count, spec.values.each, len(targets)
        store = store_function(lanes, spec.output_quantizer, buffers.static_range)

        def panel_sums(run: Run, panel: Expr) -> None:
            column = bind((run.start + panel * run.size) * count)
            product(
                lanes,
                buffers.accumulators,
                Tile(rows, run.size, self.sizes.steps),
                spec.tokens,
                lambda r, k: lanes.splat(buffers.scores[r * self.stride + k]),
                lambda v, k: lanes.load(buffers.packed, values + k * each + column + v * count),
            )
            for r in range(rows):
                for v in range(run.size):
                    total = lanes.load(buffers.accumulators, (r * run.size + v) * count)
                    value = total * lanes.splat(buffers.inverses[r])
                    store(buffers.out, targets[r] + column + v * count, value)

        for run in self.value_panels:
            with T.serial(0, run.count) as panel:
                panel_sums(run, panel)


def powers(lanes: Lanes, scores: Buffer, start: Expr, tokens: int) -> Expr:
    """Emit 2^(score - largest) for the scores of a row, in place.

    Args:
        lanes: The vectors.
        scores: The scores, padded to whole vectors.
        start: Index of the row's first score.
        tokens: Number of scores.

    Returns:
        Their sum.
    """
    full, tail = divmod(tokens, lanes.count)
    if tail:
        last = start + full * lanes.count
        valid = lanes.first(tail, lanes.load(scores, last), _LOWEST_SCORE)
        lanes.store(scores, last, valid)
    vectors = full + bool(tail)
    top = _largest(lanes, scores, start, vectors)

    def power(column: Expr) -> Expr:
        value = bind(exp2(lanes, lanes.load(scores, start + column) - top))
        lanes.store(scores, start + column, value)
        return value

    # Lanes after the last token hold 2^-126, which does not change the sum.
    return sum_over(lanes, vectors * lanes.count, power)


def _largest(lanes: Lanes, scores: Buffer, start: Expr, vectors: int) -> Expr:
    """The largest of a row's scores, in all lanes."""
    count = lanes.count
    ways = min(4, vectors)
    tops = T.alloc_buffer((ways * count,), "float32", scope="local")
    for way in range(ways):
        lanes.store(tops, way * count, lanes.load(scores, start + way * count))
    for vector in range(ways, vectors):
        index = vector % ways * count
        top = T.max(lanes.load(tops, index), lanes.load(scores, start + vector * count))
        lanes.store(tops, index, top)
    top = lanes.load(tops, 0)
    for way in range(1, ways):
        top = T.max(top, lanes.load(tops, way * count))
    return bind(lanes.splat(bind(lanes.largest(bind(top)))))
