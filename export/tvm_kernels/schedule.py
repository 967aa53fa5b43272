"""The few numbers that the kernels leave open, and what a tuner found for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...targets.vector import VectorUnit

Kind = Literal["dense", "dense-int8", "attention"]


@dataclass(frozen=True)
class Tile:
    """A register tile: rows x vectors accumulators; the loop over the products' depth takes `steps`
    at once.
    """

    rows: int
    vectors: int
    steps: int = 1

    def fits(self, unit: VectorUnit) -> bool:
        """Accumulators, one row of weights and one broadcast find room in the registers."""
        return self.rows * self.vectors + self.vectors + 1 <= unit.registers


@dataclass(frozen=True)
class Shape:
    """A kernel's shape. dense (in fp32 or int8): rows, depth, columns. attention: queries, tokens,
    query/key width, value width (of one head).
    """

    kind: Kind
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """threads: shares of the parallel loops. usual: the tile of everything that nobody tuned."""

    usual: Tile
    threads: int = 1
    tuned: Mapping[Shape, Tile] = field(default_factory=dict)

    def tile(self, shape: Shape) -> Tile:
        """The tile of a kernel. Fewer rows than the usual tile's leave registers for more vectors,
        else latency would show.
        """
        if (found := self.tuned.get(shape)) is not None:
            return found
        rows = shape.sizes[0]
        if shape.kind == "attention" or rows >= self.usual.rows:
            return self.usual
        most = self.usual.rows * self.usual.vectors
        return replace(self.usual, rows=rows, vectors=max(self.usual.vectors, min(8, most // rows)))


def default_schedule(
    unit: VectorUnit, threads: int = 1, tuned: Mapping[Shape, Tile] | None = None
) -> Schedule:
    """What is good for a vector unit. 32 registers: 6 x 4, which loads least for its multiply-adds;
    16: 6 x 2.

    DeiT-T on a Zen 5 core, processor time over ONNX Runtime's: 6 x 4 0.81, 8 x 3 0.82, 8 x 3 with
    two steps 0.85.
    """
    return Schedule(Tile(6, 4) if unit.registers >= 32 else Tile(6, 2), threads, dict(tuned or {}))


def candidates(unit: VectorUnit) -> tuple[Tile, ...]:
    """Tiles that a tuner tries: enough accumulators to hide the latency of a multiply-add, none of
    which has to be spilled.
    """
    shapes = [
        (rows, vectors)
        for vectors in (1, 2, 3, 4, 6)
        for rows in (4, 5, 6, 8, 10, 12, 14)
        if rows * vectors >= 8
    ]
    tiles = [Tile(rows, vectors, steps) for rows, vectors in shapes for steps in (1, 2)]
    fitting = [tile for tile in tiles if tile.fits(unit)]
    # The largest tiles load least for each multiply-add, hence come first where time is short.
    return tuple(
        sorted(
            fitting,
            key=lambda tile: (tile.steps, (tile.rows + tile.vectors) / (tile.rows * tile.vectors)),
        )
    )
