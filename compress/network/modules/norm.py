"""LayerNorm and RMSNorm over the last dimension, as the architecture states them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import NormSpec


class Norm(nn.Module):
    """Normalise the last dimension: (..., width) -> (..., width). `heads` > 0 gives each head a
    weight of its own: (..., heads, tokens, width).
    """

    def __init__(self, spec: NormSpec, heads: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.heads = heads
        shape = (heads, spec.width) if heads else (spec.width,)
        self.weight = nn.Parameter(torch.ones(shape)) if spec.weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        width = (self.spec.width,)
        if self.heads:
            return affine(normalise(x, self.spec), self.weight, self.bias, per_head=True)
        if self.spec.kind == "rms":
            return affine(F.rms_norm(x, width, self.weight, self.spec.eps), None, self.bias)
        return F.layer_norm(x, width, self.weight, self.bias, self.spec.eps)


def normalise(x: Tensor, spec: NormSpec) -> Tensor:
    """Zero mean (LayerNorm only) and unit scale over the last dimension."""
    width = (spec.width,)
    return (
        F.rms_norm(x, width, None, spec.eps)
        if spec.kind == "rms"
        else F.layer_norm(x, width, None, None, spec.eps)
    )


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, per_head: bool = False
) -> Tensor:
    """x * weight + bias; with `per_head`, weights (heads, width) meet x (..., heads, tokens,
    width).
    """
    if weight is not None:
        x = x * (weight.unsqueeze(-2) if per_head else weight)
    if bias is not None:
        x = x + (bias.unsqueeze(-2) if per_head else bias)
    return x
