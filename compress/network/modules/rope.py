"""Rotary position embedding of queries and keys by a fixed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import RopeGridSpec, RopeSpec


class Rope(nn.Module):
    """Turns each pair of columns by the angle of its token: (batch, heads, tokens, qk) -> the same
    shape. Su et al. 2021, eq. 34.

    `table`: (heads or 1, 2, patches, pairs), cosines and sines; it is saved with the weights and
    not trained. `frequencies`: (heads or 1, 2, pairs), down and across, where the table's origin is
    known; they are there for other image sizes, and nothing is computed with them.
    """

    table: Tensor
    frequencies: Tensor | None

    def __init__(self, spec: RopeSpec, heads: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        rows = heads if spec.per_head else 1
        self.register_buffer("table", torch.zeros(rows, 2, spec.tokens, width // 2))
        self.register_buffer("frequencies", torch.zeros(rows, 2, width // 2) if spec.at else None)

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
            y = torch.stack(
                [first * cos - second * sin, second * cos + first * sin], dim=-1
            ).flatten(-2)
        return torch.cat([x[:, :, : self.spec.prefix], y], dim=2) if self.spec.prefix else y


def rope_table(at: RopeGridSpec, frequencies: Tensor, grid: tuple[int, int]) -> Tensor:
    """(heads or 1, 2, patches, pairs) cosines and sines of a grid, from frequencies (heads or 1, 2,
    pairs); computed in their type.
    """
    down, across = (places.to(frequencies) for places in coordinates(at, grid))
    angles = (
        down[:, None, None] * frequencies[:, 0, None, None]
        + across[:, None] * frequencies[:, 1, None, None]
    )
    angles = angles.flatten(1, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def coordinates(at: RopeGridSpec, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Float32 coordinates of the rows and of the columns, each rounded as timm rounds them."""
    found = []
    for axis, count in enumerate(grid):
        if at.kind == "pixel":
            places = torch.linspace(-1.0, 1.0, steps=count)
        else:
            places = (
                torch.arange(count, dtype=torch.float32)
                + (0.5 if at.kind == "centred" else 0.0)
                + at.offset
            )
        if at.kind == "centred":
            places = places / {"separate": count, "min": min(grid), "max": max(grid)}[at.over]
        if at.reference is not None:
            places = places / count * at.reference[axis]
        found.append(2.0 * places - 1.0 if at.kind == "centred" else places)
    return found[0], found[1]


def pairs(layout: str, width: int) -> Tensor:
    """(width / 2, 2) columns that turn together."""
    columns = torch.arange(width)
    return columns.view(2, -1).T.contiguous() if layout == "half" else columns.view(-1, 2)
