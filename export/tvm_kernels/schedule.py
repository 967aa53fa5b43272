"""The free parameters of the kernels: register tiles, and the tiles that tuning found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...targets.vector import VectorUnit

Kind = Literal["dense", "dense-int8", "attention"]
# The most vectors of a tile that has fewer rows than the default.
_MOST_VECTORS = 8


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
    """

    default: Tile
    threads: int = 1
    tuned: Mapping[Shape, Tile] = field(default_factory=dict)
    registers: int = 32

    def tile(self, shape: Shape) -> Tile:
        """The tile of a shape.

        A product with fewer rows than the default tile gets more vectors, since few accumulators do
        not hide the latency of multiply-adds.
        """
        if (found := self.tuned.get(shape)) is not None:
            return found
        rows, default = shape.sizes[0], self.default
        if shape.kind == "attention" or rows >= default.rows:
            return default
        most = min(default.rows * default.vectors // rows, (self.registers - 1) // (rows + 1))
        vectors = max(default.vectors, min(_MOST_VECTORS, most))
        return replace(default, rows=rows, vectors=vectors)


def default_schedule(
    unit: VectorUnit, threads: int = 1, tuned: Mapping[Shape, Tile] | None = None
) -> Schedule:
    """The schedule of a vector unit: tiles of 6 x 4 with 32 registers, of 6 x 2 with 16.

    6 x 4 loads least for its multiply-adds. DeiT-T on a Zen 5 core, processor time over ONNX
    Runtime's: 6 x 4 0.81, 8 x 3 0.82, 8 x 3 with two steps 0.85.
    """
    tile = Tile(6, 4) if unit.registers >= 32 else Tile(6, 2)
    return Schedule(tile, threads, dict(tuned or {}), unit.registers)


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
    tiles = [Tile(rows, vectors, steps) for rows, vectors in shapes for steps in (1, 2)]

    def loads_per_multiply_add(tile: Tile) -> float:
        return (tile.rows + tile.vectors) / (tile.rows * tile.vectors)

    fitting = [tile for tile in tiles if tile.fits(unit)]
    return tuple(sorted(fitting, key=lambda tile: (tile.steps, loads_per_multiply_add(tile))))
