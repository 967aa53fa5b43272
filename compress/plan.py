"""What a mask does to a network, before anything is cut: the new architecture, and for every parameter the indices to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec, Core, FfnSpec, Indices, NormSpec
from .axes import HEAD_IN, STEM_OUT, Axis, branch_axes, site_in, site_out
from .mask import StructuredMask


@dataclass(frozen=True)
class BranchPlan:
    """One surviving sub-layer: where it stood, what it becomes, and the indices kept on each axis of each parameter (None = all)."""

    step: int
    position: int
    spec: BranchSpec
    slices: Mapping[str, tuple[Tensor | None, ...]]
    # True: only the bias survives; its value has to be computed from the old parameters.
    constant: bool = False


@dataclass(frozen=True)
class Plan:
    """The whole surgery."""

    source: Architecture
    architecture: Architecture
    outer: Mapping[str, tuple[Tensor | None, ...]]
    branches: tuple[tuple[BranchPlan, ...], ...]
    removed: tuple[str, ...] = field(default=())


def plan(architecture: Architecture, mask: StructuredMask) -> Plan:
    """Decide every cut. Errors: InputError when the mask does not fit the network."""
    mask.check(architecture)
    alive = [[branch for branch in step if _alive(branch, mask)] for step in architecture.steps]
    embed = _Embed(architecture, mask, [branch for step in alive for branch in step])
    removed = [branch.name for branch in architecture.branches if not _alive(branch, mask)]
    plans: list[tuple[BranchPlan, ...]] = []
    for number, step in enumerate(architecture.steps):
        row: list[BranchPlan] = []
        for position, branch in enumerate(step):
            if branch not in alive[number]:
                continue
            built = _plan_branch(number, position, branch, mask, embed)
            if built is None:
                removed.append(branch.name)
            else:
                row.append(built)
        if row:
            plans.append(tuple(row))
    outer = {
        "stem.weight": (embed.stem_rows, None, None, None),
        "stem.bias": (embed.stem_rows,),
        "prefix": (None, embed.stem_rows),
        "position": (None, embed.stem_rows),
        "stem_norm.weight": (embed.stem_rows,),
        "stem_norm.bias": (embed.stem_rows,),
        "norm.weight": (embed.head_columns,),
        "norm.bias": (embed.head_columns,),
        "pool_norm.weight": (embed.head_columns,),
        "pool_norm.bias": (embed.head_columns,),
        "head.weight": (None, embed.head_columns),
        "head_dist.weight": (None, embed.head_columns),
    }
    reading = len(embed.head_columns)
    new = architecture.model_copy(
        update={
            "embed": embed.width,
            "stem_writes": embed.stem_writes,
            "stem_norm": _resize(architecture.stem_norm, len(embed.stem_rows)),
            "steps": tuple(tuple(item.spec for item in row) for row in plans),
            "norm": _resize(architecture.norm, reading),
            "pool_norm": _resize(architecture.pool_norm, reading),
            "head_reads": embed.head_reads,
        }
    )
    # model_copy skips validation; a plan that does not hold together must stop here, not at the first forward pass.
    new = Architecture.model_validate(new.model_dump(by_alias=True))
    return Plan(architecture, new, outer, tuple(plans), tuple(removed))


def keep_columns(mask: StructuredMask, core: AttentionSpec, name: str, dimension: str) -> Tensor:
    """(heads, width) booleans: the columns of each head that are kept, False throughout for heads that go."""
    width = core.qk if dimension == "qk" else core.v
    columns = mask.get(dimension, name)
    columns = torch.ones(width, dtype=torch.bool) if columns is None else columns
    heads = keep_heads(mask, core, name)
    return columns.expand(core.heads, width) & heads[:, None]


def keep_heads(mask: StructuredMask, core: AttentionSpec, name: str) -> Tensor:
    """(heads,) booleans."""
    heads = mask.get("head", name)
    return torch.ones(core.heads, dtype=torch.bool) if heads is None else heads


class _Embed:
    """The residual stream after the cut: which channels live, and how each reader and writer sees them.

    A channel lives if somebody reads it. A reader's statistics run over all channels that its mask keeps, so those live even if nobody writes
    them; what is written and never read is dropped by its writer.
    """

    def __init__(self, architecture: Architecture, mask: StructuredMask, branches: list[BranchSpec]) -> None:
        self._size = architecture.embed
        self._mask = mask
        self._live = torch.zeros(self._size, dtype=torch.bool)
        self._live |= self._seen(architecture.head_reads, HEAD_IN)
        for branch in branches:
            if not isinstance(branch.core, ConstantSpec):
                self._live |= self._seen(branch.reads, site_in(branch))
            if branch.post_norm is not None:
                self._live |= self._seen(branch.writes, site_out(branch))
        stem = self._seen(architecture.stem_writes, STEM_OUT)
        if architecture.stem_norm is not None:
            self._live |= stem
        self._place = torch.cumsum(self._live, 0) - 1
        self.width = int(self._live.sum())
        self.stem_rows, self.stem_writes = self.locate(architecture.stem_writes, STEM_OUT, writing=True)
        self.head_columns, self.head_reads = self.locate(architecture.head_reads, HEAD_IN)

    def locate(self, old: Indices | None, site: str, *, writing: bool = False) -> tuple[Tensor, Indices | None]:
        """Positions kept on the tensor's own axis, and the new index list into the stream (None when it is the whole stream)."""
        seen = self._seen(old, site)
        if writing:
            seen = seen & self._live
        channels = torch.arange(self._size) if old is None else torch.tensor(old)
        rows = torch.nonzero(seen[channels]).flatten()
        new = self._place[channels[rows]].tolist()
        return rows, None if len(new) == self.width else tuple(new)

    def _seen(self, old: Indices | None, site: str) -> Tensor:
        keep = self._mask.get("embed", site)
        keep = torch.ones(self._size, dtype=torch.bool) if keep is None else keep
        if old is None:
            return keep
        within = torch.zeros(self._size, dtype=torch.bool)
        within[list(old)] = True
        return keep & within


def _alive(branch: BranchSpec, mask: StructuredMask) -> bool:
    block = mask.get("block", branch.name)
    return block is None or bool(block.all())


def _plan_branch(step: int, position: int, branch: BranchSpec, mask: StructuredMask, embed: _Embed) -> BranchPlan | None:
    columns, reads = embed.locate(branch.reads, site_in(branch))
    rows, writes = embed.locate(branch.writes, site_out(branch), writing=True)
    if not len(rows):
        return None
    core, kept = _plan_core(branch, mask)
    if not len(columns) and not isinstance(core, ConstantSpec):
        raise AssertionError(f"{branch.name} reads nothing, which StructuredMask.check refuses")
    constant = isinstance(core, ConstantSpec) and not isinstance(branch.core, ConstantSpec)
    if constant and not _has_constant(branch):
        return None
    indices = {("embed", site_in(branch)): columns, ("embed", site_out(branch)): rows, **kept}
    spec = branch.model_copy(
        update={
            "core": core,
            "norm": None if isinstance(core, ConstantSpec) else _resize(branch.norm, len(columns)),
            "post_norm": None if isinstance(core, ConstantSpec) else _resize(branch.post_norm, len(rows)),
            "layer_scale": branch.layer_scale and not isinstance(core, ConstantSpec),
            "reads": None if isinstance(core, ConstantSpec) else reads,
            "writes": writes,
        }
    )
    slices = {name: tuple(_index(axis, indices) for axis in axes) for name, axes in branch_axes(branch).items()}
    if isinstance(spec.core, AttentionSpec) and isinstance(branch.core, AttentionSpec) and spec.core.qk_norm_per_head and not branch.core.qk_norm_per_head:
        for name in ("q_norm", "k_norm"):
            # One weight for all heads becomes one a head: indices of shape (heads, qk) into the old (qk,).
            slices[f"core.{name}.weight"] = slices[f"core.{name}.bias"] = (kept["qk each", branch.name],)
    return BranchPlan(step, position, spec, slices, constant)


def _plan_core(branch: BranchSpec, mask: StructuredMask) -> tuple[Core, dict[tuple[str, str], Tensor]]:
    core, name = branch.core, branch.name
    if isinstance(core, AttentionSpec):
        heads = torch.nonzero(keep_heads(mask, core, name)).flatten()
        qk, v = keep_columns(mask, core, name, "qk"), keep_columns(mask, core, name, "v")
        if not len(heads) or not bool(v.any()):
            return ConstantSpec(), {}
        qk_width, v_width = int(qk[heads[0]].sum()), int(v[heads[0]].sum())
        same = bool((qk[heads] == qk[heads[0]]).all())
        split = not same and core.q_norm is not None and not core.qk_norm_per_head
        each = torch.stack([torch.nonzero(row).flatten() for row in qk[heads]])
        new = core.model_copy(
            update={
                "heads": len(heads),
                "qk": qk_width,
                "v": v_width,
                "scale": kept_scale(core, qk_width, mask),
                "q_norm": _resize(core.q_norm, qk_width),
                "k_norm": _resize(core.k_norm, qk_width),
                "qk_norm_per_head": core.qk_norm_per_head or split,
                "out_norm": _resize(core.out_norm, len(heads) * v_width),
            }
        )
        return new, {
            ("head", name): heads,
            ("qk", name): each[0],
            ("qk each", name): each,
            ("head*qk", name): torch.nonzero(qk.flatten()).flatten(),
            ("head*v", name): torch.nonzero(v.flatten()).flatten(),
        }
    if isinstance(core, FfnSpec):
        keep = mask.get("ffn", name)
        hidden = torch.arange(core.hidden) if keep is None else torch.nonzero(keep).flatten()
        if not len(hidden):
            return ConstantSpec(), {}
        return core.model_copy(update={"hidden": len(hidden), "norm": _resize(core.norm, len(hidden))}), {("ffn", name): hidden}
    return core, {}


def kept_scale(core: AttentionSpec, kept: int, mask: StructuredMask) -> float:
    """The softmax scale after the cut: times sqrt(qk / kept) where the mask was learned with 1/sqrt(kept)."""
    return core.scale * math.sqrt(core.qk / kept) if mask.scale == "kept" else core.scale


def _has_constant(branch: BranchSpec) -> bool:
    """Whether a sub-layer of which nothing is left still adds something."""
    core = branch.core
    biased = isinstance(core, AttentionSpec | FfnSpec) and core.out_bias
    return biased or (branch.post_norm is not None and branch.post_norm.bias)


def _index(axis: Axis, indices: Mapping[tuple[str, str], Tensor]) -> Tensor | None:
    return indices.get((axis.dimension, axis.site))


def _resize(norm: NormSpec | None, width: int) -> NormSpec | None:
    return None if norm is None else norm.model_copy(update={"width": width})
