"""The units of a source network that remain after several cuts, as one mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, AttentionSpec, FfnSpec

Keep = dict[str, dict[str, Tensor]]


class KeptIndices:
    """The indices of a source network that remain after cuts, each relative to the one before."""

    def __init__(self, architecture: Architecture) -> None:
        self._source = architecture
        self._embed = torch.arange(architecture.embed)
        self._ffn: dict[str, Tensor] = {}
        self._heads: dict[str, Tensor] = {}
        # (kept heads, columns)
        self._columns: dict[tuple[str, str], Tensor] = {}
        for branch in architecture.branches:
            core = branch.core
            if isinstance(core, FfnSpec):
                self._ffn[branch.name] = torch.arange(core.hidden)
            elif isinstance(core, AttentionSpec):
                self._heads[branch.name] = torch.arange(core.heads)
                for dimension, width in (("qk", core.qk), ("v", core.v)):
                    self._columns[dimension, branch.name] = torch.arange(width).expand(
                        core.heads, width
                    )
        for select in architecture.selects:
            for site, width in select.hidden_sites.items():
                self._ffn[site] = torch.arange(width)

    def narrow(self, keep: Keep) -> None:
        """Apply one more cut, whose entries refer to the network after the previous cut."""
        for entry in keep.get("embed", {}).values():
            self._embed = self._embed[entry]
        for site, entry in keep.get("ffn", {}).items():
            self._ffn[site] = self._ffn[site][entry]
        for dimension in ("qk", "v"):
            for site, entry in keep.get(dimension, {}).items():
                found = self._columns[dimension, site]
                self._columns[dimension, site] = found[entry].view(len(found), -1)
        for site, entry in keep.get("head", {}).items():
            self._heads[site] = self._heads[site][entry]
            for dimension in ("qk", "v"):
                self._columns[dimension, site] = self._columns[dimension, site][entry]

    def mask(self) -> StructuredMask:
        """All cuts as one mask of the source."""
        entries = [("embed", SHARED, _booleans(self._embed, self._source.embed))]
        for branch in self._source.branches:
            core, site = branch.core, branch.name
            if isinstance(core, FfnSpec):
                entries.append(("ffn", site, _booleans(self._ffn[site], core.hidden)))
            elif isinstance(core, AttentionSpec):
                heads = self._heads[site]
                entries.append(("head", site, _booleans(heads, core.heads)))
                for dimension, width in (("qk", core.qk), ("v", core.v)):
                    columns = [_booleans(row, width) for row in self._columns[dimension, site]]
                    if columns:
                        rows = _rows_of_all_heads(core, heads, torch.stack(columns))
                        entries.append((dimension, site, rows))
        for select in self._source.selects:
            for site, width in select.hidden_sites.items():
                entries.append(("ffn", site, _booleans(self._ffn[site], width)))
        kept: Keep = {}
        for dimension, site, keep in entries:
            if not bool(keep.all()):
                kept.setdefault(dimension, {})[site] = keep
        return StructuredMask(kept, scale="original", note={"dead": "found in the weights"})


def _rows_of_all_heads(core: AttentionSpec, heads: Tensor, rows: Tensor) -> Tensor:
    """(kept heads, width) -> (heads, width).

    A removed head gets the columns of a head with the same keys, or else of the first kept one.
    """
    group = list(core.kv_of) if core.kv_of is not None else list(range(core.heads))
    place = {int(head): row for row, head in enumerate(heads)}
    of_group = {group[head]: row for head, row in reversed(place.items())}
    return torch.stack(
        [rows[place.get(head, of_group.get(group[head], 0))] for head in range(core.heads)]
    )


def _booleans(indices: Tensor, size: int) -> Tensor:
    keep = torch.zeros(size, dtype=torch.bool)
    keep[indices] = True
    return keep
