"""The plan of a cut: the new architecture, and the indices to keep of every parameter.

Rules:

1. The statistics of LayerNorm and RMSNorm run over the kept channels, and their weight and bias
   are sliced by the same indices.
2. A sub-layer without any unit still adds its output bias, as a constant.
3. A head is removed only by the head mask: with zero queries its softmax is uniform, not dead.
4. The softmax scale is stated in the new architecture.
5. A channel of the residual stream is kept if something reads it.
6. Token sets are nested, so patches are sorted once by where they leave the stream, and each set
   is a number of leading tokens. A token is computed as long as an attention or the head reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..masks.mask import StructuredMask, require_mask
from ..network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    Core,
    FfnSpec,
    Indices,
    PoolSpec,
)
from ..network.axes import (
    HEAD_IN,
    POOL_ATTENTION,
    POOL_FFN,
    POOL_OUT,
    STEM_OUT,
    Axis,
    branch_axes,
    outer_axes,
    site_in,
    site_out,
)
from .plan_attention import Index, cut_attention, resize
from .plan_selects import SelectPlan, plan_selects
from .plan_tokens import BranchPlan, plan_tokens


@dataclass(frozen=True)
class Plan:
    """The plan of a whole cut.

    Attributes:
        source: The architecture before.
        architecture: The architecture after.
        outer: The indices to keep on each axis of each parameter outside the sub-layers.
        branches: The sub-layers that stay, by step.
        selects: The selections that stay.
        channels: The channels of the residual stream that stay.
        removed: The names of the sub-layers that are removed.
    """

    source: Architecture
    architecture: Architecture
    outer: Mapping[str, tuple[Tensor | None, ...]]
    branches: tuple[tuple[BranchPlan, ...], ...]
    channels: Tensor
    removed: tuple[str, ...] = field(default=())
    selects: tuple[SelectPlan, ...] = field(default=())


def plan(architecture: Architecture, mask: StructuredMask) -> Plan:
    """Plan the cut of a network by a mask.

    Raises:
        InputError: The mask does not fit the network.
    """
    require_mask(mask)
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
    tokens = plan_tokens(architecture, mask, {row[0].step: row for row in plans})
    plans = tokens.applied(plans)
    selects = plan_selects(architecture, mask, plans, embed.locate)
    indices: dict[tuple[str, str], Tensor] = {
        ("embed", STEM_OUT): embed.stem_rows,
        ("embed", HEAD_IN): embed.head_columns,
        ("embed*2", HEAD_IN): torch.cat(
            [
                embed.head_columns,
                embed.head_columns + architecture.read_width(architecture.head_reads),
            ]
        ),
    }
    indices |= tokens.indices
    leaves: dict[str, tuple[Index, ...]] = {}
    pool = _plan_pool(architecture, mask, embed, indices, leaves)
    outer = {
        name: tuple(_index(axis, indices) for axis in axes)
        for name, axes in outer_axes(architecture).items()
    } | leaves
    reading = len(embed.head_columns)
    new = architecture.model_copy(
        update={
            "embed": embed.width,
            "stem_writes": embed.stem_writes,
            "patch_norm": resize(architecture.patch_norm, len(embed.stem_rows)),
            "stem_norm": resize(architecture.stem_norm, len(embed.stem_rows)),
            **tokens.fields,
            "steps": tuple(tuple(item.spec for item in row) for row in plans),
            "selects": tuple(item.spec for item in selects),
            "norm": resize(architecture.norm, reading),
            "pool": pool,
            "head_reads": embed.head_reads,
        }
    )
    new = new.model_copy(
        update={
            "pool_norm": resize(architecture.pool_norm, new.head_width),
            **_features(architecture, indices),
            **_stream(architecture, embed.channels),
        }
    )
    # model_copy skips validation; an invalid plan must fail here, not in the first forward pass.
    new = Architecture.model_validate(new.model_dump(by_alias=True))
    removals = tuple(removed)
    return Plan(architecture, new, outer, tuple(plans), embed.channels, removals, selects)


def _plan_pool(
    architecture: Architecture,
    mask: StructuredMask,
    embed: _Embed,
    indices: dict[tuple[str, str], Tensor],
    leaves: dict[str, tuple[Index, ...]],
) -> PoolSpec:
    """The pool after the cut; its indices are added to `indices` and `leaves`."""
    pool = architecture.pool
    changes: dict[str, object] = {}
    if pool.refine is not None:
        ends = torch.cumsum(torch.tensor(pool.refine.channels), 0)
        head = torch.searchsorted(ends, embed.head_columns, right=True)
        channels = tuple(torch.bincount(head, minlength=len(ends)).tolist())
        changes["refine"] = pool.refine.model_copy(update={"channels": channels})
    if pool.attention is not None and pool.width is not None:
        keep = mask.get("embed", POOL_OUT)
        rows = torch.arange(pool.width) if keep is None else torch.nonzero(keep).flatten()
        indices["embed", POOL_OUT] = rows
        cut = cut_attention(pool.attention, POOL_ATTENTION, mask)
        assert cut is not None, "StructuredMask.check refuses a pooling head without heads"
        indices |= {(dimension, POOL_ATTENTION): index for dimension, index in cut.indices.items()}
        leaves |= {
            f"pool.{leaf}": index for leaf, index in cut.leaves.items() if leaf.startswith("k_norm")
        }
        changes |= {"attention": cut.spec, "width": len(rows), "norm": resize(pool.norm, len(rows))}
        if pool.ffn is not None:
            hidden = mask.get("ffn", POOL_FFN)
            units = (
                torch.arange(pool.ffn.hidden) if hidden is None else torch.nonzero(hidden).flatten()
            )
            indices["ffn", POOL_FFN] = units
            changes["ffn"] = pool.ffn.model_copy(
                update={"hidden": len(units), "norm": resize(pool.ffn.norm, len(units))}
            )
    return pool.model_copy(update=changes)


def _features(
    architecture: Architecture, indices: Mapping[tuple[str, str], Tensor]
) -> dict[str, object]:
    """The places of the pooled features, which do not move."""
    axis = (
        ("embed", POOL_OUT)
        if architecture.pool.width
        else ("embed*2" if architecture.pool.kind == "token_mean" else "embed", HEAD_IN)
    )
    width = architecture.feature_width or architecture.head_width
    kept = _places(architecture.feature_writes, width)[indices[axis]].tolist()
    return (
        {"feature_width": None, "feature_writes": None}
        if len(kept) == width
        else {"feature_width": width, "feature_writes": tuple(kept)}
    )


def _stream(architecture: Architecture, channels: Tensor) -> dict[str, object]:
    """The places of the channels of the stream in the source model."""
    width = architecture.source_width
    kept = _places(architecture.stream_channels, width)[channels].tolist()
    return (
        {"stream_width": None, "stream_channels": None}
        if len(kept) == width
        else {"stream_width": width, "stream_channels": tuple(kept)}
    )


def _places(known: Indices | None, width: int) -> Tensor:
    return torch.arange(width) if known is None else torch.tensor(known)


class _Embed:
    """The residual stream after the cut: its channels, and those of each reader and writer.

    A channel stays if something reads it. The statistics of a reader run over all channels that its
    mask keeps, so these stay even if nothing writes them. What is written but never read is not
    written any more.
    """

    def __init__(
        self, architecture: Architecture, mask: StructuredMask, branches: list[BranchSpec]
    ) -> None:
        self._size = architecture.embed
        self._mask = mask
        self._live = torch.zeros(self._size, dtype=torch.bool)
        self._live |= self._seen(architecture.head_reads, HEAD_IN)
        for branch in branches:
            if not isinstance(branch.core, ConstantSpec):
                self._live |= self._seen(branch.reads, site_in(branch))
            if branch.post_norm is not None:
                self._live |= self._seen(branch.writes, site_out(branch))
        for select in architecture.selects:
            if select.predictor is not None:
                self._live |= self._seen(select.reads, select.site_in)
        stem = self._seen(architecture.stem_writes, STEM_OUT)
        if architecture.stem_norm is not None or architecture.patch_norm is not None:
            self._live |= stem
        if not bool((stem & self._live).any()):
            # Nothing reads what the stem writes, but a convolution needs an output.
            self._live[torch.nonzero(stem).flatten()[0]] = True
        self.channels = torch.nonzero(self._live).flatten()
        self._place = torch.cumsum(self._live, 0) - 1
        self.width = int(self._live.sum())
        self.stem_rows, self.stem_writes = self.locate(
            architecture.stem_writes, STEM_OUT, writing=True
        )
        self.head_columns, self.head_reads = self.locate(architecture.head_reads, HEAD_IN)

    def locate(
        self, old: Indices | None, site: str, *, writing: bool = False
    ) -> tuple[Tensor, Indices | None]:
        """Positions to keep on a tensor's own axis, and its new index list into the stream.

        The list is None if it is the whole stream.
        """
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


def _plan_branch(
    step: int, position: int, branch: BranchSpec, mask: StructuredMask, embed: _Embed
) -> BranchPlan | None:
    columns, reads = embed.locate(branch.reads, site_in(branch))
    rows, writes = embed.locate(branch.writes, site_out(branch), writing=True)
    if not len(rows):
        return None
    core, kept, leaves = _plan_core(branch, mask)
    if not len(columns) and not isinstance(core, ConstantSpec):
        raise AssertionError(f"{branch.name}: StructuredMask.check refuses a reader of nothing")
    constant = isinstance(core, ConstantSpec) and not isinstance(branch.core, ConstantSpec)
    if constant and not _has_constant(branch):
        return None
    indices = {("embed", site_in(branch)): columns, ("embed", site_out(branch)): rows, **kept}
    update: dict[str, object] = {"core": core, "writes": writes}
    if isinstance(core, ConstantSpec):
        update |= {"norm": None, "post_norm": None, "layer_scale": False, "reads": None}
    else:
        update |= {
            "norm": resize(branch.norm, len(columns)),
            "post_norm": resize(branch.post_norm, len(rows)),
            "reads": reads,
        }
    spec = branch.model_copy(update=update)
    slices = {
        name: tuple(_index(axis, indices) for axis in axes)
        for name, axes in branch_axes(branch).items()
    }
    slices |= {f"core.{leaf}": index for leaf, index in leaves.items()}
    return BranchPlan(step, position, spec, slices, constant)


def _plan_core(
    branch: BranchSpec, mask: StructuredMask
) -> tuple[Core, dict[tuple[str, str], Tensor], Mapping[str, tuple[Index, ...]]]:
    core, name = branch.core, branch.name
    if isinstance(core, AttentionSpec):
        cut = cut_attention(core, name, mask)
        if cut is None:
            return ConstantSpec(), {}, {}
        return (
            cut.spec,
            {(dimension, name): index for dimension, index in cut.indices.items()},
            cut.leaves,
        )
    if isinstance(core, FfnSpec):
        keep = mask.get("ffn", name)
        hidden = torch.arange(core.hidden) if keep is None else torch.nonzero(keep).flatten()
        if not len(hidden):
            return ConstantSpec(), {}, {}
        return (
            core.model_copy(update={"hidden": len(hidden), "norm": resize(core.norm, len(hidden))}),
            {("ffn", name): hidden},
            {},
        )
    return core, {}, {}


def _has_constant(branch: BranchSpec) -> bool:
    """Whether a sub-layer without units still adds a constant."""
    core = branch.core
    biased = isinstance(core, AttentionSpec | FfnSpec) and core.out_bias
    return biased or (branch.post_norm is not None and branch.post_norm.bias)


def _index(axis: Axis, indices: Mapping[tuple[str, str], Tensor]) -> Tensor | None:
    return indices.get((axis.dimension, axis.site))
