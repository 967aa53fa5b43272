"""Which dimension of a Vision Transformer each axis of each parameter runs over: the one table that the surgery cuts by.

An axis is a dimension of DESIGN (`embed`, `head`, `qk`, `v`, `ffn`) at a site. Sites of `embed` are `stem.out`, `<branch>.in`, `<branch>.out` and
`head.in`; sites of the others are branch names. `head*qk` and `head*v` are the flattened (head, column) axes of the projections.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor; `fixed` axes are never cut."""

    dimension: str
    site: str = ""


FIXED = Axis("fixed")
STEM_OUT = "stem.out"
HEAD_IN = "head.in"


def site_in(branch: BranchSpec) -> str:
    """Where a branch reads the residual stream."""
    return f"{branch.name}.in"


def site_out(branch: BranchSpec) -> str:
    """Where a branch writes to the residual stream."""
    return f"{branch.name}.out"


def parameter_axes(architecture: Architecture) -> dict[str, tuple[Axis, ...]]:
    """Parameter name in `CompactModel` -> its axes."""
    table: dict[str, tuple[Axis, ...]] = {}
    stem, reading = Axis("embed", STEM_OUT), Axis("embed", HEAD_IN)
    table["stem.weight"] = (stem, FIXED, FIXED, FIXED)
    table["stem.bias"] = (stem,)
    table["prefix"] = table["position"] = (FIXED, stem)
    for name, axis in (("stem_norm", stem), ("norm", reading), ("pool_norm", reading)):
        table[f"{name}.weight"] = table[f"{name}.bias"] = (axis,)
    for name in ("head", "head_dist"):
        table[f"{name}.weight"] = (FIXED, reading)
        table[f"{name}.bias"] = (FIXED,)
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}"
            for name, axes in branch_axes(branch).items():
                table[f"{prefix}.{name}"] = axes
    return table


def branch_axes(branch: BranchSpec) -> dict[str, tuple[Axis, ...]]:
    """Parameter name inside a branch -> its axes."""
    read, write = Axis("embed", site_in(branch)), Axis("embed", site_out(branch))
    table: dict[str, tuple[Axis, ...]] = {"layer_scale": (write,)}
    table["norm.weight"] = table["norm.bias"] = (read,)
    table["post_norm.weight"] = table["post_norm.bias"] = (write,)
    core = branch.core
    if isinstance(core, AttentionSpec):
        columns = {"q": Axis("head*qk", branch.name), "k": Axis("head*qk", branch.name), "v": Axis("head*v", branch.name)}
        for name, axis in columns.items():
            table[f"core.{name}.weight"] = (axis, read)
            table[f"core.{name}.bias"] = (axis,)
        width = Axis("qk", branch.name)
        per_head = (Axis("head", branch.name), width) if core.qk_norm_per_head else (width,)
        for name in ("q_norm", "k_norm"):
            table[f"core.{name}.weight"] = table[f"core.{name}.bias"] = per_head
        table["core.out_norm.weight"] = table["core.out_norm.bias"] = (columns["v"],)
        table["core.out.weight"] = (write, columns["v"])
        table["core.out.bias"] = (write,)
    elif isinstance(core, FfnSpec):
        hidden = Axis("ffn", branch.name)
        for name in ("fc1", "gate"):
            table[f"core.{name}.weight"] = (hidden, read)
            table[f"core.{name}.bias"] = (hidden,)
        table["core.norm.weight"] = table["core.norm.bias"] = (hidden,)
        table["core.fc2.weight"] = (write, hidden)
        table["core.fc2.bias"] = (write,)
    else:
        table["core.value"] = (write,)
    return table
