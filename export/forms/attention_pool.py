"""Attention pooling: one learned query that does not depend on the image.

So the query goes into the keys' weights, and the shares are applied before the values' weights:
scores x (Wk q), then (shares x) Wv. No token's key or value is made unless the keys are normed.
Requires the weights of one `compress.vit.pool.AttentionPool`; exact, folded in double precision.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...compress.network.architecture import AttentionSpec, PoolSpec
from .attention_weights import single
from .ffn import ffn
from .form import Form
from .graph import Array, Graph
from .rows import Linear, linear, norm

State = dict[str, Array]


def attention_pool(
    graph: Graph, form: Form, spec: PoolSpec, state: State, x: str, tokens: int
) -> str:
    """(tokens, width_in) -> (1, width), or with a batch."""
    attention = spec.attention
    assert attention is not None
    inner = {
        name.removeprefix("pool."): value
        for name, value in state.items()
        if name.startswith("pool.")
    }
    wide = {name: value.astype(np.float64) for name, value in inner.items()}
    matrix = form.rows == "matrix"
    scores = _scores(graph, form, attention, wide, x)
    # (…, tokens, heads) -> (…, heads, tokens)
    turned = graph.node(
        "Transpose", [scores], "pool.scores.heads", perm=[1, 0] if matrix else [0, 2, 1]
    )
    shares = graph.node("Softmax", [turned], "pool.softmax", axis=-1)
    pooled = graph.node("MatMul", [shares, x], "pool.tokens")
    width_in = wide["v.weight"].shape[1]
    heads, v = attention.heads, attention.v
    values = wide["v.weight"].reshape(heads, v, width_in).transpose(0, 2, 1)
    apart = graph.reshape(pooled, [*([] if matrix else [0]), heads, 1, width_in], "pool.apart")
    mixed = graph.node(
        "MatMul", [apart, graph.constant("pool.v.weight", single(values))], "pool.values"
    )
    row = graph.reshape(mixed, [1 if matrix else 0, heads * v], "pool.row")
    out, shift = wide["out.weight"].T, wide.get("out.bias")
    if "v.bias" in wide:
        moved = wide["v.bias"] @ out
        shift = moved if shift is None else shift + moved
    plain = replace(form, rows="matrix")
    y = linear(
        graph, plain, row, Linear(single(out), None if shift is None else single(shift)), "pool.out"
    )
    if spec.ffn is None:
        return y
    under = {
        name.removeprefix("ffn."): value for name, value in inner.items() if name.startswith("ffn.")
    }
    seen = (
        y
        if spec.norm is None
        else norm(
            graph, y, spec.norm, inner.get("norm.weight"), inner.get("norm.bias"), "pool.norm"
        )
    )
    hidden, last = ffn(graph, plain, spec.ffn, under, seen, "pool.ffn")
    return graph.node(
        "Add", [y, linear(graph, plain, hidden, last, "pool.ffn.out")], "pool.residual"
    )


def _scores(graph: Graph, form: Form, spec: AttentionSpec, wide: State, x: str) -> str:
    """(…, tokens, heads). What adds the same to all tokens, such as k's bias, is left out."""
    heads, qk = spec.heads, spec.qk
    query = wide["query"].reshape(heads, qk) * spec.scale
    keys = wide["k.weight"]
    if spec.k_norm is None:
        folded = np.einsum("hc,hci->ih", query, keys.reshape(heads, qk, -1))
        return graph.node(
            "MatMul", [x, graph.constant("pool.k.weight", single(folded))], "pool.scores"
        )
    bias = wide.get("k.bias")
    k = linear(
        graph, form, x, Linear(single(keys.T), None if bias is None else single(bias)), "pool.k"
    )
    lead = [] if form.rows == "matrix" else [0]
    k = graph.reshape(k, [*lead, -1, heads, qk], "pool.k.split")
    k = norm(graph, k, spec.k_norm, None, None, "pool.k_norm")
    weight = wide.get("k_norm.weight")
    query = query if weight is None else query * weight
    product = graph.node("Mul", [k, graph.constant("pool.query", single(query))], "pool.k.asked")
    return graph.node("ReduceSum", [product, graph.sizes([-1])], "pool.scores", keepdims=0)
