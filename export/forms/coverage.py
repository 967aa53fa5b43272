"""Which architectures the graph forms cover.

An allow-list of the fields that they read, so that a new field of an architecture is refused until
the forms implement it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ...compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    ConvSpec,
    DataSpec,
    DifferentialSpec,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    PredictorSpec,
    RefineSpec,
    RelativeBiasSpec,
    RopeGridSpec,
    RopeSpec,
    SelectSpec,
    SoftSplitSpec,
    StemSpec,
)

POOLS = (
    "token",
    "mean",
    "mean_all",
    "max",
    "max_all",
    "avgmax",
    "avgmax_all",
    "token_mean",
    "distilled",
    "dense",
    "attention",
    # With named outputs only: there are no logits.
    "none",
)
ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "relu",
    "relu6",
    "hardswish",
    "tanh",
    "sigmoid",
    "identity",
)


def _fields(names: str) -> set[str]:
    return set(names.split())


# Fields that the forms read, or that state how tables are resized, where channels and blocks were
# in the source model, and how images are prepared; any other must be at its
# default, where it changes nothing.
_READ: dict[type[BaseModel], set[str]] = {
    Architecture: _fields(
        "schema_ image embed stem prefix inner learned source_prefix position position_resize "
        "patch_norm stem_norm stem_writes order tokens_resampled steps selects blocks norm pool "
        "pool_norm head feature_width feature_writes stream_width stream_channels stream_rotated "
        "head_reads last_queries data"
    ),
    StemSpec: {"kind", "patch", "stride", "padding", "bias", "before"},
    ConvSpec: {"kind", "channels", "kernel", "stride", "padding", "bias", "act"},
    SoftSplitSpec: _fields(
        "kind channels kernel stride padding norm qkv_bias scale features features_eps "
        "out_bias ffn_norm ffn"
    ),
    PoolSpec: {"kind", "attention", "norm", "ffn", "width", "prefix", "refine"},
    RefineSpec: {"channels", "scale"},
    DataSpec: {"mean", "std", "interpolation", "crop_pct", "crop_mode"},
    HeadSpec: {"classes", "bias", "hidden", "hidden_act", "act"},
    BranchSpec: {"name", "core", "norm", "post_norm", "layer_scale", "reads", "writes", "tokens"},
    AttentionSpec: _fields(
        "kind heads qk v scale q_bias k_bias v_bias out_bias q_norm k_norm "
        "qk_norm_per_head out_norm kv_of gated gate_bias rope bias differential "
        "head_norm head_norm_per_head"
    ),
    RopeSpec: {"layout", "tokens", "prefix", "per_head", "at"},
    RopeGridSpec: {"kind", "offset", "over", "reference"},
    RelativeBiasSpec: {"grid", "prefix", "prefix_rows", "resize", "order", "inner"},
    DifferentialSpec: {"start", "width", "dual"},
    FfnSpec: {"kind", "hidden", "act", "gated", "in_bias", "gate_bias", "out_bias", "norm"},
    ConstantSpec: {"kind"},
    SelectSpec: _fields("name at patches scorer predictor norm reads fused seed"),
    PredictorSpec: {"local", "pooled", "hidden", "act"},
    NormSpec: {"kind", "width", "eps", "weight", "bias"},
}


def reason_against(architecture: Architecture) -> str | None:
    """Return the first part that no form has a rule for, or None if all is covered."""
    if architecture.pool.kind not in POOLS:
        return f"pooling by {architecture.pool.kind!r}"
    for path, part in _parts("model", architecture):
        for field in ("act", "hidden_act"):
            act = getattr(part, field, "identity")
            if act not in ACTIVATIONS:
                return f"{path}: activation {act!r}"
        if found := _unread(part):
            return f"{path}: {found}"
    return None


def _parts(path: str, part: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """Yield a specification and all those inside it; sub-layers are named by their own names."""
    yield path, part
    for name in type(part).model_fields:
        for inner in _inside(getattr(part, name)):
            inner_path = name if path == "model" else f"{path}.{name}"
            yield from _parts(inner.name if isinstance(inner, BranchSpec) else inner_path, inner)


def _inside(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
    elif isinstance(value, tuple) and value and not isinstance(value[0], int):
        for entry in value:
            yield from _inside(entry)


def _unread(part: BaseModel) -> str | None:
    read = _READ.get(type(part), set())
    for name, field in type(part).model_fields.items():
        value: Any = getattr(part, name)
        if name not in read and (
            field.is_required() or value != field.get_default(call_default_factory=True)
        ):
            return name
    return None
