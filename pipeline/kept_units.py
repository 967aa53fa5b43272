"""What is left of each sub-layer after the cut, for kept.json: what a person looks at to see where
the model was trimmed.
"""

from __future__ import annotations

from typing import Any

from ..compress.network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec


def kept_branches(dense: Architecture, compact: Architecture) -> list[dict[str, Any]]:
    """One entry for each sub-layer of the dense network: {"branch", "kind", "dims": {dimension:
    [kept, total]}}.

    `kind` is attention, ffn, constant (only its bias is left) or removed; `embed` is the part of
    the residual stream that it reads.
    """
    left = {branch.name: branch for branch in compact.branches}
    return [_entry(branch, left.get(branch.name), dense, compact) for branch in dense.branches]


def _entry(
    before: BranchSpec, after: BranchSpec | None, dense: Architecture, compact: Architecture
) -> dict[str, Any]:
    dims = {
        "embed": [
            0 if after is None else compact.read_width(after.reads),
            dense.read_width(before.reads),
        ]
    }
    for name, total in _widths(before).items():
        dims[name] = [0 if after is None else _widths(after).get(name, 0), total]
    kind = "removed" if after is None else after.core.kind
    return {"branch": before.name, "kind": kind, "dims": dims}


def _widths(branch: BranchSpec) -> dict[str, int]:
    core = branch.core
    if isinstance(core, AttentionSpec):
        return {"head": core.heads, "qk": core.qk, "v": core.v}
    return {"ffn": core.hidden} if isinstance(core, FfnSpec) else {}
