"""What remains of each sub-layer after the cut: the contents of kept.json."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..compress.masks.groups import architecture_of
from ..compress.masks.mask import StructuredMask
from ..compress.network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..compress.surgery.image_size import exit_depths
from ..compress.surgery.plan import plan


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
    if after.drops_tokens:
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
