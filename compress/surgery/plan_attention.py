"""The plan of a cut attention: its new spec, and the indices to keep on each of its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks.mask import StructuredMask
from ..network.architecture import AttentionSpec, NormSpec

Index = Tensor | None


@dataclass(frozen=True)
class AttentionCut:
    """The plan for one attention.

    Attributes:
        spec: Its new specification.
        indices: The indices to keep by dimension of an axis, such as `qk` or `head*v`.
        leaves: The indices on each axis, by leaf name, of tensors that may differ between heads.
    """

    spec: AttentionSpec
    indices: Mapping[str, Tensor]
    leaves: Mapping[str, tuple[Index, ...]]


def cut_attention(core: AttentionSpec, name: str, mask: StructuredMask) -> AttentionCut | None:
    """Plan the cut of the attention at site `name`; None if no head or no value column stays."""
    heads = torch.nonzero(_keep_heads(mask, core, name)).flatten()
    qk, v = _keep_columns(mask, core, name, "qk"), _keep_columns(mask, core, name, "v")
    if not len(heads) or not bool(v.any()):
        return None
    kv_of = torch.arange(core.heads) if core.kv_of is None else torch.tensor(core.kv_of)
    # Key/value heads without queries are removed. The heads of a group have equal columns, so the
    # first one represents it.
    groups = torch.unique(kv_of[heads])
    members = torch.stack([heads[kv_of[heads] == group][0] for group in groups])
    new_kv = torch.searchsorted(groups, kv_of[heads])
    qk_each, v_each = _columns(qk[heads]), _columns(v[heads])
    spec = _cut_spec(core, mask, qk_each, v_each)
    if core.kv_of is not None:
        shared = len(groups) < len(heads)
        spec = spec.model_copy(update={"kv_of": tuple(new_kv.tolist()) if shared else None})
    indices = {
        "head": heads,
        "qk": qk_each[0],
        "v": v_each[0],
        "head*qk": torch.nonzero(qk.flatten()).flatten(),
        "head*2*qk": torch.nonzero(qk.repeat_interleave(2, dim=0).flatten()).flatten(),
        "head*v": torch.nonzero(v.flatten()).flatten(),
        "kv*qk": _flat(groups, qk[members], core.qk),
        "kv*v": _flat(groups, v[members], core.v),
    }
    leaves = _norm_leaves(core, spec, heads, v_each, kind="head_norm")
    leaves |= _norm_leaves(core, spec, heads, qk_each, kind="q_norm")
    leaves |= _norm_leaves(core, spec, groups, _columns(qk[members]), kind="k_norm")
    if core.rope is not None and spec.rope is not None:
        found = _pairs(core, qk_each)
        index = found if spec.rope.per_head else found[0]
        own = heads if core.rope.per_head else None
        leaves |= {"rope.table": (own, None, None, index), "rope.frequencies": (own, None, index)}
    return AttentionCut(spec, indices, leaves)


def resize(norm: NormSpec | None, width: int) -> NormSpec | None:
    """The same norm over `width` units."""
    return None if norm is None else norm.model_copy(update={"width": width})


def _cut_spec(
    core: AttentionSpec, mask: StructuredMask, qk_each: Tensor, v_each: Tensor
) -> AttentionSpec:
    """The spec of the columns (heads, kept) that stay, before key/value heads are regrouped."""
    heads, qk, v = len(qk_each), qk_each.shape[1], v_each.shape[1]
    qk_differ, v_differ = bool((qk_each != qk_each[0]).any()), bool((v_each != v_each[0]).any())
    qk_norm = core.q_norm is not None or core.k_norm is not None
    head_norm = core.head_norm is not None
    rope = core.rope
    if rope is not None:
        rope = rope.model_copy(update={"per_head": rope.per_head or qk_differ})
    # A mask that was learned with the scale 1/sqrt(kept) keeps it.
    scale = core.scale * math.sqrt(core.qk / qk) if mask.scale == "kept" else core.scale
    return core.model_copy(
        update={
            "heads": heads,
            "qk": qk,
            "v": v,
            "scale": scale,
            "q_norm": resize(core.q_norm, qk),
            "k_norm": resize(core.k_norm, qk),
            "qk_norm_per_head": core.qk_norm_per_head or (qk_differ and qk_norm),
            "rope": rope,
            "head_norm": resize(core.head_norm, v),
            "head_norm_per_head": core.head_norm_per_head or (v_differ and head_norm),
            "out_norm": resize(core.out_norm, heads * v),
        }
    )


def _keep_columns(mask: StructuredMask, core: AttentionSpec, name: str, dimension: str) -> Tensor:
    """(heads, width) booleans of the kept columns, all False for removed heads."""
    width = core.qk if dimension == "qk" else core.v
    columns = mask.get(dimension, name)
    columns = torch.ones(width, dtype=torch.bool) if columns is None else columns
    return columns.expand(core.heads, width) & _keep_heads(mask, core, name)[:, None]


def _keep_heads(mask: StructuredMask, core: AttentionSpec, name: str) -> Tensor:
    """(heads,) booleans."""
    heads = mask.get("head", name)
    return torch.ones(core.heads, dtype=torch.bool) if heads is None else heads


def _columns(keep: Tensor) -> Tensor:
    """(rows, width) booleans, equally many True in each row -> (rows, kept) indices."""
    return torch.stack([torch.nonzero(row).flatten() for row in keep])


def _flat(groups: Tensor, keep: Tensor, width: int) -> Tensor:
    """Flattened (group, column) indices of the columns kept in each of `groups`."""
    return (groups[:, None] * width + _columns(keep)).flatten()


def _parts(rows: Tensor, parts: int) -> Tensor:
    return (rows[:, None] * parts + torch.arange(parts)).flatten()


def _norm_leaves(
    core: AttentionSpec, spec: AttentionSpec, rows: Tensor, each: Tensor, *, kind: str
) -> dict[str, tuple[Index, ...]]:
    """The indices on the weight and bias of a norm inside the attention.

    `rows`: the heads that stay; `each` (rows, kept): their columns. All heads share the weight, or
    each head has a row of it, before (`core`) and after the cut (`spec`).
    """
    if kind == "head_norm":
        old, new = core.head_norm_per_head, spec.head_norm_per_head
    else:
        old, new = core.qk_norm_per_head, spec.qk_norm_per_head
        # Differential attention has two queries and keys per head.
        rows, each = _parts(rows, core.parts), each.repeat_interleave(core.parts, dim=0)
    index: tuple[Index, ...] = (each[0],)
    if new:
        index = (rows, each) if old else (each,)
    return {f"{kind}.weight": index, f"{kind}.bias": index}


def _pairs(core: AttentionSpec, each: Tensor) -> Tensor:
    """(heads, kept columns) -> (heads, kept rope pairs); StructuredMask.check keeps pairs whole."""
    assert core.rope is not None
    half = each.shape[1] // 2
    return each[:, :half] if core.rope.layout == "half" else each[:, ::2] // 2
