"""Self-attention in five forms, from the folded weights of `attention_weights.py`.

Heads that share keys and values (grouped queries) are written as more queries of one head where
the groups are equal and in order; elsewhere keys and values are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...compress.network.architecture import AttentionSpec
from .attention_inputs import AttentionRows, AttentionWriter, joined_bias
from .attention_weights import AttentionWeights, fold, ungroup
from .form import Form
from .graph import RUNTIME, Array, Graph, State
from .rows import Linear, Norm, first_tokens, norm


@dataclass(frozen=True)
class AttentionMaps:
    """What an attention has computed, for a selection that scores patches by it.

    Attributes:
        weights: The softmax: (…, heads, queries, tokens), or the queries of a group one after the
            other.
        values: (…, tokens, heads of values, width).
        bias: What `values` lack, flat; None where they are complete.
        gain: What `values` were multiplied with.
    """

    weights: str
    values: str
    bias: Array | None
    gain: float


class Attended(NamedTuple):
    """The heads' outputs, the output projection that is still to be applied, and the maps."""

    rows: str
    out: Linear
    maps: AttentionMaps | None


def attention(
    graph: Graph,
    form: Form,
    spec: AttentionSpec,
    state: State,
    rows: AttentionRows,
    name: str,
    *,
    keep_maps: bool = False,
) -> Attended:
    """Write one attention up to its output projection.

    Args:
        graph: Gets the nodes.
        form: Decides how the attention is written, among the ways that cover `spec`.
        spec: The attention.
        state: Its weights.
        rows: The rows it reads.
        name: Prefix of the node names.
        keep_maps: Write it as products, whose softmax a selection can read.

    Returns:
        The heads' outputs, one row (heads * v) for each query; the output projection; and the maps
        where they are kept.
    """
    # pnnx does not convert the Gather that copies keys to the heads of unequal groups.
    copied = graph.operators == "pnnx" and spec.kv_of is not None and _group_size(spec) is None
    spec, state = ungroup(spec, state, always=copied)
    weights = fold(spec, state)
    writer = AttentionWriter(graph, form, spec, weights, rows, name)
    maps = None
    if keep_maps:
        output, softmax, values = _products(writer)
        maps = _maps(spec, state, weights, softmax, values)
    elif form.last_keys and _bilinear(writer) and _cheaper_without_keys(writer):
        output = _without_keys(writer)
    elif (
        form.attention == "runtime"
        and form.rows == "batch"
        and spec.kv_of is None
        and weights.lambda_ is None
    ):
        output = _runtime_operator(writer)
    elif form.attention == "opset23" and weights.lambda_ is None and _group_size(spec) is not None:
        output = _standard_operator(writer)
    else:
        output, _, _ = _products(writer)
    output = _output_head_norm(writer, weights.head_norm, output)
    if weights.out_norm is not None:
        output = norm(graph, output, weights.out_norm, f"{name}.out_norm")
    if weights.gate is not None:
        gate = writer.linear(rows.queries, weights.gate, "gate")
        output = writer.node(
            "Mul", [output, writer.node("Sigmoid", [gate], "gate.sigmoid")], "gated"
        )
    return Attended(output, weights.out, maps)


def _maps(
    spec: AttentionSpec, state: State, weights: AttentionWeights, softmax: str, values: str
) -> AttentionMaps:
    """Describe maps, and how the folded values differ from those of the model."""
    bias = state.get("v.bias") if weights.v.bias is None else None
    gain = 1.0
    if spec.differential is not None and spec.head_norm is None:
        gain -= spec.differential.start
    return AttentionMaps(softmax, values, bias, gain)


def _group_size(spec: AttentionSpec) -> int | None:
    """Return the heads of each key/value head, or None where groups are unequal or out of order."""
    size = spec.heads // spec.kv_heads
    in_order = tuple(head // size for head in range(spec.heads))
    return size if spec.kv_of is None or spec.kv_of == in_order else None


def _products(writer: AttentionWriter) -> tuple[str, str, str]:
    """softmax(q kᵀ + bias) v as products, with a Transpose of each input.

    Returns:
        The outputs, the softmax, and the values before their Transpose.
    """
    spec, weights, graph = writer.spec, writer.weights, writer.graph
    heads_axis = 0 if writer.matrix else 1
    q, k, values = writer.projections()
    q = writer.transpose_heads(q, "q.heads")
    k = writer.node("Transpose", [k], "k.last", perm=[1, 2, 0] if writer.matrix else [0, 2, 3, 1])
    v = writer.transpose_heads(values, "v.heads")
    bias = writer.relative_bias()
    grouped = spec.kv_of is not None and _group_size(spec) is not None
    if grouped:
        q = writer.reshape(q, [spec.kv_heads, -1, spec.qk], "q.grouped")
        if bias is not None:
            shape = [spec.kv_heads, -1, writer.rows.tokens]
            bias = writer.reshape_bias(bias, shape, "bias.grouped")
    elif spec.kv_of is not None:
        heads = graph.sizes(spec.kv_of)
        k = writer.node("Gather", [k, heads], "k.each", axis=heads_axis)
        v = writer.node("Gather", [v, heads], "v.each", axis=heads_axis)
    softmax = _softmax(writer, writer.node("MatMul", [q, k], "scores"), bias)
    probabilities = softmax
    if weights.lambda_ is not None:
        first, second = graph.node_outputs(
            "Split", [probabilities], f"{writer.name}.maps", 2, axis=heads_axis, num_outputs=2
        )
        factor = graph.scalar(f"{writer.name}.lambda", weights.lambda_)
        second = writer.node("Mul", [second, factor], "second")
        probabilities = writer.node("Sub", [first, second], "difference")
    output = writer.node("MatMul", [probabilities, v], "mix")
    if grouped:
        output = writer.reshape(output, [spec.heads, -1, spec.v], "mix.heads")
    return _merge_heads(writer, output), softmax, values


def _merge_heads(writer: AttentionWriter, output: str) -> str:
    """(…, heads, queries, v) -> (…, queries, heads * v)."""
    output = writer.transpose_heads(output, "mix.tokens")
    return writer.reshape(output, [-1, writer.spec.heads * writer.spec.v], "mix.rows")


def _softmax(writer: AttentionWriter, scores: str, bias: str | None) -> str:
    if bias is not None:
        scores = writer.node("Add", [scores, bias], "scores.biased")
    return writer.node("Softmax", [scores], "softmax", axis=-1)


def _standard_operator(writer: AttentionWriter) -> str:
    """The standard's Attention, which takes (batch, tokens, heads * width) and no transposes."""
    spec, graph = writer.spec, writer.graph
    if writer.plain:
        inputs = [writer.linear(x, layer, label) for x, layer, label in writer.sources]
        if writer.matrix:
            inputs = [
                graph.reshape(y, [1, -1, layer.weight.shape[1]], f"{writer.name}.{label}.flat")
                for y, (_, layer, label) in zip(inputs, writer.sources, strict=True)
            ]
    else:
        inputs = writer.flat_projections()
    bias = writer.batched_bias()
    if bias is not None:
        inputs.append(bias)
    heads = {"q_num_heads": spec.heads, "kv_num_heads": spec.kv_heads}
    output = writer.node("Attention", inputs, "mix", **heads, scale=1.0)
    if not writer.matrix:
        return output
    return graph.reshape(output, [-1, spec.heads * spec.v], f"{writer.name}.mix.rows")


def _runtime_operator(writer: AttentionWriter) -> str:
    """ONNX Runtime's MultiHeadAttention, which adds the biases of all three projections."""
    spec, graph, sources = writer.spec, writer.graph, writer.sources
    bias = ""
    if not writer.plain:
        inputs = writer.flat_projections()
    elif graph.linears != "gemm":
        # Eight-bit products add the bias themselves.
        inputs = [writer.linear(x, layer, label) for x, layer, label in sources]
    else:
        inputs = [
            writer.node(
                "MatMul", [x, graph.constant(f"{writer.name}.{label}.weight", layer.weight)], label
            )
            for x, layer, label in sources
        ]
        if any(layer.bias is not None for _, layer, _ in sources):
            joined = joined_bias([layer for _, layer, _ in sources])
            bias = graph.constant(f"{writer.name}.qkv.bias", joined)
    relative = writer.batched_bias()
    if relative is not None:
        inputs += [bias, "", relative]
    elif bias:
        inputs.append(bias)
    return writer.node(
        "MultiHeadAttention", inputs, "mix", domain=RUNTIME, num_heads=spec.heads, scale=1.0
    )


def _bilinear(writer: AttentionWriter) -> bool:
    """Whether scores are bilinear in query rows and rows of x.

    In eight bits, the products over qk columns are the cheap ones, so they stay.
    """
    return (
        writer.graph.linears == "gemm"
        and writer.spec.k_norm is None
        and writer.spec.rope is None
        and writer.weights.lambda_ is None
    )


def _cheaper_without_keys(writer: AttentionWriter) -> bool:
    """Whether few queries are multiplied with the rows of x in fewer multiply-adds."""
    rows, spec = writer.rows, writer.spec
    if rows.query_count is None:
        return False
    width, pair = len(writer.weights.k.weight), spec.qk + spec.v
    without = rows.query_count * spec.heads * width * (pair + 2 * rows.tokens)
    projections = rows.tokens * width * spec.kv_heads * pair
    return without < projections + rows.query_count * rows.tokens * spec.heads * pair


def _without_keys(writer: AttentionWriter) -> str:
    """Few queries: scores (q Wkᵀ) xᵀ and outputs (softmax x) Wv.

    No token's key or value is computed.
    """
    spec, weights, graph = writer.spec, writer.weights, writer.graph
    kv_of = list(weights.kv_of)
    # (heads, qk, in) and (heads, in, v)
    keys = weights.k.weight.reshape(-1, spec.kv_heads, spec.qk).transpose(1, 2, 0)[kv_of]
    values = weights.v.weight.reshape(-1, spec.kv_heads, spec.v).transpose(1, 0, 2)[kv_of]
    q = writer.linear(writer.rows.queries, weights.q, "q")
    q = writer.reshape(q, [-1, spec.heads, spec.qk], "q.split")
    q = writer.head_norm(weights.q_norm, q, "q_norm")
    q = writer.transpose_heads(q, "q.heads")
    keys = np.ascontiguousarray(keys)
    queries = graph.product(q, keys, f"{writer.name}.k.weight", f"{writer.name}.q.folded")
    bias = writer.relative_bias()
    output = _attend_to_rows(writer, queries, keys.shape[2], bias)
    values = np.ascontiguousarray(values)
    output = graph.product(output, values, f"{writer.name}.v.weight", f"{writer.name}.mix")
    if weights.v.bias is not None:
        shift = weights.v.bias.reshape(spec.kv_heads, 1, spec.v)[kv_of]
        constant = graph.constant(f"{writer.name}.v.bias", shift)
        output = writer.node("Add", [output, constant], "mix.shifted")
    return _merge_heads(writer, output)


def _attend_to_rows(writer: AttentionWriter, queries: str, width: int, bias: str | None) -> str:
    """softmax(queries xᵀ + bias) x head by head, (…, heads, queries, width) -> the same shape."""
    rows, graph, name = writer.rows, writer.graph, writer.name
    x = rows.x
    if rows.padding:
        x = first_tokens(graph, writer.form, x, rows.tokens, f"{name}.real")
    flat = writer.reshape(queries, [-1, width], "q.rows")
    transposed = writer.node(
        "Transpose", [x], "x.transposed", perm=[1, 0] if writer.matrix else [0, 2, 1]
    )
    scores = writer.node("MatMul", [flat, transposed], "scores")
    if bias is not None:
        bias = writer.reshape_bias(bias, [-1, rows.tokens], "bias.rows")
    pooled = writer.node("MatMul", [_softmax(writer, scores, bias), x], "pooled")
    return writer.reshape(pooled, [writer.spec.heads, -1, width], "pooled.heads")


def _output_head_norm(writer: AttentionWriter, layer: Norm | None, output: str) -> str:
    if layer is None:
        return output
    spec = writer.spec
    split = writer.reshape(output, [-1, spec.heads, spec.v], "mix.split")
    split = writer.head_norm(layer, split, "head_norm")
    return writer.reshape(split, [-1, spec.heads * spec.v], "mix.normed")
