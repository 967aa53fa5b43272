"""Relative position bias: what is added to q·k for the offset between two tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import RelativeBiasSpec


class RelativeBias(nn.Module):
    """A table of biases, one row an offset, one column a head: () -> (heads, tokens, tokens). Swin
    (Liu et al. 2021), BEiT (Bao et al. 2021).
    """

    index: Tensor

    def __init__(self, spec: RelativeBiasSpec, heads: int) -> None:
        super().__init__()
        self.spec = spec
        self.table = nn.Parameter(torch.zeros(spec.rows, heads))
        # Follows from the grid, hence not saved.
        self.register_buffer("index", offsets(spec), persistent=False)

    def place(self) -> None:
        """Give the index real numbers after the module was built without memory."""
        self.index = offsets(self.spec, torch.device("cpu"))

    def forward(self) -> Tensor:
        """() -> (heads, tokens, tokens)."""
        bias = self.table[self.index].permute(2, 0, 1)
        prefix = 0 if self.spec.prefix_rows else self.spec.prefix
        return F.pad(bias, (prefix, 0, prefix, 0)) if prefix else bias


def offsets(spec: RelativeBiasSpec, device: torch.device | None = None) -> Tensor:
    """(tokens, tokens) rows of the table for query i and key j; tokens are the patches, after one
    class token if the table has rows for it.
    """
    down, across = spec.grid
    rows, columns = torch.arange(down, device=device), torch.arange(across, device=device)
    row = (rows[:, None] - rows[None, :]) + down - 1
    column = (columns[:, None] - columns[None, :]) + across - 1
    # (down, across, down, across): query row, query column, key row, key column.
    index = row[:, None, :, None] * (2 * across - 1) + column[None, :, None, :]
    index = index.reshape(down * across, down * across)
    if spec.prefix_rows:
        index = F.pad(index, (1, 0, 1, 0))
        index[0, :] = spec.rows - 3
        index[:, 0] = spec.rows - 2
        index[0, 0] = spec.rows - 1
    return index


def bias_table(table: Tensor, old: RelativeBiasSpec, new: RelativeBiasSpec) -> Tensor:
    """(offsets, heads) of the old grid -> the same of the new one: resampled or cropped, as
    `new.resize` says; a class token's rows stay.
    """
    pairs = [(had, has) for had, has in zip(old.grid, new.grid, strict=True)]
    count = math.prod(2 * had - 1 for had, _ in pairs)
    offsets = torch.unflatten(table[:count], 0, (2 * old.grid[0] - 1, 2 * old.grid[1] - 1))
    if new.resize == "crop":
        (first, down), (left, across) = ((had - has, 2 * has - 1) for had, has in pairs)
        offsets = offsets[first : first + down, left : left + across]
    elif old.grid != new.grid:
        down_weights, across_weights = (_weights(had, has).to(table) for had, has in pairs)
        offsets = torch.einsum("do,ap,oph->dah", down_weights, across_weights, offsets)
    return torch.cat([offsets.flatten(0, 1), table[count:]])


def _weights(had: int, has: int) -> Tensor:
    """(2 has - 1, 2 had - 1) shares of the known offsets in the wanted ones: linear between them,
    and the last value beyond the ends.

    The known ones are spread so that near ones keep their places and far ones reach the new edge
    (Bao et al. 2021, as in their code and in timm).
    """
    near, far = 1.01, 1.5
    ratio = near
    while far - near > 1e-6:
        ratio = (near + far) / 2.0
        if (1.0 - ratio ** (had - 1)) / (1.0 - ratio) > has - 1:
            far = ratio
        else:
            near = ratio
    known = torch.tensor([ratio**power for power in range(had - 1)], dtype=torch.float64).cumsum(0)
    known = torch.cat([-known.flip(0), known.new_zeros(1), known])
    wanted = torch.arange(1 - has, has, dtype=torch.float64)
    right = torch.bucketize(wanted, known).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    share = ((wanted - known[left]) / (known[right] - known[left]).clamp(min=1e-9)).clamp(0.0, 1.0)
    eye = torch.eye(len(known), dtype=torch.float64)
    return eye[left] * (1.0 - share[:, None]) + eye[right] * share[:, None]
