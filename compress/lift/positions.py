"""What an attention is told about places, beside the tokens themselves: rotary tables and relative biases, at the model's image size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..architecture import RelativeBiasSpec
from .registry import Piece


@dataclass(frozen=True)
class Places:
    """Passed from a model to its blocks and on to their attentions.

    `rope`: (heads or 1, patches, 2 * qk) sines and cosines in timm's layout. `bias`: a relative bias that all blocks share, as in BEiT.
    """

    grid: tuple[int, int]
    prefix: int
    rope: Tensor | None = None
    bias: Piece[RelativeBiasSpec] | None = None
