"""Weights fetched ahead: while tiles of one panel are computed, the next panel enters the cache.

Weights come from memory or from the last cache in every inference, and the fewer rows a product
has, the less time there is to wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, bind
from .schedule import Tile

LINE_BYTES = 64
# The loop over a product's depth is unrolled to a fetch, up to so many multiply-adds and steps.
# Longer loops gain nothing, and in some kernels LLVM then keeps accumulators in memory.
_MOST_UNROLLED, _MOST_STEPS = 48, 4
# One tile alone waits for its own panel.
_LEAST_TILES = 2


@dataclass(frozen=True)
class Prefetch:
    """How a panel is fetched: spread evenly over the loops of the first tiles of the panel before.

    A burst after each tile would stall the tile that follows.

    Attributes:
        steps: Steps along the depth from one fetch to the next.
        lines: Cache lines of a fetch.
        groups: Fetches of a tile.
        tiles: How many tiles fetch the whole panel.
    """

    steps: int
    lines: int
    groups: int
    tiles: int


def plan_prefetch(lines: int, depth: int, tiles: int, tile: Tile) -> Prefetch | None:
    """Plan the fetching of a panel.

    Args:
        lines: Cache lines of the panel.
        depth: Steps of a tile's loop.
        tiles: How many tiles pass each panel.
        tile: The largest tile.

    Returns:
        The plan with the fewest fetches a step; None if nothing is fetched.
    """
    if tiles < _LEAST_TILES or depth < tile.steps:
        return None
    unrolled = min(_MOST_STEPS, _MOST_UNROLLED // (tile.rows * tile.vectors))
    most = min(depth, max(tile.steps, unrolled))
    for steps in range(most // tile.steps * tile.steps, 0, -tile.steps):
        groups = depth // steps
        if -(-lines // groups) <= tiles:
            return Prefetch(steps, 1, groups, -(-lines // groups))
    groups = depth // tile.steps
    each = -(-lines // (groups * tiles))
    return Prefetch(tile.steps, each, groups, -(-lines // (groups * each)))


def fetch_lines(plan: Prefetch, weights: Buffer, first: Expr, place: Expr, group: Expr) -> None:
    """Emit a fetch of the next panel.

    Args:
        plan: The plan.
        weights: All panels, one after the other. The last panel fetches what follows the weights.
        first: The index of the panel's first number.
        place: The number of the tile among those that fetch.
        group: The number of the fetch in the tile.
    """
    numbers = LINE_BYTES // (1 if str(weights.dtype) == "int8" else 4)
    start = bind(first + (place * plan.groups + group) * (plan.lines * numbers))
    # To read (0), into the nearest cache (3), as data (1).
    hints = T.int32(0), T.int32(3), T.int32(1)
    for line in range(plan.lines):
        address = T.address_of(weights[start + line * numbers])
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, *hints))
