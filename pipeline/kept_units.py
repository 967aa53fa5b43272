"""What remains of each sub-layer after the cut: the contents of kept.json."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.masks.groups import architecture_of
from ..compress.masks.mask import StructuredMask
from ..compress.network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..compress.network.modules.model import CompactModel
from ..compress.network.select_specs import static_steps
from ..compress.surgery.image_size import exit_depths
from ..compress.surgery.plan import plan
from ..compress.tokens.select import chosen_tokens


def kept_branches(
    dense: nn.Module | Architecture, compact: nn.Module | Architecture | StructuredMask
) -> list[dict[str, Any]]:
    """The entries of kept.json, for a compact model or for a mask of the dense one.

    Args:
        dense: The network before the cut.
        compact: The network after the cut, or the mask that cuts it.

    Returns:
        One entry per sub-layer of `dense`: {"branch", "kind", "dims": {dimension: [kept, total]}}.
        `kind` is attention, ffn, constant (only the bias remains) or removed; `embed` is the part
        of the residual stream that the sub-layer reads. `token` occurs where patches leave the
        stream: the tokens after the sub-layer, without those that only the head skips.
    """
    before = architecture_of(dense)
    if isinstance(compact, StructuredMask):
        after = plan(before, compact).architecture
    else:
        after = architecture_of(compact)
    branches = {branch.name: branch for branch in after.branches}
    entries = [
        _entry(branch, branches.get(branch.name), before, after) for branch in before.branches
    ]
    if after.drops_tokens or after.selects:
        totals, kept = _tokens(before), _tokens(after)
        count = after.tokens
        for entry in entries:
            count = kept.get(entry["branch"], count)
            if entry["kind"] not in ("removed", "constant"):
                entry["dims"]["token"] = [count, totals[entry["branch"]]]
    return entries


def _tokens(architecture: Architecture) -> dict[str, int]:
    counts = architecture.step_tokens(last_queries=False)
    return {
        branch.name: count
        for step, count in zip(architecture.steps, counts, strict=True)
        for branch in step
    }


def token_map(compact: Architecture) -> dict[str, Any] | None:
    """The entry `tokens` of report.json: where each patch leaves; None if none does."""
    if not compact.drops_tokens:
        return None
    counts = [compact.tokens, *compact.step_tokens(last_queries=False)]
    return {
        "grid": list(compact.grid),
        "sites": ["stem", *(step[0].name for step in compact.steps)],
        "counts": counts,
        "exits": [int(depth) for depth in exit_depths(compact).flatten().tolist()],
    }


def selection_map(compact: CompactModel, images: Tensor, shown: int) -> dict[str, Any]:
    """The entry `tokens` of report.json for a network that chooses patches for each image.

    Args:
        compact: The network.
        images: (images, channels, height, width), normalized.
        shown: How many of them have exits of their own, the first ones.

    Returns:
        As `token_map`, with the mean exits over the images; `chosen` has those of each shown image.
    """
    architecture = compact.architecture
    counts = [architecture.tokens, *architecture.step_tokens(last_queries=False)]
    area = math.prod(architecture.grid)
    # Patches also leave by place, before the first selection.
    depths = _exits_by_place(architecture).repeat(len(images), 1)
    found = chosen_tokens(compact, images)
    for select, kept in reversed(list(zip(architecture.selects, found, strict=True))):
        # A fused token, -1, is no patch of the grid.
        stays = torch.zeros(len(images), area + 1, dtype=torch.bool)
        stays.scatter_(1, kept % (area + 1), True)
        leaves = ~stays[:, :area] & (depths > 1 + select.at)
        depths[leaves] = 1 + select.at
    return {
        "grid": list(architecture.grid),
        "sites": ["stem", *(step[0].name for step in architecture.steps)],
        "counts": counts,
        "exits": depths.float().mean(dim=0).round().long().tolist(),
        "chosen": depths[:shown].tolist(),
        "averaged": len(images),
    }


def _exits_by_place(architecture: Architecture) -> Tensor:
    """Exits of the patches without the selections, (places of the grid,)."""
    # Behind the first selection the patches of a count are others for each image.
    steps = static_steps(architecture)
    depths = exit_depths(architecture, steps).flatten().long()
    depths[depths == 1 + steps] = 1 + len(architecture.steps)
    return depths


def _entry(
    before: BranchSpec, after: BranchSpec | None, dense: Architecture, compact: Architecture
) -> dict[str, Any]:
    read = 0 if after is None else compact.read_width(after.reads)
    dims = {"embed": [read, dense.read_width(before.reads)]}
    for name, total in _widths(before).items():
        dims[name] = [0 if after is None else _widths(after).get(name, 0), total]
    kind = "removed" if after is None else after.core.kind
    return {"branch": before.name, "kind": kind, "dims": dims}


def _widths(branch: BranchSpec) -> dict[str, int]:
    core = branch.core
    if isinstance(core, AttentionSpec):
        return {"head": core.heads, "qk": core.qk, "v": core.v}
    return {"ffn": core.hidden} if isinstance(core, FfnSpec) else {}
