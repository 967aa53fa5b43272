"""Folded weights of one attention: the same function with fewer and cheaper operations.

Exact, and computed in double precision from the weights of one
`compress.network.modules.attention.Attention`:

1. The columns of rope's pairs are split in halves in both q and k, since a product does not depend
   on the order of its columns.
2. The softmax scale is folded into q's weights, or into its norm's.
3. What adds the same to all scores of a query is left out, since softmax is invariant to it: k's
   bias, or its norm's (unless rope rotates them).
4. The gain of differential attention is folded into the heads' norm or into v; λ is a number.
5. v's bias is folded into the output's bias, since the softmax sums to one (to 1 - λ when
   differential).
6. The weights and biases of the norms after the heads are folded into the output projection, unless
   there is a norm or a gate between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ...compress.network.architecture import AttentionSpec
from .graph import Array, State
from .rows import Linear, Norm

NORMS = ("q_norm", "k_norm", "head_norm", "out_norm")


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of shape (in, heads * width), norms, and terms of the scores.

    Attributes:
        cosine: (tokens, heads or 1, qk) for rope in halves, or None without rope.
        sine: The same for the sine, with its sign.
        table: Relative bias (heads, offsets), or None.
        kv_of: The key/value head of each head.
        lambda_: λ of differential attention, or None; with it, the first maps of all heads come
            before the second ones in q, k and table.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    gate: Linear | None
    q_norm: Norm | None
    k_norm: Norm | None
    head_norm: Norm | None
    out_norm: Norm | None
    cosine: Array | None
    sine: Array | None
    table: Array | None
    kv_of: tuple[int, ...]
    lambda_: float | None


def fold(spec: AttentionSpec, state: State) -> AttentionWeights:
    """Return the folded weights of an attention whose weights are `state`."""
    wide = {name: value.astype(np.float64) for name, value in state.items()}
    folding = _Folding(spec, wide)
    lambda_ = _lambda(spec, wide)
    folding.split_pairs_in_halves()
    if lambda_ is not None:
        folding.move_first_maps_to_front()
    folding.fold_scale()
    folding.drop_key_bias()
    folding.fold_gain()
    folding.fold_value_bias(1.0 if lambda_ is None else 1.0 - lambda_)
    folding.fold_output_norm()
    cosine, sine = _rotations(spec, wide)
    linears, norms = folding.linears(), folding.float32_norms()
    return AttentionWeights(
        q=linears["q"],
        k=linears["k"],
        v=linears["v"],
        out=linears["out"],
        gate=linears.get("gate"),
        q_norm=norms["q_norm"],
        k_norm=norms["k_norm"],
        head_norm=norms["head_norm"],
        out_norm=norms["out_norm"],
        cosine=cosine,
        sine=sine,
        table=_table(spec, wide),
        kv_of=folding.kv_of,
        lambda_=lambda_,
    )


def ungroup(
    spec: AttentionSpec, state: State, *, always: bool = False
) -> tuple[AttentionSpec, State]:
    """Copy shared keys and values for each head where rope has a table for each head, or `always`.

    Heads that rotate their keys differently cannot share them; other attentions stay unchanged.
    """
    per_head = always or (spec.rope is not None and spec.rope.per_head)
    if spec.kv_of is None or not per_head:
        return spec, state
    copied, kv_of = dict(state), list(spec.kv_of)
    for part, width in (("k", spec.qk), ("v", spec.v)):
        columns = (np.array(kv_of)[:, None] * width + np.arange(width)).ravel()
        for leaf in (f"{part}.weight", f"{part}.bias"):
            if leaf in copied:
                copied[leaf] = copied[leaf][columns]
    for leaf in ("k_norm.weight", "k_norm.bias"):
        if leaf in copied and copied[leaf].ndim == 2:
            copied[leaf] = copied[leaf][kv_of]
    return spec.model_copy(update={"kv_of": None}), copied


def to_float32(value: Array) -> Array:
    """Return a contiguous copy in single precision."""
    return np.ascontiguousarray(value.astype(np.float32))


class _Folding:
    """The weights of one attention while they are folded, in double precision."""

    def __init__(self, spec: AttentionSpec, wide: State) -> None:
        self.spec = spec
        parts = ("q", "k", "v", "out", *(["gate"] if spec.gated else []))
        self.weight = {part: wide[f"{part}.weight"].T for part in parts}
        self.bias = {part: wide.get(f"{part}.bias") for part in parts}
        specs = {name: getattr(spec, name) for name in NORMS}
        self.norms = {
            name: Norm.of(norm, wide, name) for name, norm in specs.items() if norm is not None
        }
        self.kv_of = tuple(range(spec.heads)) if spec.kv_of is None else spec.kv_of

    def split_pairs_in_halves(self) -> None:
        """Case 1."""
        spec = self.spec
        if spec.rope is None or spec.rope.layout != "interleaved":
            return
        halves = np.concatenate([np.arange(0, spec.qk, 2), np.arange(1, spec.qk, 2)])
        for part, heads in (("q", spec.heads), ("k", spec.kv_heads)):
            self._reorder(part, (np.arange(heads)[:, None] * spec.qk + halves).ravel())
            name = f"{part}_norm"
            if name in self.norms:
                self.norms[name] = _map_arrays(self.norms[name], lambda value: value[..., halves])

    def move_first_maps_to_front(self) -> None:
        """Reorder q and k of differential attention: (head, map) -> (map, head)."""
        spec = self.spec
        order = np.arange(2 * spec.heads).reshape(spec.heads, 2).T.ravel()
        for part in ("q", "k"):
            self._reorder(part, (order[:, None] * spec.qk + np.arange(spec.qk)).ravel())
            name = f"{part}_norm"
            if name in self.norms:
                self.norms[name] = _map_arrays(
                    self.norms[name], lambda value: value[order] if value.ndim == 2 else value
                )

    def fold_scale(self) -> None:
        """Case 2."""
        self._scale("q_norm", "q", self.spec.scale)

    def drop_key_bias(self) -> None:
        """Case 3."""
        if self.spec.rope is not None:
            return
        if "k_norm" in self.norms:
            self.norms["k_norm"] = replace(self.norms["k_norm"], bias=None)
        else:
            self.bias["k"] = None

    def fold_gain(self) -> None:
        """Case 4."""
        if self.spec.differential is not None:
            self._scale("head_norm", "v", 1.0 - self.spec.differential.start)

    def fold_value_bias(self, probability_sum: float) -> None:
        """Case 5."""
        spec, value_bias = self.spec, self.bias["v"]
        if "head_norm" in self.norms or "out_norm" in self.norms or spec.gated:
            return
        if value_bias is None:
            return
        output = value_bias.reshape(spec.kv_heads, spec.v)[list(self.kv_of)].ravel()
        output = output * probability_sum
        self.bias["out"] = _plus(self.bias["out"], output @ self.weight["out"])
        self.bias["v"] = None

    def fold_output_norm(self) -> None:
        """Case 6."""
        name = "out_norm" if "out_norm" in self.norms else "head_norm"
        if name not in self.norms or self.spec.gated:
            return
        norm = self.norms[name]

        def row(value: Array) -> Array:
            if name == "out_norm":
                return value
            return value.ravel() if value.ndim == 2 else np.tile(value, self.spec.heads)

        if norm.bias is not None:
            self.bias["out"] = _plus(self.bias["out"], row(norm.bias) @ self.weight["out"])
        if norm.weight is not None:
            self.weight["out"] = self.weight["out"] * row(norm.weight)[:, None]
        self.norms[name] = Norm(norm.spec)

    def linears(self) -> dict[str, Linear]:
        """Return the projections in single precision."""
        return {
            part: Linear(
                to_float32(weight), None if (bias := self.bias[part]) is None else to_float32(bias)
            )
            for part, weight in self.weight.items()
        }

    def float32_norms(self) -> dict[str, Norm | None]:
        """Return the norms in single precision, None for those that are absent."""
        return {
            name: _map_arrays(self.norms[name], to_float32) if name in self.norms else None
            for name in NORMS
        }

    def _reorder(self, part: str, columns: Array) -> None:
        self.weight[part] = self.weight[part][:, columns]
        bias = self.bias[part]
        self.bias[part] = None if bias is None else bias[columns]

    def _scale(self, norm_name: str, part: str, factor: float) -> None:
        """Multiply a norm's weights, or where there is none the projection's."""
        norm = self.norms.get(norm_name)
        if norm is None:
            self.weight[part] = self.weight[part] * factor
            bias = self.bias[part]
            self.bias[part] = None if bias is None else bias * factor
            return
        weight = np.ones(norm.spec.width) if norm.weight is None else norm.weight
        bias = None if norm.bias is None else norm.bias * factor
        self.norms[norm_name] = Norm(norm.spec, weight * factor, bias)


def _map_arrays(norm: Norm, change: Callable[[Array], Array]) -> Norm:
    return Norm(
        norm.spec,
        None if norm.weight is None else change(norm.weight),
        None if norm.bias is None else change(norm.bias),
    )


def _plus(value: Array | None, shift: Array) -> Array:
    return shift if value is None else value + shift


def _lambda(spec: AttentionSpec, wide: State) -> float | None:
    """λ of Ye et al. 2024, "Differential Transformer", eq. 2."""
    if spec.differential is None:
        return None
    vectors = wide["differential.vectors"]
    exponents = vectors if spec.differential.dual else (vectors[0::2] * vectors[1::2]).sum(axis=-1)
    first, second = np.exp(exponents)
    return float(first - second + spec.differential.start)


def _rotations(spec: AttentionSpec, wide: State) -> tuple[Array | None, Array | None]:
    if spec.rope is None:
        return None, None
    # (heads or 1, 2, patches, pairs) -> two of (patches, heads or 1, pairs); prefix tokens are not
    # rotated.
    cosine, sine = wide["rope.table"].transpose(1, 2, 0, 3)
    prefix = ((spec.rope.prefix, 0), (0, 0), (0, 0))
    cosine, sine = np.pad(cosine, prefix, constant_values=1.0), np.pad(sine, prefix)
    return (
        to_float32(np.concatenate([cosine, cosine], axis=-1)),
        to_float32(np.concatenate([-sine, sine], axis=-1)),
    )


def _table(spec: AttentionSpec, wide: State) -> Array | None:
    if spec.bias is None:
        return None
    table = wide["bias.table"].T
    if spec.bias.learned and not spec.bias.prefix_rows:
        # One more offset, zero, for every pair with a learned token.
        table = np.pad(table, ((0, 0), (0, 1)))
    return to_float32(np.concatenate([table, table]) if spec.differential is not None else table)
