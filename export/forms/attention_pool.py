"""Attention pooling: one learned query that does not depend on the image.

The query is folded into the keys' weights, and the softmax is applied before the values' weights:
scores x (Wk q), then (softmax x) Wv. No token's key or value is computed unless the keys are
normed. Exact, from the weights of one `compress.network.modules.pool.AttentionPool`, folded in
double precision.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...compress.network.architecture import AttentionSpec, PoolSpec
from .attention_weights import to_float32
from .ffn import ffn
from .form import Form
from .graph import Array, Graph, State, entries_below
from .rows import Linear, Norm, linear, norm


def attention_pool(graph: Graph, form: Form, spec: PoolSpec, state: State, x: str) -> str:
    """Write the pooling of token rows to one row.

    Args:
        graph: Gets the nodes.
        form: Decides the layout of the rows.
        spec: The pooling, with its attention.
        state: Weights of the whole network; those below `pool.` are read.
        x: Rows (tokens, width_in), or with a batch.

    Returns:
        One row (1, width), or (batch, width).
    """
    attention = spec.attention
    assert attention is not None
    weights = entries_below(state, "pool")
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    matrix, plain = form.rows == "matrix", replace(form, rows="matrix")
    # (…, tokens, heads) -> (…, heads, tokens)
    scores = graph.node(
        "Transpose",
        [_scores(graph, form, attention, wide, x)],
        "pool.scores.heads",
        perm=[1, 0] if matrix else [0, 2, 1],
    )
    probabilities = graph.node("Softmax", [scores], "pool.softmax", axis=-1)
    pooled = graph.node("MatMul", [probabilities, x], "pool.tokens")
    heads, v, width_in = attention.heads, attention.v, wide["v.weight"].shape[1]
    values = wide["v.weight"].reshape(heads, v, width_in).transpose(0, 2, 1)
    lead = [] if matrix else [0]
    pooled = graph.reshape(pooled, [*lead, heads, 1, width_in], "pool.split")
    row = graph.product(pooled, to_float32(values), "pool.v.weight", "pool.values")
    row = graph.reshape(row, [1 if matrix else 0, heads * v], "pool.row")
    y = linear(graph, plain, row, _output_projection(wide), "pool.out")
    if spec.ffn is None:
        return y
    hidden = y
    if spec.norm is not None:
        hidden = norm(graph, y, Norm.of(spec.norm, weights, "norm"), "pool.norm")
    hidden, last = ffn(graph, plain, spec.ffn, entries_below(weights, "ffn"), hidden, "pool.ffn")
    hidden = linear(graph, plain, hidden, last, "pool.ffn.out")
    return graph.node("Add", [y, hidden], "pool.residual")


def _output_projection(wide: State) -> Linear:
    """The output projection with v's bias folded in, since the softmax sums to one."""
    weight, bias = wide["out.weight"].T, wide.get("out.bias")
    if "v.bias" in wide:
        shift = wide["v.bias"] @ weight
        bias = shift if bias is None else bias + shift
    return Linear(to_float32(weight), None if bias is None else to_float32(bias))


def _scores(graph: Graph, form: Form, spec: AttentionSpec, wide: State, x: str) -> str:
    """(…, tokens, heads), without what adds the same to all tokens, such as k's bias."""
    heads, qk = spec.heads, spec.qk
    query = wide["query"].reshape(heads, qk) * spec.scale
    keys = wide["k.weight"]
    if spec.k_norm is None:
        folded = np.einsum("hc,hci->ih", query, keys.reshape(heads, qk, -1))
        return graph.product(x, to_float32(folded), "pool.k.weight", "pool.scores")
    bias = wide.get("k.bias")
    layer = Linear(to_float32(keys.T), None if bias is None else to_float32(bias))
    k = linear(graph, form, x, layer, "pool.k")
    lead = [] if form.rows == "matrix" else [0]
    k = graph.reshape(k, [*lead, -1, heads, qk], "pool.k.split")
    k = norm(graph, k, Norm(spec.k_norm), "pool.k_norm")
    weight = wide.get("k_norm.weight")
    query = to_float32(query if weight is None else query * weight)
    if graph.operators == "pnnx":
        return _scores_for_pnnx(graph, spec, query, k, matrix=not lead)
    product = graph.node("Mul", [k, graph.constant("pool.query", query)], "pool.k.product")
    return graph.node("ReduceSum", [product, graph.sizes([-1])], "pool.scores", keepdims=0)


def _scores_for_pnnx(
    graph: Graph, spec: AttentionSpec, query: Array, k: str, *, matrix: bool
) -> str:
    """The same from keys (…, tokens, heads, qk), as one product for each head."""
    heads_first = [1, 0, 2] if matrix else [0, 2, 1, 3]
    keys = graph.node("Transpose", [k], "pool.k.heads", perm=heads_first)
    column = query.reshape(spec.heads, spec.qk, 1)
    scores = graph.product(keys, column, "pool.query", "pool.scores.column")
    scores = graph.reshape(scores, [*([] if matrix else [0]), spec.heads, -1], "pool.scores.rows")
    return graph.node("Transpose", [scores], "pool.scores", perm=[1, 0] if matrix else [0, 2, 1])
