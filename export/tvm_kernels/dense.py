"""Dense layers: rows times packed weights, and what follows while results are in registers.

Rows and weights are fp32, or both are quantized: their product is exact in int32 and is scaled to
fp32 by column and row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import ACTIVATIONS
from .lanes import Buffer, Expr, Lanes, RowLayout, bind
from .loops import Run, share_bounds, split_evenly, thread_grid, tile_buffer
from .prefetch import LINE_BYTES, Prefetch, fetch_lines, plan_prefetch
from .product import product
from .quantization import Quantizer, store_function
from .schedule import Schedule, Shape, Tile

# Bytes of weights that an eight-bit tile reads in a cycle from a near cache, at most half of what
# that usually delivers, where others are fetched at the same time: with 6 x 4 of AVX-512, which
# reads 21, fetching cost 7 % of DeiT-T's time; with the tiles of AVX2 it saves 2 %.
_MOST_BYTES_A_CYCLE = 16


class Operand(NamedTuple):
    """The number of elements of an operand, and their type."""

    size: int
    type: str = "float32"


@dataclass(frozen=True)
class Dense:
    """out = residual + factor * act(x W + bias), for `rows` rows of each of `images` images.

    Attributes:
        images: Batch size.
        rows: Rows of each image.
        depth: Columns of x (K).
        width: Columns of out, a multiple of the vector width.
        source: Where x is.
        bias: Whether there is a bias.
        act: The activation.
        factor: Where the factor is, if there is one.
        residual: Where the residual is, if there is one.
        input_quantizer: x is quantized; W is int8 then, followed by the scales of its columns and,
            for dynamic ranges, the sums of their weights.
        output_quantizer: out is quantized statically.
    """

    images: int
    rows: int
    depth: int
    width: int
    source: RowLayout
    bias: bool = True
    act: str = "identity"
    factor: RowLayout | None = None
    residual: RowLayout | None = None
    input_quantizer: Quantizer | None = None
    output_quantizer: Quantizer | None = None

    def merged(self) -> Dense:
        """The same as one image, where the rows of all images follow each other everywhere."""
        layouts = [
            layout for layout in (self.source, self.factor, self.residual) if layout is not None
        ]
        contiguous = all(layout.per_image == self.rows and not layout.first for layout in layouts)
        if self.images == 1 or not contiguous:
            return self
        rows = self.images * self.rows
        source, factor, residual = (
            None if layout is None else RowLayout(rows, layout.width)
            for layout in (self.source, self.factor, self.residual)
        )
        assert source is not None
        return replace(self, images=1, rows=rows, source=source, factor=factor, residual=residual)

    def operands(self) -> dict[str, Operand]:
        """The operands by name, in order, the result last."""
        whole, quantizer = self.merged(), self.input_quantizer
        images, rows, width = whole.images, whole.rows, whole.width
        x = whole.source.size(images, rows)
        if quantizer is None:
            found = {"x": Operand(x), "w": Operand(whole.depth * width)}
        else:
            dot = quantizer.dot
            found = {
                "x": Operand(x, dot.stored),
                "w": Operand(dot.groups(whole.depth) * dot.group * width, "int8"),
                "scales": Operand(width),
            }
            if not quantizer.static:
                found["sums"] = Operand(width)
        if whole.bias:
            found["bias"] = Operand(width)
        for name, layout in (("factor", whole.factor), ("residual", whole.residual)):
            if layout is not None:
                found[name] = Operand(layout.size(images, rows))
        output = whole.output_quantizer
        if output is not None:
            found["range"] = Operand(2)
        stored = "float32" if output is None else output.dot.stored
        found["out"] = Operand(images * rows * width, stored)
        return found

    @property
    def shape(self) -> Shape:
        """The shape that selects the tile."""
        sizes = (self.merged().rows, self.depth, self.width)
        return Shape("dense" if self.input_quantizer is None else "dense-int8", sizes)

    def panels(self, lanes: Lanes, schedule: Schedule) -> tuple[Run, ...]:
        """How the columns are split into panels, in vectors; the weights are packed so."""
        return split_evenly(self.width // lanes.count, schedule.tile(self.shape).vectors)


def dense(spec: Dense, lanes: Lanes, schedule: Schedule) -> Any:
    """The kernel: the operands in order, the result last, all flat.

    Panels of weights are the outer loop: one panel stays in the nearest cache while all rows pass.
    The accumulators of a tile are indexed by constants, so that LLVM keeps them in registers.
    """
    panel_runs = spec.panels(lanes, schedule)
    whole = spec.merged()
    tile = schedule.tile(spec.shape)
    row_runs = split_evenly(whole.rows, tile.rows)
    grid = thread_grid(schedule.threads, panel_runs, row_runs)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        buffers = {
            name: T.arg(name, T.buffer((operand.size,), operand.type))
            for name, operand in spec.operands().items()
        }
        writer = _Writer(whole, lanes, tile.steps, buffers)
        if grid.threads == 1:
            writer.share(panel_runs, row_runs, (0, 1), (0, 1))
        else:
            with T.parallel(0, grid.threads) as thread:
                across, down = thread // grid.rows, thread % grid.rows
                writer.share(panel_runs, row_runs, (across, grid.panels), (down, grid.rows))
    return builder.get()


def _minimum(a: Expr, b: Expr) -> Expr:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else T.min(a, b)


def _maximum(a: Expr, b: Expr) -> Expr:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else T.max(a, b)


class _Writer:
    """Emits the loops of a dense kernel."""

    def __init__(self, spec: Dense, lanes: Lanes, steps: int, buffers: dict[str, Buffer]) -> None:
        self.spec, self.lanes, self.steps, self.buffers = spec, lanes, steps, buffers
        self.accumulators: Buffer = None

    def share(
        self,
        panel_runs: tuple[Run, ...],
        row_runs: tuple[Run, ...],
        across: tuple[Expr, int],
        down: tuple[Expr, int],
    ) -> None:
        """The panels and rows of one thread; across, down: its (part, parts) of both."""
        images = self.spec.images
        dtype = "float32" if self.spec.input_quantizer is None else "int32"
        self.accumulators = tile_buffer(self.lanes, row_runs, panel_runs, dtype)
        # Each thread fetches for its own caches.
        row_tiles = images * sum(run.count for run in row_runs) // down[1]
        for columns in panel_runs:
            plan = self.prefetch_plan(Tile(row_runs[0].size, columns.size, self.steps), row_tiles)
            with T.serial(*share_bounds(columns.count, *across)) as panel:
                vector = columns.start + panel * columns.size
                passed: Expr = 0
                for rows in row_runs:
                    start, end = share_bounds(images * rows.count, *down)
                    middle = start
                    if plan is not None:
                        middle = _minimum(end, start + _maximum(plan.tiles - passed, 0))
                    tile = Tile(rows.size, columns.size, self.steps)
                    self.tiles(tile, rows, (start, middle), vector, plan, passed)
                    self.tiles(tile, rows, (middle, end), vector)
                    passed = passed + end - start

    def tiles(
        self,
        tile: Tile,
        rows: Run,
        bounds: tuple[Expr, Expr],
        vector: Expr,
        plan: Prefetch | None = None,
        passed: Expr = 0,
    ) -> None:
        """Some tiles of a panel.

        Args:
            tile: Their size.
            rows: The rows of each image that such tiles cover.
            bounds: The first tile and the end, counted over all images.
            vector: The panel's first vector.
            plan: How they fetch the next panel; None: not at all.
            passed: How many tiles fetched before.
        """
        start, end = bounds
        if isinstance(start, int) and isinstance(end, int) and start >= end:
            return
        per_vector = self.depth * self.group * self.lanes.count
        with T.serial(start, end) as index:
            image, number = (
                (0, index) if self.spec.images == 1 else (index // rows.count, index % rows.count)
            )
            row = rows.start + number * rows.size
            if plan is None:
                self.tile(tile, image, row, vector)
                return
            following, place = bind((vector + tile.vectors) * per_vector), passed + index - start
            unrolled = replace(tile, steps=plan.steps)
            fetch = partial(fetch_lines, plan, self.buffers["w"], following, place)
            self.tile(unrolled, image, row, vector, fetch)

    def prefetch_plan(self, tile: Tile, tiles: int) -> Prefetch | None:
        """How the panels of a width are fetched, with so many tiles to a panel."""
        weight_bytes = 4
        if self.spec.input_quantizer is not None:
            weight_bytes = 1
            # Each cycle multiplies two registers of 4 bytes a lane.
            if 2 * 4 * self.lanes.count / tile.rows > _MOST_BYTES_A_CYCLE:
                return None
        panel_bytes = self.depth * self.group * self.lanes.count * tile.vectors * weight_bytes
        return plan_prefetch(-(-panel_bytes // LINE_BYTES), self.depth, tiles, tile)

    @property
    def group(self) -> int:
        """Weights of a column that are multiplied at once."""
        quantizer = self.spec.input_quantizer
        return 1 if quantizer is None else quantizer.dot.group

    @property
    def depth(self) -> int:
        """Steps of a tile's loop."""
        return -(-self.spec.depth // self.group)

    def tile(
        self,
        tile: Tile,
        image: Expr,
        row: Expr,
        vector: Expr,
        fetch: Callable[[Expr], None] | None = None,
    ) -> None:
        """One register tile.

        Args:
            tile: Its size.
            image: The image.
            row: Its first row.
            vector: Its first vector of columns.
            fetch: See `product`.
        """
        spec, lanes, buffers = self.spec, self.lanes, self.buffers
        starts = [bind(spec.source.start(image, row + r)) for r in range(tile.rows)]
        self.product(tile, starts, vector, fetch)
        out = RowLayout(spec.rows, spec.width)
        store = store_function(lanes, spec.output_quantizer, buffers.get("range"))
        for r in range(tile.rows):
            own_range = self.own_range(starts[r])
            for v in range(tile.vectors):
                column = (vector + v) * lanes.count
                total = lanes.load(self.accumulators, (r * tile.vectors + v) * lanes.count)
                value = bind(self.scaled(total, own_range, column))
                value = ACTIVATIONS[spec.act](lanes, value)
                if spec.factor is not None:
                    index = spec.factor.start(image, row + r) + column
                    value = value * lanes.load(buffers["factor"], index)
                if spec.residual is not None:
                    index = spec.residual.start(image, row + r) + column
                    value = value + lanes.load(buffers["residual"], index)
                store(buffers["out"], out.start(image, row + r) + column, value)

    def product(
        self,
        tile: Tile,
        starts: list[Expr],
        vector: Expr,
        fetch: Callable[[Expr], None] | None,
    ) -> None:
        """The sums of one register tile; starts: where its rows begin."""
        spec, lanes, count = self.spec, self.lanes, self.lanes.count
        x, w = self.buffers["x"], self.buffers["w"]
        if spec.input_quantizer is None:
            first = bind(vector * (spec.depth * count))
            product(
                lanes,
                self.accumulators,
                tile,
                spec.depth,
                lambda r, k: lanes.splat(x[starts[r] + k]),
                lambda v, k: lanes.load(w, first + k * (tile.vectors * count) + v * count),
                fetch,
            )
            return
        dot = spec.input_quantizer.dot
        first = bind(vector * (self.depth * dot.group * count))
        product(
            dot,
            self.accumulators,
            tile,
            self.depth,
            lambda r, k: dot.codes(x, starts[r] + k * dot.group),
            lambda v, k: dot.weights(
                w, first + (k * (tile.vectors * count) + v * count) * dot.group
            ),
            fetch,
        )

    def own_range(self, start: Expr) -> tuple[Expr, Expr] | None:
        """(step, base) of a row in all lanes, where it has its own."""
        quantizer = self.spec.input_quantizer
        if quantizer is None or quantizer.static:
            return None
        step, base = (
            bind(self.lanes.splat(bind(part)))
            for part in quantizer.read_range(self.buffers["x"], start, self.spec.source.width)
        )
        return step, base

    def scaled(self, total: Expr, own_range: tuple[Expr, Expr] | None, column: Expr) -> Expr:
        """The values of x W + bias of one vector of columns, from its sums."""
        spec, lanes, buffers = self.spec, self.lanes, self.buffers
        bias = lanes.load(buffers["bias"], column) if spec.bias else None
        if spec.input_quantizer is None:
            return total if bias is None else total + bias
        scale = lanes.load(buffers["scales"], column)
        total = spec.input_quantizer.dot.as_float(total)
        if own_range is None:
            return total * scale if bias is None else lanes.fma(total, scale, bias)
        step, base = own_range
        sums = lanes.load(buffers["sums"], column)
        shift = base * sums if bias is None else lanes.fma(base, sums, bias)
        return lanes.fma(total * scale, step, shift)
