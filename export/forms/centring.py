"""LayerNorm as RMSNorm, exactly: everything that writes to the residual stream is centred.

Requires that every reader of the stream is a LayerNorm over the whole of it, followed by a Linear
in each core (a bias of the norm is folded into that Linear). The function stays the same; the
stream differs from the original by each token's mean, which LayerNorm subtracts anyway. After
Ashkboos et al. 2024, "SliceGPT", section 3.
"""

from __future__ import annotations

import numpy as np

from ...compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    FfnSpec,
    NormSpec,
    SelectSpec,
)
from .graph import Array, State
from .rows import scatter_array


def applicable(architecture: Architecture) -> bool:
    """Return whether only LayerNorms over all of the stream read it, and only Linears write it."""
    if (
        architecture.norm is None
        or architecture.norm.kind != "layer"
        or architecture.head_reads is not None
        or architecture.stem_norm is not None
    ):
        return False
    if architecture.patch_norm is not None:
        return False
    return all(_whole(branch) for branch in architecture.branches) and all(
        select.predictor is None
        or (select.norm is not None and select.norm.kind == "layer" and select.reads is None)
        for select in architecture.selects
    )


def _whole(branch: BranchSpec) -> bool:
    if isinstance(branch.core, ConstantSpec):
        return branch.post_norm is None
    return (
        branch.norm is not None
        and branch.norm.kind == "layer"
        and branch.reads is None
        and branch.post_norm is None
    )


def centre(
    architecture: Architecture, state: State, *, logits_only: bool = True
) -> tuple[Architecture, State]:
    """Return an equal network whose norms over the stream are RMSNorms without bias.

    Everything is computed in double precision.

    Args:
        architecture: The network.
        state: Its weights.
        logits_only: Whether only classifiers read the last norm, which then has no bias either.
    """
    wide = {name: value.astype(np.float64) for name, value in state.items()}
    embed = architecture.embed
    _scatter_stem(architecture, wide)
    stem_weight = wide["stem.weight"]
    wide["stem.weight"] = stem_weight - stem_weight.mean(axis=0)
    for name in ("stem.bias", "position", "prefix"):
        if name in wide:
            wide[name] = wide[name] - wide[name].mean(axis=-1, keepdims=True)
    steps = [
        tuple(
            _centred(branch, wide, f"steps.{number}.{position}.", embed)
            for position, branch in enumerate(step)
        )
        for number, step in enumerate(architecture.steps)
    ]
    selects = tuple(
        _centred_select(select, wide, f"selects.{number}.")
        for number, select in enumerate(architecture.selects)
    )
    assert architecture.norm is not None
    if logits_only and _linear_head(architecture):
        second = ["head_dist"] if architecture.pool.kind == "distilled" else []
        _fold_norm_bias(wide, "norm", ["head", *second])
    norm = _rms(architecture.norm, wide, "norm")
    changed = architecture.model_copy(
        update={"steps": tuple(steps), "selects": selects, "norm": norm, "stem_writes": None}
    )
    return changed, {
        name: np.ascontiguousarray(value.astype(np.float32)) for name, value in wide.items()
    }


def _linear_head(architecture: Architecture) -> bool:
    """Whether only averages and classifiers follow the last norm.

    Elsewhere its bias stays an Add, on few rows.
    """
    head = architecture.head
    plain = (
        head is not None
        and head.hidden is None
        and architecture.pool.refine is None
        and architecture.pool_norm is None
    )
    return plain and architecture.pool.kind in ("token", "mean", "mean_all", "distilled")


def _centred(branch: BranchSpec, wide: State, at: str, embed: int) -> BranchSpec:
    core = branch.core
    if isinstance(core, ConstantSpec):
        value = wide.pop(f"{at}layer_scale", np.ones(1)) * wide[f"{at}core.value"]
        value = _scattered(value, branch, embed)
        wide[f"{at}core.value"] = value - value.mean()
        return branch.model_copy(update={"layer_scale": False, "writes": None})
    assert branch.norm is not None
    if isinstance(core, AttentionSpec):
        readers, out = ["q", "k", "v", *(["gate"] if core.gated else [])], "out"
    else:
        assert isinstance(core, FfnSpec)
        readers, out = (["fc1", "gate"] if core.gated else ["fc1"]), "fc2"
    _fold_norm_bias(wide, f"{at}norm", [f"{at}core.{reader}" for reader in readers])
    scale = wide.pop(f"{at}layer_scale", None)
    weight, bias = wide[f"{at}core.{out}.weight"].T, wide.get(f"{at}core.{out}.bias")
    if scale is not None:
        weight, bias = weight * scale, None if bias is None else bias * scale
    weight = _scattered(weight, branch, embed)
    wide[f"{at}core.{out}.weight"] = (weight - weight.mean(axis=-1, keepdims=True)).T
    if bias is not None:
        bias = _scattered(bias, branch, embed)
        wide[f"{at}core.{out}.bias"] = bias - bias.mean()
    return branch.model_copy(
        update={"norm": _rms(branch.norm, wide, f"{at}norm"), "layer_scale": False, "writes": None}
    )


def _centred_select(select: SelectSpec, wide: State, at: str) -> SelectSpec:
    """A selection moves tokens, and fuses them by a sum, so centred ones stay centred."""
    if select.norm is None:
        return select
    _fold_norm_bias(wide, f"{at}norm", [f"{at}predictor.fc"])
    return select.model_copy(update={"norm": _rms(select.norm, wide, f"{at}norm")})


def _fold_norm_bias(wide: State, norm: str, readers: list[str]) -> None:
    """Fold the norm's bias b into each reader: W (y + b) + c = W y + (c + W b)."""
    shift = wide.pop(f"{norm}.bias", None)
    if shift is None:
        return
    for reader in readers:
        folded, name = wide[f"{reader}.weight"] @ shift, f"{reader}.bias"
        wide[name] = folded + wide[name] if name in wide else folded


def _rms(spec: NormSpec, wide: State, norm: str) -> NormSpec:
    wide.setdefault(f"{norm}.weight", np.ones(spec.width))
    return NormSpec(
        kind="rms", width=spec.width, eps=spec.eps, weight=True, bias=f"{norm}.bias" in wide
    )


def _scatter_stem(architecture: Architecture, wide: State) -> None:
    writes = architecture.stem_writes
    if writes is None:
        return
    wide["stem.weight"] = scatter_array(wide["stem.weight"].T, writes, architecture.embed).T
    for name in ("stem.bias", "position", "prefix"):
        if name in wide:
            wide[name] = scatter_array(wide[name], writes, architecture.embed)


def _scattered(value: Array, branch: BranchSpec, embed: int) -> Array:
    return value if branch.writes is None else scatter_array(value, branch.writes, embed)
