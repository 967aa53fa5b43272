"""The dimension that each axis of each parameter runs over: the table that the surgery cuts by.

An axis is a dimension of a mask (`embed`, `head`, `qk`, `v`, `ffn`) at a site. Sites of `embed` are
`stem.out`, `<branch>.in`, `<branch>.out`, `head.in` and, with attention pooling, `pool.out`; sites
of the others are branch names, `pool.attn` and `pool.ffn`.

Compound axes: `head*qk` and `head*v` are the flattened (head, column) axes of the projections;
`head*2*qk` is that of differential attention; `kv*qk` and `kv*v` are those of grouped keys and
values. `embed*2` is the concatenated features of a class token and a mean. With `head*` the indices
of the next axis may differ from head to head. `patch` is the axis of the embedded patches, which a
token mask sorts and cuts. `local` and `pooled` are the two parts of the first layer of a predictor,
whose mask is `ffn` at the site of that layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    FfnSpec,
    Indices,
    SelectSpec,
)
from .select_specs import is_hidden_site


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the mask dimension and the site that it runs over."""

    dimension: str
    # Empty for `fixed` axes, which are never cut.
    site: str = ""


FIXED = Axis("fixed")
PATCHES = Axis("patch")
LEARNED = Axis("learned")
# Tokens behind the prefix.
ROTATED = Axis("rotated")
STEM_OUT = "stem.out"
HEAD_IN = "head.in"
# Attention pooling writes to channels of its own, which masks shared by the blocks do not cover.
POOL_OUT = "pool.out"
POOL_ATTENTION = "pool.attn"
POOL_FFN = "pool.ffn"
POOL_SITES = (POOL_OUT, POOL_ATTENTION, POOL_FFN)


def has_own_mask(site: str) -> bool:
    """Whether a site is never covered by a shared mask: in a pooling head, or in a predictor."""
    return site in POOL_SITES or is_hidden_site(site)


def site_in(branch: BranchSpec) -> str:
    """The site at which a branch reads the residual stream."""
    return f"{branch.name}.in"


def site_out(branch: BranchSpec) -> str:
    """The site at which a branch writes to the residual stream."""
    return f"{branch.name}.out"


def stream_channels(architecture: Architecture) -> dict[str, Indices | None]:
    """Map each site of `embed` to the channels of the residual stream there; None: all of them."""
    channels = {STEM_OUT: architecture.stem_writes, HEAD_IN: architecture.head_reads}
    for branch in architecture.branches:
        channels |= {site_in(branch): branch.reads, site_out(branch): branch.writes}
    for select in architecture.selects:
        if select.predictor is not None:
            channels[select.site_in] = select.reads
    return channels


def parameter_axes(architecture: Architecture) -> dict[str, tuple[Axis, ...]]:
    """Map each parameter name of `CompactModel` to its axes."""
    table = outer_axes(architecture)
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}"
            for name, axes in branch_axes(branch).items():
                table[f"{prefix}.{name}"] = axes
    for number, select in enumerate(architecture.selects):
        for name, axes in select_axes(select).items():
            table[f"selects.{number}.{name}"] = axes
    return table


def select_axes(select: SelectSpec) -> dict[str, tuple[Axis, ...]]:
    """Map the parameter names inside a selection to their axes."""
    read, sites = Axis("embed", select.site_in), tuple(select.hidden_sites)
    if not sites:
        return {}
    widths = [Axis("ffn", site) for site in sites]
    following = [*widths[1:], FIXED]
    table: dict[str, tuple[Axis, ...]] = {}
    table["norm.weight"] = table["norm.bias"] = (read,)
    table |= {"predictor.fc.weight": (widths[0], read), "predictor.fc.bias": (widths[0],)}
    for part in ("local", "pooled"):
        table[f"predictor.{part}.weight"] = (following[0], Axis(part, sites[0]))
    table["predictor.local.bias"] = (following[0],)
    for number, (before, after) in enumerate(zip(widths[1:], following[1:], strict=True)):
        table[f"predictor.rest.{number}.weight"] = (after, before)
        table[f"predictor.rest.{number}.bias"] = (after,)
    return table


def outer_axes(architecture: Architecture) -> dict[str, tuple[Axis, ...]]:
    """Map the parameter names outside of the branches to their axes."""
    table: dict[str, tuple[Axis, ...]] = {}
    stem, reading = Axis("embed", STEM_OUT), Axis("embed", HEAD_IN)
    table["stem.weight"] = (stem, FIXED, FIXED, FIXED)
    table["stem.bias"] = (stem,)
    table["prefix"] = (LEARNED, stem)
    table["position"] = (PATCHES, stem)
    pooled = reading
    if architecture.pool.kind == "attention":
        pooled = Axis("embed", POOL_OUT)
        table |= _pool_axes(reading, pooled)
    elif architecture.pool.kind == "token_mean":
        pooled = Axis("embed*2", HEAD_IN)
    for name, axis in (
        ("patch_norm", stem),
        ("stem_norm", stem),
        ("norm", reading),
        ("pool_norm", pooled),
    ):
        table[f"{name}.weight"] = table[f"{name}.bias"] = (axis,)
    inner = FIXED if architecture.head is not None and architecture.head.hidden else pooled
    for name, axis in (("pre_head", pooled), ("head", inner), ("head_dist", inner)):
        table[f"{name}.weight"] = (FIXED, axis)
        table[f"{name}.bias"] = (FIXED,)
    return table


def _pool_axes(read: Axis, write: Axis) -> dict[str, tuple[Axis, ...]]:
    qk, v = Axis("head*qk", POOL_ATTENTION), Axis("head*v", POOL_ATTENTION)
    hidden = Axis("ffn", POOL_FFN)
    table: dict[str, tuple[Axis, ...]] = {"pool.query": (qk,)}
    for name, axis in (("k", qk), ("v", v)):
        table[f"pool.{name}.weight"] = (axis, read)
        table[f"pool.{name}.bias"] = (axis,)
    table["pool.k_norm.weight"] = table["pool.k_norm.bias"] = (
        Axis("head*", POOL_ATTENTION),
        Axis("qk", POOL_ATTENTION),
    )
    table["pool.out.weight"] = (write, v)
    table["pool.out.bias"] = (write,)
    table["pool.norm.weight"] = table["pool.norm.bias"] = (write,)
    for name, axes in _ffn_axes(hidden, write, write).items():
        table[f"pool.ffn.{name}"] = axes
    return table


def branch_axes(branch: BranchSpec) -> dict[str, tuple[Axis, ...]]:
    """Map the parameter names inside a branch to their axes."""
    read, write = Axis("embed", site_in(branch)), Axis("embed", site_out(branch))
    table: dict[str, tuple[Axis, ...]] = {"layer_scale": (write,)}
    table["norm.weight"] = table["norm.bias"] = (read,)
    table["post_norm.weight"] = table["post_norm.bias"] = (write,)
    core = branch.core
    if isinstance(core, AttentionSpec):
        table |= _attention_axes(core, branch.name, read, write)
    elif isinstance(core, FfnSpec):
        for name, axes in _ffn_axes(Axis("ffn", branch.name), read, write).items():
            table[f"core.{name}"] = axes
    else:
        table["core.value"] = (write,)
    return table


def _ffn_axes(hidden: Axis, read: Axis, write: Axis) -> dict[str, tuple[Axis, ...]]:
    table: dict[str, tuple[Axis, ...]] = {"norm.weight": (hidden,), "norm.bias": (hidden,)}
    for name in ("fc1", "gate"):
        table[f"{name}.weight"] = (hidden, read)
        table[f"{name}.bias"] = (hidden,)
    table["fc2.weight"] = (write, hidden)
    table["fc2.bias"] = (write,)
    return table


def _attention_axes(
    core: AttentionSpec, name: str, read: Axis, write: Axis
) -> dict[str, tuple[Axis, ...]]:
    table: dict[str, tuple[Axis, ...]] = {}
    both = "head*2*qk" if core.parts == 2 else "head*qk"
    columns = {
        "q": Axis(both, name),
        "k": Axis("kv*qk" if core.kv_of else both, name),
        "v": Axis("kv*v" if core.kv_of else "head*v", name),
        "gate": Axis("head*v", name),
    }
    for leaf, axis in columns.items():
        table[f"core.{leaf}.weight"] = (axis, read)
        table[f"core.{leaf}.bias"] = (axis,)
    # The first axis exists only if each head has its own weight.
    heads = {"q_norm": "head*", "k_norm": "kv*" if core.kv_of else "head*"}
    if core.parts == 2:
        heads = dict.fromkeys(heads, "head*2*")
    for leaf, rows in heads.items():
        table[f"core.{leaf}.weight"] = table[f"core.{leaf}.bias"] = (
            Axis(rows, name),
            Axis("qk", name),
        )
    table["core.head_norm.weight"] = table["core.head_norm.bias"] = (
        Axis("head*", name),
        Axis("v", name),
    )
    table["core.rope.table"] = (Axis("head*", name), FIXED, ROTATED, Axis("pair", name))
    table["core.rope.frequencies"] = (Axis("head*", name), FIXED, Axis("pair", name))
    table["core.bias.table"] = (FIXED, Axis("head", name))
    table["core.differential.vectors"] = (FIXED, FIXED)
    table["core.out_norm.weight"] = table["core.out_norm.bias"] = (Axis("head*v", name),)
    table["core.out.weight"] = (write, Axis("head*v", name))
    table["core.out.bias"] = (write,)
    return table
