"""What a mask leaves of one attention: its new spec, and the indices kept on each of its axes."""

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
    """The new spec; indices by axis dimension; and for tensors that may differ from head to head,
    their indices by leaf name.
    """

    spec: AttentionSpec
    indices: Mapping[str, Tensor]
    leaves: Mapping[str, tuple[Index, ...]]


def cut_attention(core: AttentionSpec, name: str, mask: StructuredMask) -> AttentionCut | None:
    """Decide the cut of the attention at site `name`; None when no head or no value column is
    left.
    """
    alive = keep_heads(mask, core, name)
    heads = torch.nonzero(alive).flatten()
    qk, v = keep_columns(mask, core, name, "qk"), keep_columns(mask, core, name, "v")
    if not len(heads) or not bool(v.any()):
        return None
    kv_of = torch.arange(core.heads) if core.kv_of is None else torch.tensor(core.kv_of)
    # Key/value heads that nobody asks any more go; one head of each group stands for its columns,
    # which are the same in all of the group.
    groups = torch.unique(kv_of[heads])
    members = torch.stack([heads[kv_of[heads] == group][0] for group in groups])
    new_kv = torch.searchsorted(groups, kv_of[heads])
    qk_each, v_each = _columns(qk[heads]), _columns(v[heads])
    qk_width, v_width = qk_each.shape[1], v_each.shape[1]
    qk_differ, v_differ = bool((qk_each != qk_each[0]).any()), bool((v_each != v_each[0]).any())
    norms = core.q_norm is not None or core.k_norm is not None
    norm_per_head = core.qk_norm_per_head or (qk_differ and norms)
    head_norm_per_head = core.head_norm_per_head or (v_differ and core.head_norm is not None)
    rope = core.rope
    if rope is not None:
        rope = rope.model_copy(update={"per_head": rope.per_head or qk_differ})
    spec = core.model_copy(
        update={
            "heads": len(heads),
            "qk": qk_width,
            "v": v_width,
            "scale": kept_scale(core, qk_width, mask),
            "kv_of": None
            if core.kv_of is None or len(groups) == len(heads)
            else tuple(new_kv.tolist()),
            "q_norm": resize(core.q_norm, qk_width),
            "k_norm": resize(core.k_norm, qk_width),
            "qk_norm_per_head": norm_per_head,
            "rope": rope,
            "head_norm": resize(core.head_norm, v_width),
            "head_norm_per_head": head_norm_per_head,
            "out_norm": resize(core.out_norm, len(heads) * v_width),
        }
    )
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
    rows = {"head": _parts(heads, core.parts), "kv": _parts(groups, core.parts)}
    kv_each = _columns(qk[members])
    leaves: dict[str, tuple[Index, ...]] = {}
    for kind in ("weight", "bias"):
        leaves[f"q_norm.{kind}"] = _each(
            rows["head"], _repeat(qk_each, core.parts), old=core.qk_norm_per_head, new=norm_per_head
        )
        leaves[f"k_norm.{kind}"] = _each(
            rows["kv"], _repeat(kv_each, core.parts), old=core.qk_norm_per_head, new=norm_per_head
        )
        leaves[f"head_norm.{kind}"] = _each(
            heads, v_each, old=core.head_norm_per_head, new=head_norm_per_head
        )
    if core.rope is not None and rope is not None:
        found = _pairs(core, qk_each)
        index = found if rope.per_head else found[0]
        own = heads if core.rope.per_head else None
        leaves |= {"rope.table": (own, None, None, index), "rope.frequencies": (own, None, index)}
    return AttentionCut(spec, indices, leaves)


def keep_columns(mask: StructuredMask, core: AttentionSpec, name: str, dimension: str) -> Tensor:
    """(heads, width) booleans: the columns of each head that are kept, False throughout for heads
    that go.
    """
    width = core.qk if dimension == "qk" else core.v
    columns = mask.get(dimension, name)
    columns = torch.ones(width, dtype=torch.bool) if columns is None else columns
    heads = keep_heads(mask, core, name)
    return columns.expand(core.heads, width) & heads[:, None]


def keep_heads(mask: StructuredMask, core: AttentionSpec, name: str) -> Tensor:
    """(heads,) booleans."""
    heads = mask.get("head", name)
    return torch.ones(core.heads, dtype=torch.bool) if heads is None else heads


def kept_scale(core: AttentionSpec, kept: int, mask: StructuredMask) -> float:
    """The softmax scale after the cut: times sqrt(qk / kept) where the mask was learned with
    1/sqrt(kept).
    """
    return core.scale * math.sqrt(core.qk / kept) if mask.scale == "kept" else core.scale


def resize(norm: NormSpec | None, width: int) -> NormSpec | None:
    """The same norm over `width` units."""
    return None if norm is None else norm.model_copy(update={"width": width})


def _columns(keep: Tensor) -> Tensor:
    """(rows, width) booleans, equally many True in each row -> (rows, kept) indices."""
    return torch.stack([torch.nonzero(row).flatten() for row in keep])


def _flat(groups: Tensor, keep: Tensor, width: int) -> Tensor:
    """Flattened (group, column) indices of the columns kept in each of `groups`."""
    return (groups[:, None] * width + _columns(keep)).flatten()


def _parts(rows: Tensor, parts: int) -> Tensor:
    return (rows[:, None] * parts + torch.arange(parts)).flatten()


def _repeat(each: Tensor, parts: int) -> Tensor:
    return each.repeat_interleave(parts, dim=0)


def _each(rows: Tensor, each: Tensor, *, old: bool, new: bool) -> tuple[Index, ...]:
    """Indices of a weight that all heads share (`old` and `new` False), or that has a row a
    head.
    """
    if not new:
        return (each[0],)
    return (rows, each) if old else (each,)


def _pairs(core: AttentionSpec, each: Tensor) -> Tensor:
    """(heads, kept columns) -> (heads, kept pairs): which rope pairs the columns are; whole ones,
    as StructuredMask.check saw to.
    """
    assert core.rope is not None
    half = each.shape[1] // 2
    return each[:, :half] if core.rope.layout == "half" else each[:, ::2] // 2
