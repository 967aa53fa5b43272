"""A dense layer: rows times packed weights, then bias, activation, factor and residual while the
results are still in registers.

Rows and weights are fp32, or both codes of eight bits, whose product is exact in 32 bits and turned
into fp32 by the scales of its column and row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import ACTIVATIONS, named
from .codes import Coding, store_function
from .lanes import Buffer, Expr, Lanes
from .place import Rows
from .product import product
from .schedule import Schedule, Shape, Tile
from .tiles import Run, bounds, even, shares


class Operand(NamedTuple):
    """How many elements of which type."""

    size: int
    type: str = "float32"


@dataclass(frozen=True)
class Dense:
    """out = residual + factor * act(x W + bias), for `rows` rows of each of `images` images.

    depth: K. width: columns of out, whole vectors. source: where x lies. bias, factor, residual:
    which operands there are, and where. reads: x are codes, W is int8, and a scale a column (and
    the sum of its weights, where rows have bases of their own) come behind it. writes: out become
    codes of a range known beforehand.
    """

    images: int
    rows: int
    depth: int
    width: int
    source: Rows
    bias: bool = True
    act: str = "identity"
    factor: Rows | None = None
    residual: Rows | None = None
    reads: Coding | None = None
    writes: Coding | None = None

    def merged(self) -> Dense:
        """The same with all images as one, where their rows follow each other everywhere."""
        places = [place for place in (self.source, self.factor, self.residual) if place is not None]
        if self.images == 1 or any(place.per_image != self.rows or place.first for place in places):
            return self
        rows = self.images * self.rows
        source, factor, residual = (
            None if place is None else Rows(rows, place.width)
            for place in (self.source, self.factor, self.residual)
        )
        assert source is not None
        return replace(self, images=1, rows=rows, source=source, factor=factor, residual=residual)

    def operands(self) -> dict[str, Operand]:
        """Name, size and type of each operand in order, the result last."""
        whole, coding = self.merged(), self.reads
        x = whole.source.size(whole.images, whole.rows)
        if coding is None:
            found = {"x": Operand(x), "w": Operand(whole.depth * whole.width)}
        else:
            depth = coding.dot.groups(whole.depth) * coding.dot.group
            found = {
                "x": Operand(x, coding.dot.stored),
                "w": Operand(depth * whole.width, "int8"),
                "scales": Operand(whole.width),
            }
            found |= {} if coding.static else {"sums": Operand(whole.width)}
        found |= {"bias": Operand(whole.width)} if whole.bias else {}
        found |= (
            {"factor": Operand(whole.factor.size(whole.images, whole.rows))} if whole.factor else {}
        )
        found |= (
            {"residual": Operand(whole.residual.size(whole.images, whole.rows))}
            if whole.residual
            else {}
        )
        found |= {"range": Operand(2)} if whole.writes else {}
        return found | {
            "out": Operand(
                whole.images * whole.rows * whole.width,
                "float32" if whole.writes is None else whole.writes.dot.stored,
            )
        }

    @property
    def shape(self) -> Shape:
        """What a schedule knows it by."""
        return Shape(
            "dense" if self.reads is None else "dense-int8",
            (self.merged().rows, self.depth, self.width),
        )

    def panels(self, lanes: Lanes, schedule: Schedule) -> tuple[Run, ...]:
        """How the columns are cut, in vectors; the weights are packed so."""
        return even(self.width // lanes.count, schedule.tile(self.shape).vectors)


def dense(spec: Dense, lanes: Lanes, schedule: Schedule) -> Any:
    """The kernel: the operands in order, the result last, all flat.

    Panels of weights are the outer loop: one stays in the nearest cache while all rows pass by. A
    tile's accumulators are named one by one, so that LLVM keeps them in registers.
    """
    panel_runs = spec.panels(lanes, schedule)
    whole = spec.merged()
    tile = schedule.tile(spec.shape)
    row_runs = even(whole.rows, tile.rows)
    grid = shares(schedule.threads, panel_runs, row_runs)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        buffers = {
            name: T.arg(name, T.buffer((operand.size,), operand.type))
            for name, operand in spec.operands().items()
        }
        if grid.threads == 1:
            _share(whole, lanes, tile, buffers, panel_runs, row_runs, (0, 1), (0, 1))
        else:
            with T.parallel(0, grid.threads) as thread:
                across, down = thread // grid.rows, thread % grid.rows
                _share(
                    whole,
                    lanes,
                    tile,
                    buffers,
                    panel_runs,
                    row_runs,
                    (across, grid.panels),
                    (down, grid.rows),
                )
    return builder.get()


def _share(
    spec: Dense,
    lanes: Lanes,
    shape: Tile,
    buffers: dict[str, Buffer],
    panel_runs: tuple[Run, ...],
    row_runs: tuple[Run, ...],
    across: tuple[Expr, int],
    down: tuple[Expr, int],
) -> None:
    """The panels and rows of one thread."""
    most = max(run.size for run in row_runs) * max(run.size for run in panel_runs) * lanes.count
    accumulators = T.alloc_buffer(
        (most,), "float32" if spec.reads is None else "int32", scope="local"
    )
    for columns in panel_runs:
        with T.serial(*bounds(columns.count, *across)) as panel:
            vector = columns.start + panel * columns.size
            for rows in row_runs:
                if spec.images == 1:
                    with T.serial(*bounds(rows.count, *down)) as tile:
                        _tile(
                            spec,
                            lanes,
                            shape,
                            buffers,
                            accumulators,
                            0,
                            rows.start + tile * rows.size,
                            rows.size,
                            vector,
                            columns.size,
                        )
                else:
                    with T.serial(*bounds(spec.images * rows.count, *down)) as tile:
                        image, row = tile // rows.count, rows.start + tile % rows.count * rows.size
                        _tile(
                            spec,
                            lanes,
                            shape,
                            buffers,
                            accumulators,
                            image,
                            row,
                            rows.size,
                            vector,
                            columns.size,
                        )


def _tile(
    spec: Dense,
    lanes: Lanes,
    shape: Tile,
    buffers: dict[str, Buffer],
    accumulators: Buffer,
    image: Expr,
    row: Expr,
    rows: int,
    vector: Expr,
    vectors: int,
) -> None:
    """One register tile: `rows` rows from `row`, `vectors` vectors of columns from `vector`."""
    count, x, w, coding = lanes.count, buffers["x"], buffers["w"], spec.reads
    starts = [named(spec.source.start(image, row + r)) for r in range(rows)]
    if coding is None:
        weights = named(vector * (spec.depth * count))
        product(
            lanes, accumulators, rows, vectors, spec.depth, shape.steps,
            lambda r, k: lanes.splat(x[starts[r] + k]),
            lambda v, k: lanes.load(w, weights + k * (vectors * count) + v * count),
        )  # fmt: skip
    else:
        dot, depth = coding.dot, coding.dot.groups(spec.depth)
        weights = named(vector * (depth * dot.group * count))
        product(
            dot, accumulators, rows, vectors, depth, shape.steps,
            lambda r, k: dot.codes(x, starts[r] + k * dot.group),
            lambda v, k: dot.weights(w, weights + (k * (vectors * count) + v * count) * dot.group),
        )  # fmt: skip
    out = Rows(spec.rows, spec.width)
    store = store_function(lanes, spec.writes, buffers.get("range"))
    for r in range(rows):
        own = None
        if coding is not None and not coding.static:
            own = [
                named(lanes.splat(named(part)))
                for part in coding.read_range(x, starts[r], spec.source.width)
            ]
        for v in range(vectors):
            column = (vector + v) * count
            value = named(
                _product_of(
                    spec,
                    lanes,
                    buffers,
                    lanes.load(accumulators, (r * vectors + v) * count),
                    own,
                    column,
                )
            )
            value = ACTIVATIONS[spec.act](lanes, value)
            if spec.factor is not None:
                value = value * lanes.load(
                    buffers["factor"], spec.factor.start(image, row + r) + column
                )
            if spec.residual is not None:
                value = value + lanes.load(
                    buffers["residual"], spec.residual.start(image, row + r) + column
                )
            store(buffers["out"], out.start(image, row + r) + column, value)


def _product_of(
    spec: Dense,
    lanes: Lanes,
    buffers: dict[str, Buffer],
    total: Expr,
    own: list[Expr] | None,
    column: Expr,
) -> Expr:
    """x W + bias of one vector of columns. own: the row's step and base, where it has its own."""
    coding = spec.reads
    bias = lanes.load(buffers["bias"], column) if spec.bias else None
    if coding is None:
        return total if bias is None else total + bias
    scale, total = lanes.load(buffers["scales"], column), coding.dot.as_float(total)
    if own is None:
        return total * scale if bias is None else lanes.fma(total, scale, bias)
    step, base = own
    sums = lanes.load(buffers["sums"], column)
    shift = base * sums if bias is None else lanes.fma(base, sums, bias)
    return lanes.fma(total * scale, step, shift)
