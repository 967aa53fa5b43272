"""Self-attention in four forms.

Requires: the weights of one `compress.vit.attention.Attention`. Ensures the same function with fewer operations:
the softmax scale is folded into q's weights and bias (when no norm follows q); k's bias is left out, since it adds the same to all scores of a
query, and softmax does not see that (when no norm follows k); v's bias is folded into the output's, since attention rows sum to one (when no norm
follows the heads). All three are exact.
"""

from __future__ import annotations

import numpy as np

from ...compress.architecture import AttentionSpec, NormSpec
from .form import Form
from .graph import Array, Graph
from .rows import RUNTIME, Linear, linear, norm

State = dict[str, Array]


def attention(graph: Graph, form: Form, spec: AttentionSpec, state: State, x: str, asking: str, name: str) -> tuple[str, Linear]:
    """Mixed values, one row a query, before the output projection, and that projection. `x`: all tokens; `asking`: those that ask."""
    q, k, v, out = fold(spec, state)
    norms = spec.q_norm is not None or spec.k_norm is not None
    if form.attention == "runtime" and form.rows == "batch" and not norms:
        mixed = _runtime(graph, spec, x, asking, q, k, v, name)
    elif form.attention == "opset23" and form.rows == "matrix" and not norms:
        mixed = _standard(graph, form, spec, x, asking, (q, k, v), name)
    else:
        mixed = _products(graph, form, spec, state, x, asking, (q, k, v), name)
    if spec.out_norm is not None:
        mixed = norm(graph, mixed, spec.out_norm, state.get("out_norm.weight"), state.get("out_norm.bias"), f"{name}.out_norm")
    return mixed, out


def fold(spec: AttentionSpec, state: State) -> tuple[Linear, Linear, Linear, Linear]:
    """q, k, v and the output projection with scale and biases folded, in double precision."""
    weights = {part: state[f"{part}.weight"].astype(np.float64).T for part in ("q", "k", "v", "out")}
    biases = {part: state[f"{part}.bias"].astype(np.float64) if f"{part}.bias" in state else None for part in ("q", "k", "v", "out")}
    if spec.q_norm is None:
        weights["q"] = weights["q"] * spec.scale
        biases["q"] = None if biases["q"] is None else biases["q"] * spec.scale
    if spec.k_norm is None:
        biases["k"] = None
    if spec.out_norm is None and biases["v"] is not None:
        shift = biases["v"] @ weights["out"]
        biases["out"] = shift if biases["out"] is None else biases["out"] + shift
        biases["v"] = None
    made = [Linear(_single(weights[part]), None if (bias := biases[part]) is None else _single(bias)) for part in ("q", "k", "v", "out")]
    return made[0], made[1], made[2], made[3]


def _products(
    graph: Graph, form: Form, spec: AttentionSpec, state: State, x: str, asking: str, parts: tuple[Linear, Linear, Linear], name: str
) -> str:
    q, k, v = _projected(graph, form, spec, x, asking, parts, name)
    heads_first = [1, 0, 2] if form.rows == "matrix" else [0, 2, 1, 3]
    keys_last = [1, 2, 0] if form.rows == "matrix" else [0, 2, 3, 1]
    q = str(graph.node("Transpose", [q], f"{name}.q.heads", perm=heads_first))
    v = str(graph.node("Transpose", [v], f"{name}.v.heads", perm=heads_first))
    if spec.q_norm is not None:
        q = _head_norm(graph, q, spec.q_norm, state, "q_norm", spec, name)
        # The norm stands between the projection and the scale, so the scale stays a node of its own.
        q = str(graph.node("Mul", [q, graph.constant(f"{name}.scale", np.array(spec.scale, np.float32))], f"{name}.q.scaled"))
    standard = form.attention == "opset23" and form.rows == "batch"
    if spec.k_norm is not None or standard:
        k = str(graph.node("Transpose", [k], f"{name}.k.heads", perm=heads_first))
        if spec.k_norm is not None:
            k = _head_norm(graph, k, spec.k_norm, state, "k_norm", spec, name)
        if not standard:
            k = str(graph.node("Transpose", [k], f"{name}.k.last", perm=[0, 2, 1] if form.rows == "matrix" else [0, 1, 3, 2]))
    else:
        k = str(graph.node("Transpose", [k], f"{name}.k.last", perm=keys_last))
    if standard:
        mixed = str(graph.node("Attention", [q, k, v], f"{name}.mix", scale=1.0))
    else:
        scores = graph.node("MatMul", [q, k], f"{name}.scores")
        shares = graph.node("Softmax", [scores], f"{name}.softmax", axis=-1)
        mixed = str(graph.node("MatMul", [shares, v], f"{name}.mix"))
    mixed = str(graph.node("Transpose", [mixed], f"{name}.mix.tokens", perm=heads_first))
    width = spec.heads * spec.v
    return str(graph.node("Reshape", [mixed, graph.sizes([-1, width] if form.rows == "matrix" else [0, -1, width])], f"{name}.mix.rows"))


def _projected(
    graph: Graph, form: Form, spec: AttentionSpec, x: str, asking: str, parts: tuple[Linear, Linear, Linear], name: str
) -> tuple[str, str, str]:
    """q, k, v of shape (…, tokens, heads, width)."""
    lead = [-1] if form.rows == "matrix" else [0, -1]
    widths = (spec.qk, spec.qk, spec.v)
    if form.attention == "fused-qkv" and x == asking:
        joined = np.concatenate([part.weight for part in parts], axis=1)
        biases = [np.zeros(part.weight.shape[1], np.float32) if part.bias is None else part.bias for part in parts]
        bias = None if all(part.bias is None for part in parts) else np.concatenate(biases)
        together = linear(graph, form, x, Linear(joined, bias), f"{name}.qkv")
        sections = graph.sizes([spec.heads * width for width in widths])
        pieces = graph.node("Split", [together, sections], f"{name}.qkv.split", outputs=3, axis=-1)
    else:
        sources = (asking, x, x)
        pieces = [
            linear(graph, form, source, part, f"{name}.{label}") for source, part, label in zip(sources, parts, ("q", "k", "v"), strict=True)
        ]
    shaped = [
        str(graph.node("Reshape", [piece, graph.sizes([*lead, spec.heads, width])], f"{name}.{label}.split"))
        for piece, width, label in zip(pieces, widths, ("q", "k", "v"), strict=True)
    ]
    return shaped[0], shaped[1], shaped[2]


def _runtime(graph: Graph, spec: AttentionSpec, x: str, asking: str, q: Linear, k: Linear, v: Linear, name: str) -> str:
    rows = [
        str(graph.node("MatMul", [source, graph.constant(f"{name}.{label}.weight", part.weight)], f"{name}.{label}"))
        for source, part, label in ((asking, q, "q"), (x, k, "k"), (x, v, "v"))
    ]
    bias = [np.zeros(part.weight.shape[1], np.float32) if part.bias is None else part.bias for part in (q, k, v)]
    if any(part.bias is not None for part in (q, k, v)):
        rows.append(graph.constant(f"{name}.qkv.bias", np.concatenate(bias)))
    return str(graph.node("MultiHeadAttention", rows, f"{name}.mix", domain=RUNTIME, num_heads=spec.heads, scale=1.0))


def _standard(graph: Graph, form: Form, spec: AttentionSpec, x: str, asking: str, parts: tuple[Linear, Linear, Linear], name: str) -> str:
    """The standard's Attention takes (batch, tokens, heads * width) and needs no transposes."""
    rows = []
    for source, part, label, width in zip((asking, x, x), parts, ("q", "k", "v"), (spec.qk, spec.qk, spec.v), strict=True):
        y = linear(graph, form, source, part, f"{name}.{label}")
        rows.append(graph.node("Reshape", [y, graph.sizes([1, -1, spec.heads * width])], f"{name}.{label}.one"))
    mixed = graph.node("Attention", rows, f"{name}.mix", q_num_heads=spec.heads, kv_num_heads=spec.heads, scale=1.0)
    return str(graph.node("Reshape", [mixed, graph.sizes([-1, spec.heads * spec.v])], f"{name}.mix.rows"))


def _head_norm(graph: Graph, x: str, norm_spec: NormSpec, state: State, part: str, spec: AttentionSpec, name: str) -> str:
    weight, bias = state.get(f"{part}.weight"), state.get(f"{part}.bias")
    if not spec.qk_norm_per_head:
        return norm(graph, x, norm_spec, weight, bias, f"{name}.{part}")
    # One weight a head: (heads, width) meets (…, heads, tokens, width).
    plain = norm(graph, x, norm_spec, None, None, f"{name}.{part}")
    if weight is not None:
        plain = str(graph.node("Mul", [plain, graph.constant(f"{name}.{part}.weight", weight[:, None, :])], f"{name}.{part}.scaled"))
    if bias is not None:
        plain = str(graph.node("Add", [plain, graph.constant(f"{name}.{part}.bias", bias[:, None, :])], f"{name}.{part}.biased"))
    return plain


def _single(value: Array) -> Array:
    return np.ascontiguousarray(value.astype(np.float32))
