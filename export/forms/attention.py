"""Self-attention in five forms, from the folded weights of `attention_weights.py`.

Norms and rotations work on (…, tokens, heads, width), before anything is transposed, so that the
standard's operator needs no transposes at all. Heads that share keys and values (grouped queries)
are put under each other as more queries of one head where the groups are equal and in order; else
keys and values are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...compress.network.architecture import AttentionSpec, RelativeBiasSpec
from .attention_weights import AttentionWeights, NormWeights, apart, fold
from .form import Form
from .graph import Array, Graph
from .rows import RUNTIME, Linear, first_tokens, linear, norm

State = dict[str, Array]


@dataclass(frozen=True)
class Asked:
    """The rows of an attention: `x` all `tokens` of them, perhaps followed by `padding` rows that
    nobody looks at; `asking` the first `queries`.
    """

    x: str
    asking: str
    tokens: int
    padding: int
    queries: int | None


def attention(
    graph: Graph, form: Form, spec: AttentionSpec, state: State, rows: Asked, name: str
) -> tuple[str, Linear]:
    """Mixed values, one row a query, before the output projection, and that projection."""
    spec, state = apart(spec, state)
    parts = fold(spec, state)
    if form.last_keys and rows.queries is not None and _foldable(graph, spec, parts):
        mixed = _without_keys(graph, form, spec, parts, rows, name)
    elif (
        form.attention == "runtime"
        and form.rows == "batch"
        and spec.kv_of is None
        and parts.second is None
    ):
        mixed = _runtime(graph, form, spec, parts, rows, name)
    elif form.attention == "opset23" and parts.second is None and _group(spec) is not None:
        mixed = _standard(graph, form, spec, parts, rows, name)
    else:
        mixed = _products(graph, form, spec, parts, rows, name)
    mixed = _normed_heads(graph, form, spec, parts.head_norm, mixed, name)
    if parts.out_norm is not None:
        mixed = norm(
            graph,
            mixed,
            parts.out_norm.spec,
            parts.out_norm.weight,
            parts.out_norm.bias,
            f"{name}.out_norm",
        )
    if parts.gate is not None:
        opened = graph.node(
            "Sigmoid",
            [linear(graph, form, rows.asking, parts.gate, f"{name}.gate")],
            f"{name}.gate.open",
        )
        mixed = graph.node("Mul", [mixed, opened], f"{name}.gated")
    return mixed, parts.out


def _group(spec: AttentionSpec) -> int | None:
    """Heads to a key/value head, where the groups are equal and in order; None where they are
    not.
    """
    size = spec.heads // spec.kv_heads
    in_order = tuple(head // size for head in range(spec.heads))
    return size if spec.kv_of is None or spec.kv_of == in_order else None


def _products(
    graph: Graph, form: Form, spec: AttentionSpec, parts: AttentionWeights, rows: Asked, name: str
) -> str:
    q, k, v = _projected(graph, form, spec, parts, rows, name)
    matrix = form.rows == "matrix"
    heads_first, keys_last = ([1, 0, 2], [1, 2, 0]) if matrix else ([0, 2, 1, 3], [0, 2, 3, 1])
    lead = [] if matrix else [0]
    q = graph.node("Transpose", [q], f"{name}.q.heads", perm=heads_first)
    k = graph.node("Transpose", [k], f"{name}.k.last", perm=keys_last)
    v = graph.node("Transpose", [v], f"{name}.v.heads", perm=heads_first)
    bias = relative_bias(graph, spec.bias, parts.table, rows, name)
    group = _group(spec)
    grouped = spec.kv_of is not None and group is not None
    if grouped:
        q = graph.reshape(q, [*lead, spec.kv_heads, -1, spec.qk], f"{name}.q.grouped")
        if bias is not None:
            bias = graph.reshape(bias, [spec.kv_heads, -1, rows.tokens], f"{name}.bias.grouped")
    elif spec.kv_of is not None:
        axis = 0 if matrix else 1
        k, v = (
            graph.node("Gather", [value, graph.sizes(spec.kv_of)], f"{name}.{part}.each", axis=axis)
            for part, value in (("k", k), ("v", v))
        )
    shares = _shares(graph, graph.node("MatMul", [q, k], f"{name}.scores"), bias, name)
    if parts.second is not None:
        first, second = graph.node_outputs(
            "Split", [shares], f"{name}.maps", 2, axis=0 if matrix else 1, num_outputs=2
        )
        less = graph.node(
            "Mul", [second, graph.scalar(f"{name}.lambda", parts.second)], f"{name}.second"
        )
        shares = graph.node("Sub", [first, less], f"{name}.difference")
    mixed = graph.node("MatMul", [shares, v], f"{name}.mix")
    if grouped:
        mixed = graph.reshape(mixed, [*lead, spec.heads, -1, spec.v], f"{name}.mix.heads")
    mixed = graph.node("Transpose", [mixed], f"{name}.mix.tokens", perm=heads_first)
    return graph.reshape(mixed, [*lead, -1, spec.heads * spec.v], f"{name}.mix.rows")


def _shares(graph: Graph, scores: str, bias: str | None, name: str) -> str:
    if bias is not None:
        scores = graph.node("Add", [scores, bias], f"{name}.scores.placed")
    return graph.node("Softmax", [scores], f"{name}.softmax", axis=-1)


def _projected(
    graph: Graph, form: Form, spec: AttentionSpec, parts: AttentionWeights, rows: Asked, name: str
) -> tuple[str, str, str]:
    """q, k, v of shape (…, tokens, heads, width), normed and turned."""
    lead = [-1] if form.rows == "matrix" else [0, -1]
    kinds = (
        ("q", spec.heads * spec.parts, spec.qk),
        ("k", spec.kv_heads * spec.parts, spec.qk),
        ("v", spec.kv_heads, spec.v),
    )
    linears = (parts.q, parts.k, parts.v)
    if form.attention == "fused-qkv" and rows.queries is None:
        joined = np.concatenate([part.weight for part in linears], axis=1)
        biases = [
            np.zeros(part.weight.shape[1], np.float32) if part.bias is None else part.bias
            for part in linears
        ]
        bias = None if all(part.bias is None for part in linears) else np.concatenate(biases)
        together = linear(graph, form, rows.x, Linear(joined, bias), f"{name}.qkv")
        sections = graph.sizes([heads * width for _, heads, width in kinds])
        pieces = graph.node_outputs("Split", [together, sections], f"{name}.qkv.split", 3, axis=-1)
    else:
        sources = (rows.asking, rows.x, rows.x)
        pieces = [
            linear(graph, form, source, part, f"{name}.{kind[0]}")
            for source, part, kind in zip(sources, linears, kinds, strict=True)
        ]
    made = []
    for piece, (part, heads, width) in zip(pieces, kinds, strict=True):
        if rows.padding and part != "q":
            piece = first_tokens(graph, form, piece, rows.tokens, f"{name}.{part}.real")
        y = graph.reshape(piece, [*lead, heads, width], f"{name}.{part}.split")
        y = _normed(
            graph, {"q": parts.q_norm, "k": parts.k_norm}.get(part), y, f"{name}.{part}_norm"
        )
        made.append(
            _turned(graph, spec, parts, y, rows, part, f"{name}.{part}") if part != "v" else y
        )
    return made[0], made[1], made[2]


def _flat(
    graph: Graph, form: Form, values: tuple[str, str, str], spec: AttentionSpec, name: str
) -> list[str]:
    """(…, tokens, heads, width) -> (batch, tokens, heads * width)."""
    lead = 1 if form.rows == "matrix" else 0
    widths = (spec.heads * spec.qk, spec.kv_heads * spec.qk, spec.kv_heads * spec.v)
    return [
        graph.reshape(value, [lead, -1, width], f"{name}.{part}.one")
        for value, part, width in zip(values, "qkv", widths, strict=True)
    ]


def _plain(spec: AttentionSpec, rows: Asked) -> bool:
    """Whether nothing works on single heads before the scores."""
    return spec.q_norm is None and spec.k_norm is None and spec.rope is None and not rows.padding


def _standard(
    graph: Graph, form: Form, spec: AttentionSpec, parts: AttentionWeights, rows: Asked, name: str
) -> str:
    """The standard's Attention takes (batch, tokens, heads * width) and needs no transposes."""
    if _plain(spec, rows):
        linears = ((rows.asking, parts.q), (rows.x, parts.k), (rows.x, parts.v))
        inputs = [
            linear(graph, form, source, part, f"{name}.{label}")
            for (source, part), label in zip(linears, "qkv", strict=True)
        ]
        if form.rows == "matrix":
            inputs = [
                graph.reshape(y, [1, -1, part.weight.shape[1]], f"{name}.{label}.one")
                for y, (_, part), label in zip(inputs, linears, "qkv", strict=True)
            ]
    else:
        inputs = _flat(graph, form, _projected(graph, form, spec, parts, rows, name), spec, name)
    bias = relative_bias(graph, spec.bias, parts.table, rows, name)
    if bias is not None:
        inputs.append(graph.node("Unsqueeze", [bias, graph.sizes([0])], f"{name}.bias.one"))
    mixed = graph.node(
        "Attention",
        inputs,
        f"{name}.mix",
        q_num_heads=spec.heads,
        kv_num_heads=spec.kv_heads,
        scale=1.0,
    )
    return (
        mixed
        if form.rows == "batch"
        else graph.reshape(mixed, [-1, spec.heads * spec.v], f"{name}.mix.rows")
    )


def _runtime(
    graph: Graph, form: Form, spec: AttentionSpec, parts: AttentionWeights, rows: Asked, name: str
) -> str:
    linears = ((rows.asking, parts.q, "q"), (rows.x, parts.k, "k"), (rows.x, parts.v, "v"))
    shift = ""
    if _plain(spec, rows) and graph.linears != "gemm":
        # Eight-bit products add the bias themselves.
        inputs = [
            linear(graph, form, source, part, f"{name}.{label}") for source, part, label in linears
        ]
    elif _plain(spec, rows):
        inputs = [
            graph.node(
                "MatMul",
                [source, graph.constant(f"{name}.{label}.weight", part.weight)],
                f"{name}.{label}",
            )
            for source, part, label in linears
        ]
        if any(part.bias is not None for _, part, _ in linears):
            bias = [
                np.zeros(part.weight.shape[1], np.float32) if part.bias is None else part.bias
                for _, part, _ in linears
            ]
            shift = graph.constant(f"{name}.qkv.bias", np.concatenate(bias))
    else:
        inputs = _flat(graph, form, _projected(graph, form, spec, parts, rows, name), spec, name)
    table = relative_bias(graph, spec.bias, parts.table, rows, name)
    if table is not None:
        inputs += [
            shift,
            "",
            graph.node("Unsqueeze", [table, graph.sizes([0])], f"{name}.bias.one"),
        ]
    elif shift:
        inputs.append(shift)
    return graph.node(
        "MultiHeadAttention", inputs, f"{name}.mix", domain=RUNTIME, num_heads=spec.heads, scale=1.0
    )


def _foldable(graph: Graph, spec: AttentionSpec, parts: AttentionWeights) -> bool:
    """Whether scores are bilinear in query rows and rows of x. In eight bits the products over d
    columns are the cheap ones, so they stay.
    """
    return (
        graph.linears == "gemm"
        and spec.k_norm is None
        and spec.rope is None
        and parts.second is None
    )


def _without_keys(
    graph: Graph, form: Form, spec: AttentionSpec, parts: AttentionWeights, rows: Asked, name: str
) -> str:
    """Few queries: (q Wkᵀ) xᵀ for the scores and (shares x) Wv for the values, so that no token's
    key or value is ever made.
    """
    assert rows.queries is not None
    matrix = form.rows == "matrix"
    lead = [] if matrix else [0]
    heads_first = [1, 0, 2] if matrix else [0, 2, 1, 3]
    # (heads, qk, in) and (heads, in, v)
    keys = np.ascontiguousarray(
        parts.k.weight.reshape(-1, spec.kv_heads, spec.qk).transpose(1, 2, 0)[list(parts.kv_of)]
    )
    values = np.ascontiguousarray(
        parts.v.weight.reshape(-1, spec.kv_heads, spec.v).transpose(1, 0, 2)[list(parts.kv_of)]
    )
    q = linear(graph, form, rows.asking, parts.q, f"{name}.q")
    q = graph.reshape(q, [*lead, -1, spec.heads, spec.qk], f"{name}.q.split")
    q = _normed(graph, parts.q_norm, q, f"{name}.q_norm")
    q = graph.node("Transpose", [q], f"{name}.q.heads", perm=heads_first)
    asking = graph.node(
        "MatMul", [q, graph.constant(f"{name}.k.weight", keys)], f"{name}.asking.heads"
    )
    mixed = pooled_rows(
        graph,
        form,
        str(asking),
        rows,
        spec.heads,
        keys.shape[2],
        relative_bias(graph, spec.bias, parts.table, rows, name),
        name,
    )
    mixed = graph.node("MatMul", [mixed, graph.constant(f"{name}.v.weight", values)], f"{name}.mix")
    if parts.v.bias is not None:
        shift = parts.v.bias.reshape(spec.kv_heads, 1, spec.v)[list(parts.kv_of)]
        mixed = graph.node(
            "Add", [mixed, graph.constant(f"{name}.v.bias", shift)], f"{name}.mix.shifted"
        )
    mixed = graph.node("Transpose", [mixed], f"{name}.mix.tokens", perm=heads_first)
    return graph.reshape(mixed, [*lead, -1, spec.heads * spec.v], f"{name}.mix.rows")


def pooled_rows(
    graph: Graph,
    form: Form,
    asking: str,
    rows: Asked,
    heads: int,
    width: int,
    bias: str | None,
    name: str,
) -> str:
    """softmax(asking xᵀ + bias) x, head by head: (…, heads, queries, width) -> the same shape."""
    matrix = form.rows == "matrix"
    x = first_tokens(graph, form, rows.x, rows.tokens, f"{name}.real") if rows.padding else rows.x
    lead = [] if matrix else [0]
    flat = graph.reshape(asking, [*lead, -1, width], f"{name}.asking.rows")
    turned = graph.node("Transpose", [x], f"{name}.turned", perm=[1, 0] if matrix else [0, 2, 1])
    scores = graph.node("MatMul", [flat, turned], f"{name}.scores")
    if bias is not None:
        bias = graph.reshape(bias, [-1, rows.tokens], f"{name}.bias.rows")
    mixed = graph.node("MatMul", [_shares(graph, scores, bias, name), x], f"{name}.pooled")
    return graph.reshape(mixed, [*lead, heads, -1, width], f"{name}.pooled.heads")


def _normed(graph: Graph, part: NormWeights | None, x: str, name: str) -> str:
    """A norm over each head of (…, tokens, heads, width), with one weight for all heads or one a
    head.
    """
    if part is None:
        return x
    together = all(value is None or value.ndim == 1 for value in (part.weight, part.bias))
    if together:
        return norm(graph, x, part.spec, part.weight, part.bias, name)
    plain = norm(graph, x, part.spec, None, None, name)
    if part.weight is not None:
        plain = graph.node(
            "Mul", [plain, graph.constant(f"{name}.weight", part.weight)], f"{name}.scaled"
        )
    if part.bias is not None:
        plain = graph.node(
            "Add", [plain, graph.constant(f"{name}.bias", part.bias)], f"{name}.biased"
        )
    return plain


def _normed_heads(
    graph: Graph, form: Form, spec: AttentionSpec, part: NormWeights | None, mixed: str, name: str
) -> str:
    if part is None:
        return mixed
    lead = [] if form.rows == "matrix" else [0]
    apart = graph.reshape(mixed, [*lead, -1, spec.heads, spec.v], f"{name}.mix.apart")
    apart = _normed(graph, part, apart, f"{name}.head_norm")
    return graph.reshape(apart, [*lead, -1, spec.heads * spec.v], f"{name}.mix.normed")


def _turned(
    graph: Graph,
    spec: AttentionSpec,
    parts: AttentionWeights,
    x: str,
    rows: Asked,
    part: str,
    name: str,
) -> str:
    """Rope on (…, tokens, heads, qk) whose pairs lie in halves: x cos + (second half, first half)
    (-sin, sin).
    """
    if spec.rope is None or parts.cosine is None or parts.sine is None:
        return x
    count = rows.tokens if part == "k" or rows.queries is None else rows.queries
    if count <= spec.rope.prefix:
        return x
    still = ((0, rows.padding if part == "q" and rows.queries is None else 0), (0, 0), (0, 0))
    cosine, sine = np.pad(parts.cosine[:count], still), np.pad(parts.sine[:count], still)
    first, second = graph.node_outputs("Split", [x], f"{name}.halves", 2, axis=-1, num_outputs=2)
    swapped = graph.node("Concat", [second, first], f"{name}.swapped", axis=-1)
    straight = graph.node(
        "Mul", [x, graph.constant("rope.cosine", cosine, shared=True)], f"{name}.straight"
    )
    across = graph.node(
        "Mul", [swapped, graph.constant("rope.sine", sine, shared=True)], f"{name}.across"
    )
    return graph.node("Add", [straight, across], f"{name}.turned")


def relative_bias(
    graph: Graph, spec: RelativeBiasSpec | None, table: Array | None, rows: Asked, name: str
) -> str | None:
    """(heads, queries, tokens) out of a table of offsets. Runtimes fold it when they load; on disk
    the offsets are kept once for all sub-layers.
    """
    if spec is None or table is None:
        return None
    from ...compress.network.modules.relative_bias import offsets

    index = offsets(spec).numpy()
    prefix = 0 if spec.prefix_rows else spec.prefix
    # Whatever meets a prefix token takes the zero that stands behind the table's own rows.
    index = np.pad(index, ((prefix, 0), (prefix, 0)), constant_values=spec.rows)
    if rows.queries is not None:
        index = index[: rows.queries]
    elif rows.padding:
        index = np.pad(index, ((0, rows.padding), (0, 0)))
    where = graph.constant("bias.offsets", index.astype(np.int64), shared=True)
    return graph.node(
        "Gather", [graph.constant(f"{name}.bias.table", table), where], f"{name}.bias", axis=1
    )
