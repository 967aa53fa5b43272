"""The weights of one `compress.vit.attention.Attention`, folded: the same function with fewer and
cheaper operations.

Exact, and computed in double precision:

- the columns of rope's pairs are put in halves, in q and k alike, since a product does not see the
  order of its columns;
- the softmax scale goes into q's weights, or into its norm's;
- what adds the same to all scores of a query is left out, since softmax does not see it: k's bias,
  or its norm's (unless rope turns them);
- the gain of differential attention goes into the heads' norm or into v; λ is a number;
- v's bias goes into the output's bias, since attention rows sum to one (to 1 - λ when
  differential), and the weights and biases of the norms
  after the heads go into the output projection, unless a norm or a gate stands between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...compress.network.architecture import AttentionSpec, NormSpec
from .graph import Array
from .rows import Linear

State = dict[str, Array]


@dataclass(frozen=True)
class NormWeights:
    """A norm and its weights, (width,) or (heads, width), or None."""

    spec: NormSpec
    weight: Array | None
    bias: Array | None


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of shape (in, heads * width), norms, and what is added to or multiplied with
    scores.

    cosine, sine: (tokens, heads or 1, qk) for halves, the sine with its sign, or None without rope.
    table: (heads, offsets), or None without relative bias. kv_of: the key/value head of each head.
    second: λ, or None without differential attention; then the first maps of all heads come before
    the second ones in q, k and table.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    gate: Linear | None
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    head_norm: NormWeights | None
    out_norm: NormWeights | None
    cosine: Array | None
    sine: Array | None
    table: Array | None
    kv_of: tuple[int, ...]
    second: float | None


def fold(spec: AttentionSpec, state: State) -> AttentionWeights:
    """The folded weights of an attention core whose state is `state`."""
    wide = {name: value.astype(np.float64) for name, value in state.items()}
    weight = {
        part: wide[f"{part}.weight"].T
        for part in ("q", "k", "v", "out", *(["gate"] if spec.gated else []))
    }
    bias = {part: wide.get(f"{part}.bias") for part in weight}
    norms = {name: _norm(wide, name, part) for name, part in _norms(spec).items()}
    if spec.rope is not None and spec.rope.layout == "interleaved":
        halves = np.concatenate([np.arange(0, spec.qk, 2), np.arange(1, spec.qk, 2)])
        for part, heads in (("q", spec.heads), ("k", spec.kv_heads)):
            _reorder(
                weight,
                bias,
                norms,
                part,
                (np.arange(heads)[:, None] * spec.qk + halves).ravel(),
                norm_columns=halves,
            )
    second = _second(spec, wide)
    if second is not None:
        # (head, map) -> (map, head)
        order = np.arange(2 * spec.heads).reshape(spec.heads, 2).T.ravel()
        for part in ("q", "k"):
            _reorder(
                weight,
                bias,
                norms,
                part,
                (order[:, None] * spec.qk + np.arange(spec.qk)).ravel(),
                norm_rows=order,
            )
    if "q_norm" in norms:
        norms["q_norm"] = _scaled(norms["q_norm"], spec.scale)
    else:
        weight["q"], bias["q"] = weight["q"] * spec.scale, _times(bias["q"], spec.scale)
    if spec.rope is None:
        if "k_norm" in norms:
            norms["k_norm"] = replace(norms["k_norm"], bias=None)
        else:
            bias["k"] = None
    kv_of = tuple(range(spec.heads)) if spec.kv_of is None else spec.kv_of
    if spec.differential is not None:
        gain = 1.0 - spec.differential.start
        if "head_norm" in norms:
            norms["head_norm"] = _scaled(norms["head_norm"], gain)
        else:
            weight["v"], bias["v"] = weight["v"] * gain, _times(bias["v"], gain)
    if (
        "head_norm" not in norms
        and "out_norm" not in norms
        and not spec.gated
        and bias["v"] is not None
    ):
        mixed = bias["v"].reshape(spec.kv_heads, spec.v)[list(kv_of)].ravel() * (
            1.0 if second is None else 1.0 - second
        )
        bias["out"], bias["v"] = _plus(bias["out"], mixed @ weight["out"]), None
    last = "out_norm" if "out_norm" in norms else "head_norm"
    if last in norms and not spec.gated:
        _into_output(weight, bias, norms, last, spec.heads)
    cosine, sine = _turns(spec, wide)
    made = {
        part: Linear(single(weight[part]), None if (shift := bias[part]) is None else single(shift))
        for part in weight
    }
    kept = {
        name: _single_norm(norms.get(name))
        for name in ("q_norm", "k_norm", "head_norm", "out_norm")
    }
    return AttentionWeights(
        q=made["q"],
        k=made["k"],
        v=made["v"],
        out=made["out"],
        gate=made.get("gate"),
        q_norm=kept["q_norm"],
        k_norm=kept["k_norm"],
        head_norm=kept["head_norm"],
        out_norm=kept["out_norm"],
        cosine=cosine,
        sine=sine,
        table=_table(spec, wide),
        kv_of=kv_of,
        second=second,
    )


def apart(spec: AttentionSpec, state: State) -> tuple[AttentionSpec, State]:
    """Heads that share keys, but turn them by tables of their own, have nothing to share: each gets
    its copy.
    """
    if spec.kv_of is None or spec.rope is None or not spec.rope.per_head:
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


def single(value: Array) -> Array:
    """In single precision and in one piece."""
    return np.ascontiguousarray(value.astype(np.float32))


def _norms(spec: AttentionSpec) -> dict[str, NormSpec]:
    found = {
        "q_norm": spec.q_norm,
        "k_norm": spec.k_norm,
        "head_norm": spec.head_norm,
        "out_norm": spec.out_norm,
    }
    return {name: part for name, part in found.items() if part is not None}


def _norm(wide: State, name: str, spec: NormSpec) -> NormWeights:
    return NormWeights(spec, wide.get(f"{name}.weight"), wide.get(f"{name}.bias"))


def _single_norm(norm: NormWeights | None) -> NormWeights | None:
    if norm is None:
        return None
    return NormWeights(
        norm.spec,
        None if norm.weight is None else single(norm.weight),
        None if norm.bias is None else single(norm.bias),
    )


def _scaled(norm: NormWeights, factor: float) -> NormWeights:
    weight = np.ones(norm.spec.width) if norm.weight is None else norm.weight
    return replace(norm, weight=weight * factor, bias=_times(norm.bias, factor))


def _times(value: Array | None, factor: float) -> Array | None:
    return None if value is None else value * factor


def _plus(value: Array | None, shift: Array) -> Array:
    return shift if value is None else value + shift


def _reorder(
    weight: State,
    bias: dict[str, Array | None],
    norms: dict[str, NormWeights],
    part: str,
    columns: Array,
    *,
    norm_columns: Array | None = None,
    norm_rows: Array | None = None,
) -> None:
    weight[part] = weight[part][:, columns]
    shift = bias[part]
    bias[part] = None if shift is None else shift[columns]
    norm = norms.get(f"{part}_norm")
    if norm is None:
        return

    def moved(value: Array | None) -> Array | None:
        if value is not None and norm_columns is not None:
            value = value[..., norm_columns]
        return (
            value[norm_rows]
            if value is not None and norm_rows is not None and value.ndim == 2
            else value
        )

    norms[f"{part}_norm"] = replace(norm, weight=moved(norm.weight), bias=moved(norm.bias))


def _into_output(
    weight: State,
    bias: dict[str, Array | None],
    norms: dict[str, NormWeights],
    name: str,
    heads: int,
) -> None:
    norm = norms[name]

    def rows(value: Array) -> Array:
        if name == "out_norm":
            return value
        return value.ravel() if value.ndim == 2 else np.tile(value, heads)

    if norm.bias is not None:
        bias["out"] = _plus(bias["out"], rows(norm.bias) @ weight["out"])
    if norm.weight is not None:
        weight["out"] = weight["out"] * rows(norm.weight)[:, None]
    norms[name] = replace(norm, weight=None, bias=None)


def _second(spec: AttentionSpec, wide: State) -> float | None:
    """λ of Ye et al. 2024, eq. 2."""
    if spec.differential is None:
        return None
    vectors = wide["differential.vectors"]
    exponents = vectors if spec.differential.dual else (vectors[0::2] * vectors[1::2]).sum(axis=-1)
    first, second = np.exp(exponents)
    return float(first - second + spec.differential.start)


def _turns(spec: AttentionSpec, wide: State) -> tuple[Array | None, Array | None]:
    if spec.rope is None:
        return None, None
    # (heads or 1, 2, patches, pairs) -> two of (patches, heads or 1, pairs); prefix tokens turn by
    # nothing.
    cosine, sine = wide["rope.table"].transpose(1, 2, 0, 3)
    still = ((spec.rope.prefix, 0), (0, 0), (0, 0))
    cosine, sine = np.pad(cosine, still, constant_values=1.0), np.pad(sine, still)
    return single(np.concatenate([cosine, cosine], axis=-1)), single(
        np.concatenate([-sine, sine], axis=-1)
    )


def _table(spec: AttentionSpec, wide: State) -> Array | None:
    if spec.bias is None:
        return None
    table = wide["bias.table"].T
    if spec.bias.prefix and not spec.bias.prefix_rows:
        # One more offset, for whatever meets a prefix token.
        table = np.pad(table, ((0, 0), (0, 1)))
    return single(np.concatenate([table, table]) if spec.differential is not None else table)
