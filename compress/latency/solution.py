"""What `solve` searches for, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..oneshot.allocation import Option
from ..oneshot.budgets import Precision
from .losses import Losses
from .programme import BINS


@dataclass(frozen=True)
class SolveOptions:
    """How `solve` searches.

    Attributes:
        tokens: Whether tokens may leave, at the stem too, where the losses have some for them.
        round_to: Widths are multiples of it; used only for losses that `solve` makes itself.
        precision: Of the weights in `file_mb` and `peak_memory_mb`. None: that of the cost table,
            fp32 without one. Activations have that of the table.
        bins: The budget is divided into so many; times are rounded up to whole ones.
        levels: Numbers of tokens to choose from, beside even steps.
    """

    tokens: bool = True
    round_to: int = 8
    precision: Precision | None = None
    bins: int = BINS
    levels: tuple[int, ...] = ()


DEFAULTS = SolveOptions()


@dataclass(frozen=True)
class Limits:
    """Budgets of one network; those that are None set no limit.

    Attributes:
        latency_ms: Milliseconds of an inference.
        file_mb: Megabytes of the weights in a file.
        peak_memory_mb: Megabytes of weights and activations.
    """

    latency_ms: float | None = None
    file_mb: float | None = None
    peak_memory_mb: float | None = None

    def __post_init__(self) -> None:
        given = {
            "latency_ms": self.latency_ms,
            "file_mb": self.file_mb,
            "peak_memory_mb": self.peak_memory_mb,
        }
        if all(value is None for value in given.values()):
            raise InputError(f"no budget: give {', '.join(given)}")
        for name, value in given.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} = {value}: give a number above 0")

    def texts(self) -> dict[str, str]:
        """The budgets that are given, as an error names them."""
        return {name: f"{name} = {value:g}" for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class Solution:
    """A choice of tokens, widths and depth.

    Attributes:
        options: The widths of each sub-layer by dimension, their loss, and their milliseconds.
        stem_tokens: Tokens that the stem returns, prefix tokens included.
        counts: Tokens that the stream carries after each step, prefix tokens included.
        embed: Channels of the residual stream.
        latency_ms: The latency by the table; None without one.
        loss: The sum of all losses.
        stream_loss: The part of the narrower stream.
        file_bytes: The estimated size of the weights in a file.
        losses: What the choice was made from.
    """

    options: Mapping[str, Option]
    stem_tokens: int
    counts: tuple[int, ...]
    embed: int
    latency_ms: float | None
    loss: float
    stream_loss: float = 0.0
    file_bytes: float = 0.0
    losses: Losses = field(default_factory=lambda: Losses({}), repr=False)

    @property
    def widths(self) -> dict[str, Mapping[str, int]]:
        """The widths of each sub-layer by dimension; 0 where it is removed."""
        return {name: option.widths for name, option in self.options.items()}

    def mask(self) -> StructuredMask:
        """The mask of the widths, without tokens; which ones stay, `choose_tokens` chooses.

        A narrower stream is part of it where the losses name channels; a rotated one is not.
        """
        kept: dict[str, dict[str, Tensor]] = {}
        for name, option in self.options.items():
            for curve in self.losses.sublayers[name].curves:
                width = option.widths[curve.dimension]
                if width < curve.widths[0]:
                    kept.setdefault(curve.dimension, {})[name] = curve.keep(width)
        order = self.losses.embed_order
        if order is not None and self.embed < len(order):
            embed = torch.ones(len(order), dtype=torch.bool)
            embed[order[: len(order) - self.embed]] = False
            kept["embed"] = {SHARED: embed}
        return StructuredMask(kept, scale="original", note={"method": "latency"})
