"""Rotary position embedding of queries and keys, from a fixed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import Architecture, RopeGridSpec, RopeSpec
from ..token_order import grid_places


class Rope(nn.Module):
    """Rotates each pair of columns by the angle of its token, on (batch, heads, tokens, qk).

    `table`: (heads or 1, 2, patches, pairs), cosines and sines; saved with the weights and not
    trained. `frequencies`: (heads or 1, 2, pairs), vertical and horizontal, in radians per unit of
    the coordinates; only another image size needs them. Su et al. 2021, "RoFormer", eq. 34.
    """

    table: Tensor
    frequencies: Tensor | None

    def __init__(self, spec: RopeSpec, heads: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        rows = heads if spec.per_head else 1
        self.register_buffer("table", torch.zeros(rows, 2, spec.tokens, width // 2))
        self.register_buffer("frequencies", torch.zeros(rows, 2, width // 2) if spec.at else None)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate the patches in `x`, which may be only the first ones; keep the prefix tokens.

        `positions`: which tokens of the stem they are, (batch, tokens or more). None: the first
        ones.
        """
        count = x.shape[-2] - self.spec.prefix
        if count <= 0:
            return x
        patches = x[:, :, self.spec.prefix :] if self.spec.prefix else x
        if positions is None:
            cos, sin = self.table[:, 0, :count], self.table[:, 1, :count]
        else:
            rows = positions[:, self.spec.prefix : x.shape[-2]] - self.spec.prefix
            # One gather of whole rows, as in `select.rows_of`.
            each = self.table.index_select(2, rows.flatten()).unflatten(2, (-1, count))
            cos, sin = each[:, 0].transpose(0, 1), each[:, 1].transpose(0, 1)
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


def stream_table(table: Tensor, architecture: Architecture) -> Tensor:
    """The rows of a table of the whole grid for the tokens behind the prefix, in their order.

    Learned tokens between the patches are not rotated.

    Args:
        table: (heads or 1, 2, patches of the grid, pairs).
        architecture: The network.

    Returns:
        (heads or 1, 2, tokens behind the prefix, pairs).
    """
    rows = table[:, :, list(grid_places(architecture))]
    still = angle_zero(table)
    for place in architecture.inner or ():
        number = place - architecture.prefix
        rows = torch.cat([rows[:, :, :number], still, rows[:, :, number:]], dim=2)
    return rows


def angle_zero(table: Tensor) -> Tensor:
    """A row of a table (heads or 1, 2, tokens, pairs) that rotates nothing."""
    return torch.stack([torch.ones_like(table[:, 0, :1]), torch.zeros_like(table[:, 1, :1])], dim=1)


def rope_table(at: RopeGridSpec, frequencies: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the cosines and sines of a grid, (heads or 1, 2, patches, pairs).

    `frequencies` has shape (heads or 1, 2, pairs); the table is computed in its type.
    """
    down, across = (axis.to(frequencies) for axis in coordinates(at, grid))
    angles = (
        down[:, None, None] * frequencies[:, 0, None, None]
        + across[:, None] * frequencies[:, 1, None, None]
    )
    angles = angles.flatten(1, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def coordinates(at: RopeGridSpec, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the float32 coordinates of rows and columns, rounded in the same steps as in timm."""
    found = []
    for axis, count in enumerate(grid):
        if at.kind == "pixel":
            values = torch.linspace(-1.0, 1.0, steps=count)
        else:
            center = 0.5 if at.kind == "centred" else 0.0
            values = torch.arange(count, dtype=torch.float32) + center + at.offset
        if at.kind == "centred":
            values = values / {"separate": count, "min": min(grid), "max": max(grid)}[at.over]
        if at.reference is not None:
            values = values / count * at.reference[axis]
        found.append(2.0 * values - 1.0 if at.kind == "centred" else values)
    return found[0], found[1]


def pairs(layout: str, width: int) -> Tensor:
    """Return the pairs of columns that are rotated as one, (width / 2, 2)."""
    columns = torch.arange(width)
    return columns.view(2, -1).T.contiguous() if layout == "half" else columns.view(-1, 2)
