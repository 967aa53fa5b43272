"""Rotary position embedding of queries and keys by a fixed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import RopeSpec


class Rope(nn.Module):
    """Turns each pair of columns by the angle of its token: (batch, heads, tokens, qk) -> the same shape. Su et al. 2021, eq. 34.

    `table`: (heads or 1, 2, patches, pairs), cosines and sines; it is saved with the weights and not trained.
    """

    table: Tensor

    def __init__(self, spec: RopeSpec, heads: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("table", torch.zeros(heads if spec.per_head else 1, 2, spec.tokens, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Prefix tokens stay as they are; of the patches the first so many are there as `x` has."""
        turned = x.shape[-2] - self.spec.prefix
        if turned <= 0:
            return x
        patches = x[:, :, self.spec.prefix :] if self.spec.prefix else x
        cos, sin = self.table[:, 0, :turned], self.table[:, 1, :turned]
        if self.spec.layout == "half":
            first, second = patches.chunk(2, dim=-1)
            y = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            pairs = torch.unflatten(patches, -1, (-1, 2))
            first, second = pairs[..., 0], pairs[..., 1]
            y = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([x[:, :, : self.spec.prefix], y], dim=2) if self.spec.prefix else y


def pairs(layout: str, width: int) -> Tensor:
    """(width / 2, 2) columns that turn together."""
    columns = torch.arange(width)
    return columns.view(2, -1).T.contiguous() if layout == "half" else columns.view(-1, 2)
