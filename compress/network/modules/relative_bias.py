"""Relative position bias: added to the attention scores by the offset between two tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import RelativeBiasSpec


class RelativeBias(nn.Module):
    """A table with one row per offset and one column per head, read for pairs of tokens.

    Liu et al. 2021, "Swin Transformer", eq. 4; Bao et al. 2021, "BEiT".
    """

    index: Tensor

    def __init__(self, spec: RelativeBiasSpec, heads: int) -> None:
        super().__init__()
        self.spec = spec
        self.table = nn.Parameter(torch.zeros(spec.rows, heads))
        # Computed from the grid, hence not saved.
        self.register_buffer("index", offsets(spec), persistent=False)

    def materialize(self) -> None:
        """Compute the index on the CPU after the module was built on the meta device."""
        self.index = offsets(self.spec, torch.device("cpu"))

    def forward(self, queries: int, keys: int, positions: Tensor | None = None) -> Tensor:
        """The bias of some leading tokens.

        Args:
            queries: Number of tokens that are queries.
            keys: Number of tokens that are keys.
            positions: Which tokens of the stem they are, (batch, keys). None: the first ones.

        Returns:
            (heads, queries, keys), or (batch, heads, queries, keys) with positions.
        """
        # Pairs with a learned token read a zero behind the table.
        table = F.pad(self.table, (0, 0, 0, 1)) if _reads_zero(self.spec) else self.table
        if positions is None:
            return table[self.index[:queries, :keys]].permute(2, 0, 1)
        # Flat, since an index for each image exports to slower operators.
        rows = positions[:, :queries, None] * len(self.index) + positions[:, None]
        index = self.index.flatten().index_select(0, rows.flatten())
        bias = torch.unflatten(table.index_select(0, index), 0, (-1, queries, keys))
        return bias.permute(0, 3, 1, 2)


def offsets(spec: RelativeBiasSpec, device: torch.device | None = None) -> Tensor:
    """Return the row of the table for query i and key j, (tokens, tokens).

    Tokens are those of the stream. Pairs with a learned token for which the table has no rows get
    the number of rows, the place of a zero behind the table.
    """
    down, across = spec.grid
    rows, columns = torch.arange(down, device=device), torch.arange(across, device=device)
    row = (rows[:, None] - rows[None, :]) + down - 1
    column = (columns[:, None] - columns[None, :]) + across - 1
    # (down, across, down, across): query row, query column, key row, key column.
    index = row[:, None, :, None] * (2 * across - 1) + column[None, :, None, :]
    index = index.reshape(down * across, down * across)
    if spec.order is not None:
        places = torch.tensor(spec.order, device=device)
        index = index[places[:, None], places[None, :]]
    if not spec.learned:
        return index
    learned = (*range(spec.prefix), *(spec.inner or ()))
    count = len(index) + len(learned)
    behind = [place for place in range(count) if place not in learned]
    own, patches = (torch.tensor(places, device=device) for places in (learned, behind))
    whole = index.new_full((count, count), spec.rows)
    whole[patches[:, None], patches[None, :]] = index
    if spec.prefix_rows:
        whole[own, :] = spec.rows - 3
        whole[:, own] = spec.rows - 2
        whole[own, own] = spec.rows - 1
    return whole


def _reads_zero(spec: RelativeBiasSpec) -> bool:
    """Whether pairs with a learned token have no rows in the table; their bias is zero."""
    return spec.learned > 0 and not spec.prefix_rows


def bias_table(table: Tensor, old: RelativeBiasSpec, new: RelativeBiasSpec) -> Tensor:
    """Convert a table (offsets, heads) of the `old` grid into one of the `new` grid.

    `new.resize` selects resampling or cropping; the rows of a class token stay unchanged.
    """
    sides = list(zip(old.grid, new.grid, strict=True))
    count = math.prod(2 * before - 1 for before, _ in sides)
    offsets = torch.unflatten(table[:count], 0, (2 * old.grid[0] - 1, 2 * old.grid[1] - 1))
    if new.resize == "crop":
        (top, down), (left, across) = ((before - after, 2 * after - 1) for before, after in sides)
        offsets = offsets[top : top + down, left : left + across]
    elif old.grid != new.grid:
        down_weights, across_weights = (_weights(*side).to(table) for side in sides)
        offsets = torch.einsum("do,ap,oph->dah", down_weights, across_weights, offsets)
    return torch.cat([offsets.flatten(0, 1), table[count:]])


def _weights(before: int, after: int) -> Tensor:
    """Return interpolation weights, (2 after - 1, 2 before - 1): a row per offset of the new grid.

    Linear between the known offsets, constant beyond them. The known offsets are spaced as a
    geometric series so that near ones keep their coordinates and far ones reach the new edge (Bao
    et al. 2021, "BEiT", as in their code and in timm).
    """
    near, far = 1.01, 1.5
    ratio = near
    while far - near > 1e-6:
        ratio = (near + far) / 2.0
        if (1.0 - ratio ** (before - 1)) / (1.0 - ratio) > after - 1:
            far = ratio
        else:
            near = ratio
    known = torch.tensor([ratio**power for power in range(before - 1)], dtype=torch.float64).cumsum(
        0
    )
    known = torch.cat([-known.flip(0), known.new_zeros(1), known])
    wanted = torch.arange(1 - after, after, dtype=torch.float64)
    right = torch.bucketize(wanted, known).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    share = ((wanted - known[left]) / (known[right] - known[left]).clamp(min=1e-9)).clamp(0.0, 1.0)
    eye = torch.eye(len(known), dtype=torch.float64)
    return eye[left] * (1.0 - share[:, None]) + eye[right] * share[:, None]
