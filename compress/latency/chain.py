"""The sub-layers of a network at one width of the stream: what each of their options takes.

Where patches may leave at the stem, it is the first link of the chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...targets.cost_table import CostTable
from ..network.architecture import Architecture
from ..oneshot.budgets import Precision, file_bytes
from .amounts import milliseconds, peak_numbers, weight_bytes
from .losses import Losses
from .problem import Choices, Grid, Levels, stage_of, token_grid
from .programme import Numbers, Plan, Stage, least_time
from .shapes import ends_ms

# A sum that exceeds a budget by this share is equal to it, in another order of summation.
EQUAL = 1e-9


@dataclass(frozen=True)
class Chain:
    """The sub-layers at one width of the stream.

    Attributes:
        embed: Channels of the stream.
        stream_loss: What this width of it loses.
        choices: The options of each sub-layer, and the stem if patches may leave there.
        grids: The token numbers of each.
        times: Milliseconds of each, (pairs, options); of the stem, those beside `ends_ms`.
        bytes: Bytes of the weights.
        peaks: Numbers in memory at most.
        ends_ms: Milliseconds of the stem and the head, at the fewest tokens of the stem.
        ends_bytes: Their bytes, and those of the file around all weights.
    """

    embed: int
    stream_loss: float
    choices: Sequence[Choices]
    grids: Sequence[Grid]
    times: Sequence[Numbers]
    bytes: Sequence[Numbers]
    peaks: Sequence[Numbers]
    ends_ms: float
    ends_bytes: float

    def stages(
        self,
        amounts: Sequence[Numbers],
        most_peak: float = math.inf,
        losses: Sequence[Numbers] | None = None,
    ) -> list[Stage]:
        """The stages of the programme.

        Args:
            amounts: What the options take.
            most_peak: The most numbers that an option may have in memory.
            losses: Replaces what the options lose.
        """
        found = []
        rows = zip(self.choices, self.grids, amounts, self.peaks, strict=True)
        for choices, grid, amount, peak in rows:
            found.append(stage_of(choices, grid, np.where(peak <= most_peak, amount, np.inf)))
        if losses is None:
            return found
        return [replace(stage, losses=loss) for stage, loss in zip(found, losses, strict=True)]

    def left_ms(self, latency_ms: float | None, table: CostTable | None) -> float | None:
        """The milliseconds that a latency leaves to the sub-layers; None without a limit."""
        if latency_ms is None or table is None:
            return None
        whole = table.parts_ms(latency_ms)
        left = whole - self.ends_ms
        return 0.0 if -EQUAL * whole <= left < 0 else left

    @cached_property
    def caps(self) -> Numbers:
        """The peaks of options from the least one with which there is a choice, rising."""
        values = [peak[grid.possible] for peak, grid in zip(self.peaks, self.grids, strict=True)]
        every = np.unique(np.concatenate([np.zeros(1), *values]))
        low, high = 0, len(every) - 1
        while low < high:
            middle = (low + high) // 2
            if math.isfinite(least_time(self.stages(self.bytes, float(every[middle])))):
                high = middle
            else:
                low = middle + 1
        return every[low:]


def chain_of(
    architecture: Architecture,
    losses: Losses,
    choices: Sequence[Choices],
    levels: Levels,
    table: CostTable | None,
    precision: Precision,
    stream: tuple[int, float],
) -> Chain:
    """The sub-layers at a width of the stream.

    Args:
        architecture: The network.
        losses: What each choice loses.
        choices: The options of each sub-layer, and the stem if patches may leave there.
        levels: The numbers of tokens.
        table: The cost table; None: nothing takes any time.
        precision: Of the weights.
        stream: The channels of the stream, and what this width loses.
    """
    embed, lost = stream
    grids = [token_grid(architecture, each, levels, losses) for each in choices]
    pairs = list(zip(choices, grids, strict=True))
    if table is None:
        times = [np.zeros(grid.possible.shape) for grid in grids]
        ends = 0.0
    else:
        times = [milliseconds(architecture, *pair, table, embed) for pair in pairs]
        if choices and choices[0].embeds:
            # What no choice changes is outside the chain, where times are rounded up.
            ends = float(times[0].min())
            times[0] = times[0] - ends
        else:
            ends = ends_ms(table, architecture, embed, architecture.tokens)
    empty = architecture.model_copy(update={"steps": (), "selects": ()})
    return Chain(
        embed=embed,
        stream_loss=lost,
        choices=choices,
        grids=grids,
        times=times,
        bytes=[weight_bytes(architecture, *pair, embed, precision) for pair in pairs],
        peaks=[
            np.broadcast_to(peak_numbers(each, grid, embed), grid.possible.shape)
            for each, grid in pairs
        ],
        ends_ms=ends,
        ends_bytes=embed / architecture.embed * file_bytes(empty, precision),
    )


def total(amounts: Sequence[Numbers], plan: Plan) -> float:
    """What the options of a plan take."""
    return sum(float(each[choice]) for each, choice in zip(amounts, plan.choices, strict=True))
