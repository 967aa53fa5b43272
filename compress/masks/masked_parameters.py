"""Parameters and norm masks with which a full-size network computes with a structured mask.

Masked and compact models must give equal outputs. This module is independent of the axis table by
which the surgery slices (`network/axes.py`), so each validates the other. Mask values are floats:
converted booleans, or trainable gates, to which gradients flow.

Each unit is masked exactly once:

- a query column in q, which makes its product with k zero;
- a value column, and a head, where the output projection reads it;
- an FFN unit behind its activation, since act(0) is not always 0;
- a channel where it is written, and in the norm that reads it;
- a token where it is a key, and where tokens are pooled. Its own row is computed and never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    FfnSpec,
    PredictorSpec,
    SelectSpec,
)
from ..network.axes import HEAD_IN, POOL_ATTENTION, POOL_FFN, POOL_OUT, STEM_OUT, site_in, site_out
from ..network.select_specs import ATTENTION_SCORERS, scoring_attention
from .groups import ScaleRule, token_sites

Values = Callable[[str, str], Tensor | None]


def masked_tensors(
    architecture: Architecture, parameters: Mapping[str, Tensor], values: Values, scale: ScaleRule
) -> dict[str, Tensor]:
    """Parameters and norm masks that make the full-size network compute with a mask.

    Args:
        architecture: The network.
        parameters: Its parameters by name.
        values: `values(dimension, site)` returns a float factor per unit, 1 = keep, or None where
            everything is kept; shapes as in `StructuredMask`.
        scale: The softmax scale: "kept", that of the kept width, or "original".

    Returns:
        The changed tensors by name: parameters, and the `mask` and `gain` buffers of `MaskedNorm`.
    """
    masking = _Masking(architecture, parameters, values, scale)
    masking.stem()
    masking.head()
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            masking.branch(f"steps.{number}.{position}.", branch)
    masking.tokens()
    masking.selects()
    return masking.changed


def masked_features(architecture: Architecture, values: Values) -> Tensor | None:
    """Factors (features,) on the output of a network without a head, or None.

    They are needed only where no norm and no pool can apply the mask.
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


class _Masking:
    """Applies a mask part by part and collects the changed tensors."""

    def __init__(
        self,
        architecture: Architecture,
        parameters: Mapping[str, Tensor],
        values: Values,
        scale: ScaleRule,
    ) -> None:
        self._architecture, self._parameters = architecture, parameters
        self._values, self._scale = values, scale
        self.changed: dict[str, Tensor] = {}
        # The tokens that are kept after the stem and after each step before the first selection.
        self.token_sets: list[Tensor | None] = []

    def stem(self) -> None:
        """Mask what the patch embedding writes."""
        stem = _embed(self._values, STEM_OUT, self._architecture.stem_writes)
        if stem is None:
            return
        self._multiply("stem.weight", stem, 0)
        for name in ("stem.bias", "prefix", "position"):
            self._multiply(name, stem, -1)
        for name in ("patch_norm", "stem_norm"):
            if getattr(self._architecture, name) is not None:
                self.changed[f"{name}.mask"] = stem

    def head(self) -> None:
        """Mask what the last norm, the pool and the classifier read."""
        architecture = self._architecture
        pool, attention = architecture.pool, architecture.pool.kind == "attention"
        reading = _embed(self._values, HEAD_IN, architecture.head_reads)
        if reading is not None and architecture.norm is not None:
            self.changed["norm.mask"] = reading
        pooled = reading
        if attention:
            if reading is not None and architecture.norm is None:
                for name in ("k", "v"):
                    self._multiply(f"pool.{name}.weight", reading, -1)
            pooled = self._values("embed", POOL_OUT)
            self._pool(pooled)
        elif reading is not None and pool.kind == "token_mean":
            pooled = torch.cat([reading, reading])
        if pooled is None:
            return
        if architecture.pool_norm is not None:
            self.changed["pool_norm.mask"] = pooled
        # Otherwise the last norm or the pool has applied this mask; a gate must be applied once.
        elif architecture.norm is None and not attention:
            hidden = architecture.head is not None and architecture.head.hidden
            for name in ("pre_head",) if hidden else ("head", "head_dist"):
                self._multiply(f"{name}.weight", pooled, -1)

    def branch(self, prefix: str, branch: BranchSpec) -> None:
        """Mask one sub-layer, whose parameters are named `prefix` + leaf."""
        core = branch.core
        attention = isinstance(core, AttentionSpec)
        reading = _embed(self._values, site_in(branch), branch.reads)
        if reading is not None and branch.norm is not None:
            self.changed[f"{prefix}norm.mask"] = reading
        elif reading is not None:
            for name in ("q", "k", "v", "gate") if attention else ("fc1", "gate"):
                self._multiply(f"{prefix}core.{name}.weight", reading, -1)
        if isinstance(core, AttentionSpec):
            self._attention(f"{prefix}core.", branch.name, core)
        elif isinstance(core, FfnSpec):
            hidden = self._values("ffn", branch.name)
            if hidden is not None:
                if core.norm is not None:
                    self.changed[f"{prefix}core.norm.mask"] = hidden
                self._multiply(f"{prefix}core.fc2.weight", hidden, -1)
        self._output(prefix, branch)

    def tokens(self) -> None:
        """Mask the keys of each attention and the tokens that the head pools."""
        architecture = self._architecture
        sets: list[Tensor | None] = []
        for site, count in token_sites(architecture).items():
            entry, before = self._values("token", site), sets[-1] if sets else None
            before = None if before is None else before[:count]
            if entry is not None and before is not None:
                # Nested in any case. The gradient of an entry is that of its own tokens alone, and
                # of a token that an earlier site dropped, too.
                entry = entry + (before * entry - entry).detach()
            sets.append(before if entry is None else entry)
        self.token_sets = sets
        for number, step in enumerate(architecture.steps[: len(sets) - 1]):
            keys = sets[number]
            for position, branch in enumerate(step):
                if keys is not None and isinstance(branch.core, AttentionSpec):
                    self.changed[f"steps.{number}.{position}.core.key_keep"] = keys
        final, pool = sets[-1], architecture.pool
        if final is None or architecture.selects:
            return
        if architecture.pooled_prefix == 0:
            self.changed["token_keep"] = final
        if pool.attention is not None:
            self.changed["pool.key_keep"] = final if pool.prefix else final[architecture.prefix :]
        if pool.refine is not None:
            self.changed["refine.key_keep"] = final

    def selects(self) -> None:
        """Mask predictors, and what attentions contribute to the scores of selections."""
        architecture = self._architecture
        for number, select in enumerate(architecture.selects):
            prefix = f"selects.{number}."
            if number == 0 and self.token_sets[-1] is not None:
                self.changed[f"{prefix}token_keep"] = self.token_sets[-1]
            if select.predictor is not None:
                self._predictor(prefix, select, select.predictor)
            elif select.scorer in ATTENTION_SCORERS:
                branch = scoring_attention(architecture, select)
                heads = self._values("head", branch.name)
                if heads is not None:
                    self.changed[f"{prefix}head_keep"] = heads
                assert isinstance(branch.core, AttentionSpec)
                columns = _value_columns(branch.core, self._values, branch.name)
                if columns is not None:
                    self.changed[f"{prefix}value_keep"] = columns

    def _predictor(self, prefix: str, select: SelectSpec, spec: PredictorSpec) -> None:
        reading = _embed(self._values, select.site_in, select.reads)
        if reading is not None and select.norm is not None:
            self.changed[f"{prefix}norm.mask"] = reading
        elif reading is not None:
            self._multiply(f"{prefix}predictor.fc.weight", reading, -1)
        masks = [self._values("ffn", site) for site in select.hidden_sites]
        if masks[0] is not None:
            self._multiply(f"{prefix}predictor.local.weight", masks[0][: spec.local], -1)
            self._multiply(f"{prefix}predictor.pooled.weight", masks[0][spec.local :], -1)
        for layer, mask in enumerate(masks[1:]):
            if mask is not None:
                self._multiply(f"{prefix}predictor.rest.{layer}.weight", mask, -1)

    def _output(self, prefix: str, branch: BranchSpec) -> None:
        writing = _embed(self._values, site_out(branch), branch.writes)
        block = self._values("block", branch.name)
        if branch.post_norm is not None and writing is not None:
            self.changed[f"{prefix}post_norm.mask"] = writing
        leaf = {"attention": "out", "ffn": "fc2"}.get(branch.core.kind)
        for factor in (writing, block):
            if factor is None:
                continue
            if leaf is None:
                self._multiply(f"{prefix}core.value", factor, -1)
            else:
                self._multiply(f"{prefix}core.{leaf}.weight", factor, 0)
                self._multiply(f"{prefix}core.{leaf}.bias", factor, -1)
        if block is not None:
            for name in ("post_norm.weight", "post_norm.bias"):
                self._multiply(prefix + name, block, -1)

    def _attention(self, prefix: str, name: str, core: AttentionSpec) -> None:
        qk, v = self._values("qk", name), self._values("v", name)
        if qk is not None:
            self._query_key(prefix, qk, core)
        if v is not None and core.head_norm is not None:
            self.changed[f"{prefix}head_norm.mask"] = v if v.ndim == 1 else v.unsqueeze(-2)
        columns = _value_columns(core, self._values, name)
        if columns is None:
            return
        if core.out_norm is not None:
            self.changed[f"{prefix}out_norm.mask"] = columns.reshape(-1)
        self._multiply(f"{prefix}out.weight", columns.reshape(-1), -1)

    def _query_key(self, prefix: str, qk: Tensor, core: AttentionSpec) -> None:
        def each_part(heads: Tensor) -> Tensor:
            # Differential attention has several query and key parts per head.
            return heads.repeat_interleave(core.parts, dim=0)

        same = qk.ndim == 1
        factors = each_part(_scaled(qk, core, self._scale))
        if core.q_norm is None:
            self._multiply(f"{prefix}q.weight", factors.reshape(-1), 0)
            self._multiply(f"{prefix}q.bias", factors.reshape(-1), -1)
        else:
            self.changed[f"{prefix}q_norm.mask"] = qk if same else each_part(qk).unsqueeze(-2)
            self.changed[f"{prefix}q_norm.gain"] = factors[0] if same else factors.unsqueeze(-2)
        if core.k_norm is not None:
            if not same and core.kv_of is not None:
                qk = qk[[core.kv_of.index(kv) for kv in range(core.kv_heads)]]
            self.changed[f"{prefix}k_norm.mask"] = qk if same else each_part(qk).unsqueeze(-2)

    def _pool(self, writing: Tensor | None) -> None:
        """Mask an attention-pooling head, of whose output `writing` is kept."""
        pool, attention = self._architecture.pool, self._architecture.pool.attention
        assert attention is not None
        qk = self._values("qk", POOL_ATTENTION)
        if qk is not None:
            self._multiply("pool.query", _scaled(qk, attention, self._scale).reshape(-1), 0)
            if attention.k_norm is not None:
                self.changed["pool.k_norm.mask"] = qk if qk.ndim == 1 else qk.unsqueeze(-2)
        columns = _value_columns(attention, self._values, POOL_ATTENTION)
        if columns is not None:
            self._multiply("pool.out.weight", columns.reshape(-1), -1)
        hidden = self._values("ffn", POOL_FFN)
        if hidden is not None and pool.ffn is not None:
            if pool.ffn.norm is not None:
                self.changed["pool.ffn.norm.mask"] = hidden
            self._multiply("pool.ffn.fc2.weight", hidden, -1)
        if writing is not None:
            if pool.norm is not None:
                self.changed["pool.norm.mask"] = writing
            for leaf in ("out", "ffn.fc2"):
                self._multiply(f"pool.{leaf}.weight", writing, 0)
                self._multiply(f"pool.{leaf}.bias", writing, -1)

    def _multiply(self, name: str, factor: Tensor, axis: int) -> None:
        """Multiply a parameter, if there is one, by factors along one axis."""
        tensor = self.changed.get(name, self._parameters.get(name))
        if tensor is None:
            return
        shape = [1] * tensor.ndim
        shape[axis] = factor.shape[0]
        self.changed[name] = tensor * factor.reshape(shape)


def _scaled(qk: Tensor, core: AttentionSpec, scale: ScaleRule) -> Tensor:
    """(heads, qk) factors on the query columns.

    With "kept" they contain the softmax scale of the kept width, so that it passes gradients
    (L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time").
    """
    each = qk.expand(core.heads, core.qk)
    return (
        each * (math.sqrt(core.qk) / each[0].sum().clamp(min=1e-6).sqrt())
        if scale == "kept"
        else each
    )


def _value_columns(core: AttentionSpec, values: Values, name: str) -> Tensor | None:
    """(heads, v) factors on the inputs of the output projection, or None where all is kept."""
    heads, v = values("head", name), values("v", name)
    if heads is None and v is None:
        return None
    if heads is None:
        return None if v is None else v.expand(core.heads, core.v)
    columns = heads[:, None].expand(core.heads, core.v)
    return columns if v is None else v.expand(core.heads, core.v) * columns


def _embed(values: Values, site: str, indices: tuple[int, ...] | None) -> Tensor | None:
    found = values("embed", site)
    return found if found is None or indices is None else found[list(indices)]
