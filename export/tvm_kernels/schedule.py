"""The free parameters of the kernels: register tiles, and the tiles that tuning found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...targets.vector import VectorUnit
from .loops import split_evenly

Kind = Literal["dense", "dense-int8", "attention"]
# The most vectors of a tile that has fewer rows than the default.
_MOST_VECTORS = 8
# Multiply-adds that a core starts each cycle, and cycles until a sum can be added to again: with
# fewer accumulators than their product a tile waits for itself.
_STARTED, _LATENCY = 2, 4


@dataclass(frozen=True)
class Tile:
    """A register tile of rows x vectors accumulators.

    Attributes:
        rows: Rows of the product.
        vectors: Vectors of its columns.
        steps: How far the loop over the products' depth is unrolled.
    """

    rows: int
    vectors: int
    steps: int = 1

    def fits(self, unit: VectorUnit) -> bool:
        """Whether the registers hold the accumulators, a row of weights and one broadcast."""
        return self.rows * self.vectors + self.vectors + 1 <= unit.registers


@dataclass(frozen=True)
class Shape:
    """The shape of a kernel, by which tiles are tuned.

    Attributes:
        kind: The kernel; dense is in fp32.
        sizes: For dense kernels rows, depth and columns; for attention queries, tokens, query/key
            width and value width of one head.
    """

    kind: Kind
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """Tiles and threads of all kernels.

    Attributes:
        default: The tile of shapes that are not tuned.
        threads: Into how many shares parallel loops are split.
        tuned: Tiles by shape.
        registers: Vector registers that a tile may take.
        wide: Another tile for fp32 products of many rows, where it leaves no panel too narrow.
        int8: The tile of int8 products of many rows, by default the same.
        lanes: Numbers in a vector.
    """

    default: Tile
    threads: int = 1
    tuned: Mapping[Shape, Tile] = field(default_factory=dict)
    registers: int = 32
    wide: Tile | None = None
    int8: Tile | None = None
    lanes: int = 1

    def tile(self, shape: Shape) -> Tile:
        """The tile of a shape.

        A product with fewer rows than the default tile gets more vectors, since few accumulators do
        not hide the latency of multiply-adds.
        """
        if (found := self.tuned.get(shape)) is not None:
            return found
        rows, default = shape.sizes[0], self.default
        if shape.kind == "dense-int8" and self.int8 is not None:
            default = self.int8
        if shape.kind == "attention":
            return default
        if rows >= default.rows:
            if self.wide is None or shape.kind != "dense":
                return default
            vectors = -(-shape.sizes[2] // self.lanes)
            # At equal cycles the wide tile wins, since it loads less for its multiply-adds.
            return min((self.wide, default), key=lambda tile: cycles_a_step(rows, vectors, tile))
        most = min(default.rows * default.vectors // rows, (self.registers - 1) // (rows + 1))
        vectors = max(default.vectors, min(_MOST_VECTORS, most))
        return replace(default, rows=rows, vectors=vectors)


def cycles_a_step(rows: int, vectors: int, tile: Tile) -> float:
    """Estimate the cycles of one step along a product's depth, over all of its tiles.

    Args:
        rows: Rows of the product.
        vectors: Vectors of its columns.
        tile: The largest register tile; both are split evenly.
    """
    return sum(
        down.count * across.count * max(down.size * across.size / _STARTED, _LATENCY)
        for down in split_evenly(rows, tile.rows)
        for across in split_evenly(vectors, tile.vectors)
    )


def default_schedule(
    unit: VectorUnit, threads: int = 1, tuned: Mapping[Shape, Tile] | None = None
) -> Schedule:
    """The schedule of a vector unit: tiles of 6 x 4 with 32 registers, of 6 x 2 with 16.

    6 x 4 loads least for its multiply-adds. DeiT-T on a Zen 5 core, processor time over ONNX
    Runtime's: 6 x 4 0.81, 8 x 3 0.82, 8 x 3 with two steps 0.85.

    AVX2 unrolls fp32 products by four steps: LLVM unrolls a loop of one step by itself, and then
    keeps some of attention's accumulators in memory, which takes 1.5 times as long; products gain 2
    to 3 %. Tiles of 4 x 3 have as many accumulators as 6 x 2 and fewer loads: equal in wide
    products, 2 to 3 % faster in narrow ones. An int8 step holds one more constant and one more
    product, so that 6 x 2 spills; 5 x 2 multiplies as fast.
    """
    shared = (threads, dict(tuned or {}), unit.registers)
    if unit.registers >= 32:
        return Schedule(Tile(6, 4), *shared)
    if unit.kind != "avx2":
        return Schedule(Tile(6, 2), *shared)
    return Schedule(Tile(6, 2, 4), *shared, Tile(4, 3, 4), Tile(5, 2), unit.lanes)


def candidates(unit: VectorUnit) -> tuple[Tile, ...]:
    """The tiles that tuning measures, the most promising first.

    All have enough accumulators to hide the latency of a multiply-add, and none spills registers.
    """
    shapes = [
        (rows, vectors)
        for vectors in (1, 2, 3, 4, 6)
        for rows in (4, 5, 6, 8, 10, 12, 14)
        if rows * vectors >= 8
    ]
    steps = tuple(dict.fromkeys((default_schedule(unit).default.steps, 1, 2)))
    tiles = [Tile(*shape, step) for step in steps for shape in shapes]

    def loads_per_multiply_add(tile: Tile) -> float:
        return (tile.rows + tile.vectors) / (tile.rows * tile.vectors)

    fitting = [tile for tile in tiles if tile.fits(unit)]
    return tuple(
        sorted(fitting, key=lambda tile: (steps.index(tile.steps), loads_per_multiply_add(tile)))
    )
