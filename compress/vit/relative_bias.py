"""Relative position bias: what is added to q·k for the offset between two tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import RelativeBiasSpec


class RelativeBias(nn.Module):
    """A table of biases, one row an offset, one column a head: () -> (heads, tokens, tokens). Swin (Liu et al. 2021), BEiT (Bao et al. 2021)."""

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
    """(tokens, tokens) rows of the table for query i and key j; tokens are the patches, after one class token if the table has rows for it."""
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
