"""Which architectures the graph forms cover: an allow-list of what they read, so that whatever is added to an architecture is refused until written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ...compress.architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec, FfnSpec, HeadSpec, NormSpec, PoolSpec, StemSpec

POOLS = ("token", "mean", "mean_all", "distilled")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu6", "hardswish", "tanh", "sigmoid", "identity")

# Fields that the forms read; any other must be at its default, where it changes nothing.
_READ: dict[type[BaseModel], set[str]] = {
    Architecture: {
        "schema_", "image", "embed", "stem", "prefix", "position", "stem_norm", "stem_writes", "steps", "norm", "pool", "pool_norm", "head",
        "head_reads", "last_queries",
    },
    StemSpec: {"kind", "patch", "bias"},
    PoolSpec: {"kind"},
    HeadSpec: {"classes", "bias"},
    BranchSpec: {"name", "core", "norm", "post_norm", "layer_scale", "reads", "writes"},
    AttentionSpec: {
        "kind", "heads", "qk", "v", "scale", "q_bias", "k_bias", "v_bias", "out_bias", "q_norm", "k_norm", "qk_norm_per_head", "out_norm",
        # These only qualify parts that are refused themselves.
        "gate_bias", "head_norm_per_head",
    },
    FfnSpec: {"kind", "hidden", "act", "gated", "in_bias", "gate_bias", "out_bias", "norm"},
    ConstantSpec: {"kind"},
    NormSpec: {"kind", "width", "eps", "weight", "bias"},
}  # fmt: skip


def reason_against(architecture: Architecture) -> str | None:
    """The first part that no form has a rule for, or None if all is covered."""
    if architecture.head is None:
        return "the model has no classifier"
    if architecture.pool.kind not in POOLS:
        return f"pooling by {architecture.pool.kind!r}"
    stem = architecture.stem
    if stem.stride == stem.patch:
        stem = stem.model_copy(update={"stride": None})
    parts: list[tuple[str, BaseModel | None]] = [
        ("model", architecture), ("stem", stem), ("pool", architecture.pool), ("head", architecture.head), ("norm", architecture.norm),
        ("stem_norm", architecture.stem_norm), ("pool_norm", architecture.pool_norm),
    ]  # fmt: skip
    for branch in architecture.branches:
        core = branch.core
        parts += [(branch.name, branch), (f"{branch.name}.core", core), (f"{branch.name}.norm", branch.norm)]
        if isinstance(core, FfnSpec) and core.act not in ACTIVATIONS:
            return f"{branch.name}: activation {core.act!r}"
    for path, part in parts:
        if part is not None and (found := _unread(part)):
            return f"{path}: {found}"
    return None


def _unread(part: BaseModel) -> str | None:
    read = _READ.get(type(part), set())
    for name, field in type(part).model_fields.items():
        value: Any = getattr(part, name)
        if name not in read and (field.is_required() or value != field.get_default(call_default_factory=True)):
            return name
    return None
