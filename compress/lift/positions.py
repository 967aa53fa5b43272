"""What an attention is told about places, beside the tokens themselves: rotary tables and relative
biases, at the model's image size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..network.architecture import RelativeBiasSpec, RopeGridSpec
from .registry import Piece


@dataclass(frozen=True)
class Turns:
    """`table`: (heads or 1, patches, 2 * qk) sines and cosines in timm's layout; `frequencies`:
    (heads or 1, 2, qk / 2) that it came from, on the grid `at`.
    """

    table: Tensor
    frequencies: Tensor | None = None
    at: RopeGridSpec | None = None


@dataclass(frozen=True)
class Places:
    """Passed from a model to its blocks and on to their attentions. `bias`: a relative bias that
    all blocks share, as in BEiT.
    """

    grid: tuple[int, int]
    prefix: int
    rope: Turns | None = None
    bias: Piece[RelativeBiasSpec] | None = None
