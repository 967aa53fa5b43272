"""How a mask enters the computation of a full-size network: as factors on parameters and as weights
of the norms' statistics.

This is the other half of the promise "masked equals compact", written apart from the table that the
surgery cuts by, so that each checks the other. Values may be booleans made float, or trainable
gates: gradients flow to them.

A factor is put where it stops a unit and nowhere twice: a query column is masked in q (its product
with k is then zero), a head's value columns where the output projection reads them, an FFN unit
behind its activation (act(0) is not 0 for all of them), a channel where it is written and in the
norm that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..network.axes import HEAD_IN, POOL_ATTENTION, POOL_FFN, POOL_OUT, STEM_OUT, site_in, site_out
from .groups import ScaleRule

Values = Callable[[str, str], Tensor | None]


def masked_tensors(
    architecture: Architecture, parameters: Mapping[str, Tensor], values: Values, scale: ScaleRule
) -> dict[str, Tensor]:
    """Parameters and norm masks that make the full-size network compute with the mask.

    `values(dimension, site)` gives 1 (keep) or 0 a unit, or None for all; shapes as in
    `StructuredMask`.
    """
    changed: dict[str, Tensor] = {}
    rows = _Rows(parameters, changed)
    stem = _embed(values, STEM_OUT, architecture.stem_writes)
    if stem is not None:
        rows.scale("stem.weight", stem, 0)
        for name in ("stem.bias", "prefix", "position"):
            rows.scale(name, stem, -1)
        for name in ("patch_norm", "stem_norm"):
            if getattr(architecture, name) is not None:
                changed[f"{name}.mask"] = stem
    reading = _embed(values, HEAD_IN, architecture.head_reads)
    if reading is not None and architecture.norm is not None:
        changed["norm.mask"] = reading
    pooled = reading
    if architecture.pool.kind == "attention":
        if reading is not None and architecture.norm is None:
            for name in ("k", "v"):
                rows.scale(f"pool.{name}.weight", reading, -1)
        pooled = values("embed", POOL_OUT)
        _mask_pool(architecture, rows, changed, values, scale, pooled)
    elif reading is not None and architecture.pool.kind == "token_mean":
        pooled = torch.cat([reading, reading])
    if pooled is not None and architecture.pool_norm is not None:
        changed["pool_norm.mask"] = pooled
    # Twice masking by zeros and ones is masking once, but a gate between them would enter twice:
    # mostly the last norm, or the pool, has done it already.
    if (
        pooled is not None
        and architecture.norm is None
        and architecture.pool_norm is None
        and architecture.pool.kind != "attention"
    ):
        for name in (
            ("pre_head",)
            if architecture.head is not None and architecture.head.hidden
            else ("head", "head_dist")
        ):
            rows.scale(f"{name}.weight", pooled, -1)
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            _mask_branch(f"steps.{number}.{position}.", branch, rows, changed, values, scale)
    return changed


def masked_features(architecture: Architecture, values: Values) -> Tensor | None:
    """Factors on the features of a network that has neither a head nor a norm where the mask could
    enter: (features,), or None.
    """
    if (
        architecture.head is not None
        or architecture.norm is not None
        or architecture.pool_norm is not None
        or architecture.pool.kind == "attention"
    ):
        return None
    reading = _embed(values, HEAD_IN, architecture.head_reads)
    if reading is None:
        return None
    factors = torch.cat([reading, reading]) if architecture.pool.kind == "token_mean" else reading
    if architecture.feature_writes is None:
        return factors
    return (
        torch.ones(architecture.classes)
        .to(factors)
        .index_copy(0, torch.tensor(architecture.feature_writes, device=factors.device), factors)
    )


def _mask_pool(
    architecture: Architecture,
    rows: _Rows,
    changed: dict[str, Tensor],
    values: Values,
    scale: ScaleRule,
    writing: Tensor | None,
) -> None:
    pool = architecture.pool
    assert pool.attention is not None
    attention = pool.attention
    qk = values("qk", POOL_ATTENTION)
    if qk is not None:
        each = _scaled(qk, attention, scale)
        rows.scale("pool.query", each.reshape(-1), 0)
        if attention.k_norm is not None:
            changed["pool.k_norm.mask"] = qk if qk.ndim == 1 else qk.unsqueeze(-2)
    columns = _value_columns(attention, values, POOL_ATTENTION)
    if columns is not None:
        rows.scale("pool.out.weight", columns.reshape(-1), -1)
    hidden = values("ffn", POOL_FFN)
    if hidden is not None and pool.ffn is not None:
        if pool.ffn.norm is not None:
            changed["pool.ffn.norm.mask"] = hidden
        rows.scale("pool.ffn.fc2.weight", hidden, -1)
    if writing is not None:
        if pool.norm is not None:
            changed["pool.norm.mask"] = writing
        for leaf in ("out", "ffn.fc2"):
            rows.scale(f"pool.{leaf}.weight", writing, 0)
            rows.scale(f"pool.{leaf}.bias", writing, -1)


def _mask_branch(
    prefix: str,
    branch: BranchSpec,
    rows: _Rows,
    changed: dict[str, Tensor],
    values: Values,
    scale: ScaleRule,
) -> None:
    reading = _embed(values, site_in(branch), branch.reads)
    core = branch.core
    if reading is not None:
        if branch.norm is not None:
            changed[f"{prefix}norm.mask"] = reading
        else:
            for name in (
                ("q", "k", "v", "gate") if isinstance(core, AttentionSpec) else ("fc1", "gate")
            ):
                rows.scale(f"{prefix}core.{name}.weight", reading, -1)
    if isinstance(core, AttentionSpec):
        _mask_attention(prefix, branch.name, core, rows, changed, values, scale)
    elif isinstance(core, FfnSpec):
        hidden = values("ffn", branch.name)
        if hidden is not None:
            if core.norm is not None:
                changed[f"{prefix}core.norm.mask"] = hidden
            rows.scale(f"{prefix}core.fc2.weight", hidden, -1)
    writing, block = _embed(values, site_out(branch), branch.writes), values("block", branch.name)
    if branch.post_norm is not None and writing is not None:
        changed[f"{prefix}post_norm.mask"] = writing
    for factor in (writing, block):
        if factor is None:
            continue
        leaf = {"attention": "out", "ffn": "fc2"}.get(core.kind)
        if leaf is None:
            rows.scale(f"{prefix}core.value", factor, -1)
        else:
            rows.scale(f"{prefix}core.{leaf}.weight", factor, 0)
            rows.scale(f"{prefix}core.{leaf}.bias", factor, -1)
    if block is not None:
        for name in ("post_norm.weight", "post_norm.bias"):
            rows.scale(prefix + name, block, -1)


def _mask_attention(
    prefix: str,
    name: str,
    core: AttentionSpec,
    rows: _Rows,
    changed: dict[str, Tensor],
    values: Values,
    scale: ScaleRule,
) -> None:
    qk = values("qk", name)
    if qk is not None:
        each = _scaled(qk, core, scale).repeat_interleave(core.parts, dim=0)
        if core.q_norm is None:
            rows.scale(f"{prefix}core.q.weight", each.reshape(-1), 0)
            rows.scale(f"{prefix}core.q.bias", each.reshape(-1), -1)
        else:
            changed[f"{prefix}core.q_norm.mask"] = (
                qk if qk.ndim == 1 else qk.repeat_interleave(core.parts, dim=0).unsqueeze(-2)
            )
            changed[f"{prefix}core.q_norm.gain"] = each[0] if qk.ndim == 1 else each.unsqueeze(-2)
        if core.k_norm is not None:
            shared = (
                qk
                if qk.ndim == 1 or core.kv_of is None
                else qk[[core.kv_of.index(kv) for kv in range(core.kv_heads)]]
            )
            changed[f"{prefix}core.k_norm.mask"] = (
                shared
                if qk.ndim == 1
                else shared.repeat_interleave(core.parts, dim=0).unsqueeze(-2)
            )
    v = values("v", name)
    if v is not None and core.head_norm is not None:
        changed[f"{prefix}core.head_norm.mask"] = v if v.ndim == 1 else v.unsqueeze(-2)
    columns = _value_columns(core, values, name)
    if columns is None:
        return
    if core.out_norm is not None:
        changed[f"{prefix}core.out_norm.mask"] = columns.reshape(-1)
    rows.scale(f"{prefix}core.out.weight", columns.reshape(-1), -1)


def _scaled(qk: Tensor, core: AttentionSpec, scale: ScaleRule) -> Tensor:
    """(heads, qk) factors on the query columns. With "kept" the softmax scale follows the kept
    width (METHODS A); as a factor it also passes gradients.
    """
    each = qk.expand(core.heads, core.qk)
    return (
        each * (math.sqrt(core.qk) / each[0].sum().clamp(min=1e-6).sqrt())
        if scale == "kept"
        else each
    )


def _value_columns(core: AttentionSpec, values: Values, name: str) -> Tensor | None:
    """(heads, v) factors on what the output projection reads, or None where all is kept."""
    heads, v = values("head", name), values("v", name)
    if heads is None and v is None:
        return None
    columns = torch.ones(core.heads, core.v) if v is None else v.expand(core.heads, core.v)
    return columns if heads is None else columns.to(heads) * heads[:, None]


def _embed(values: Values, site: str, indices: tuple[int, ...] | None) -> Tensor | None:
    found = values("embed", site)
    return found if found is None or indices is None else found[list(indices)]


class _Rows:
    """Multiplies parameters by factors along one axis, collecting the results."""

    def __init__(self, parameters: Mapping[str, Tensor], changed: dict[str, Tensor]) -> None:
        self._parameters = parameters
        self._changed = changed

    def scale(self, name: str, factor: Tensor, axis: int) -> None:
        tensor = self._changed.get(name, self._parameters.get(name))
        if tensor is None:
            return
        shape = [1] * tensor.ndim
        shape[axis] = factor.shape[0]
        self._changed[name] = tensor * factor.reshape(shape)
