"""A dense layer: rows times packed weights, then bias, activation, factor and residual while the results are still in registers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import ACTIVATIONS, named
from .lanes import Buffer, Expr, Lanes
from .schedule import Schedule, Shape, Tile
from .tiles import Run, bounds, even, shares


@dataclass(frozen=True)
class Rows:
    """Rows of a flat buffer: row r of image b starts at (b * per_image + first + r) * width. per_image 0: all images share them."""

    per_image: int
    width: int
    first: int = 0

    def start(self, image: Expr, row: Expr) -> Expr:
        """The index of the row's first element."""
        return (image * self.per_image + self.first + row) * self.width


@dataclass(frozen=True)
class Dense:
    """out = residual + factor * act(x W + bias), for `rows` rows of each of `images` images.

    depth: K. width: columns of out, whole vectors. source: where x lies. bias, factor, residual: which operands there are, and where.
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

    def merged(self) -> Dense:
        """The same with all images as one, where their rows follow each other everywhere."""
        places = [place for place in (self.source, self.factor, self.residual) if place is not None]
        if self.images == 1 or any(place.per_image != self.rows or place.first for place in places):
            return self
        rows = self.images * self.rows
        source, factor, residual = (None if place is None else Rows(rows, place.width) for place in (self.source, self.factor, self.residual))
        assert source is not None
        return replace(self, images=1, rows=rows, source=source, factor=factor, residual=residual)

    def operands(self) -> dict[str, int]:
        """Name and size of each operand in order, the result last."""
        whole = self.merged()
        sizes = {"x": _size(whole.source, whole), "w": whole.depth * whole.width}
        sizes |= {"bias": whole.width} if whole.bias else {}
        sizes |= {"factor": _size(whole.factor, whole)} if whole.factor else {}
        sizes |= {"residual": _size(whole.residual, whole)} if whole.residual else {}
        return sizes | {"out": whole.images * whole.rows * whole.width}

    @property
    def shape(self) -> Shape:
        """What a schedule knows it by."""
        return Shape("dense", (self.merged().rows, self.depth, self.width))

    def panels(self, lanes: Lanes, schedule: Schedule) -> tuple[Run, ...]:
        """How the columns are cut, in vectors; the weights are packed so."""
        return even(self.width // lanes.count, schedule.tile(self.shape).vectors)


def dense(spec: Dense, lanes: Lanes, schedule: Schedule) -> Any:
    """The kernel: (x, packed weights, [bias], [factor], [residual]) -> out, all flat.

    Panels of weights are the outer loop: one stays in the nearest cache while all rows pass by. A tile's accumulators are named one by one, so
    that LLVM keeps them in registers.
    """
    panel_runs = spec.panels(lanes, schedule)
    whole = spec.merged()
    tile = schedule.tile(spec.shape)
    row_runs = even(whole.rows, tile.rows)
    grid = shares(schedule.threads, panel_runs, row_runs)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        buffers = {name: T.arg(name, T.buffer((size,), "float32")) for name, size in spec.operands().items()}
        if grid.threads == 1:
            _share(whole, lanes, tile, buffers, panel_runs, row_runs, (0, 1), (0, 1))
        else:
            with T.parallel(0, grid.threads) as thread:
                across, down = thread // grid.rows, thread % grid.rows
                _share(whole, lanes, tile, buffers, panel_runs, row_runs, (across, grid.panels), (down, grid.rows))
    return builder.get()


def _size(place: Rows | None, spec: Dense) -> int:
    assert place is not None
    return place.width * (max(1, spec.images) * place.per_image if place.per_image else place.first + spec.rows)


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
    accumulators = T.alloc_buffer((most,), "float32", scope="local")
    for columns in panel_runs:
        with T.serial(*bounds(columns.count, *across)) as panel:
            vector = columns.start + panel * columns.size
            for rows in row_runs:
                if spec.images == 1:
                    with T.serial(*bounds(rows.count, *down)) as tile:
                        _tile(spec, lanes, shape, buffers, accumulators, 0, rows.start + tile * rows.size, rows.size, vector, columns.size)
                else:
                    with T.serial(*bounds(spec.images * rows.count, *down)) as tile:
                        image, row = tile // rows.count, rows.start + tile % rows.count * rows.size
                        _tile(spec, lanes, shape, buffers, accumulators, image, row, rows.size, vector, columns.size)


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
    count = lanes.count
    starts = [named(spec.source.start(image, row + r)) for r in range(rows)]
    weights = named(vector * (spec.depth * count))
    product(
        lanes,
        accumulators,
        rows,
        vectors,
        spec.depth,
        shape.steps,
        lambda r, k: buffers["x"][starts[r] + k],
        lambda v, k: lanes.load(buffers["w"], weights + k * (vectors * count) + v * count),
    )
    out = Rows(spec.rows, spec.width)
    for r in range(rows):
        for v in range(vectors):
            column = (vector + v) * count
            value = lanes.load(accumulators, (r * vectors + v) * count)
            if spec.bias:
                value = value + lanes.load(buffers["bias"], column)
            value = named(value)
            value = ACTIVATIONS[spec.act](lanes, value)
            if spec.factor is not None:
                value = value * lanes.load(buffers["factor"], spec.factor.start(image, row + r) + column)
            if spec.residual is not None:
                value = value + lanes.load(buffers["residual"], spec.residual.start(image, row + r) + column)
            lanes.store(buffers["out"], out.start(image, row + r) + column, value)


def product(lanes: Lanes, accumulators: Buffer, rows: int, vectors: int, depth: int, steps: int, left: Any, right: Any) -> None:
    """accumulators[r, v] = sum over k < depth of left(r, k) * right(v, k), a number times a vector; the loop takes `steps` k at once."""
    count = lanes.count
    for index in range(rows * vectors):
        lanes.store(accumulators, index * count, lanes.splat(0.0))

    def step(k: Expr) -> None:
        across = [named(right(v, k)) for v in range(vectors)]
        for r in range(rows):
            one = named(lanes.splat(left(r, k)))
            for v in range(vectors):
                index = (r * vectors + v) * count
                lanes.store(accumulators, index, lanes.fma(one, across[v], lanes.load(accumulators, index)))

    whole = depth // steps
    if whole:
        with T.serial(0, whole) as k:
            for offset in range(steps):
                step(k * steps + offset)
    for k in range(whole * steps, depth):
        step(k)
