"""From the residual stream to logits: the final norm, pooling of every kind that an architecture
knows, the classifier.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...compress.network.architecture import Architecture, RefineSpec
from .attention_pool import attention_pool
from .ffn import activation
from .form import Form
from .graph import Array, Graph
from .rows import Linear, first_tokens, linear, norm, pick_channels, place
from .stream import Stream

State = dict[str, Array]


def head(graph: Graph, form: Form, architecture: Architecture, state: State, stream: Stream) -> str:
    """(tokens, embed) -> (1, classes), or with a batch. Features where there is no classifier."""
    tokens = architecture.pooled_prefix or architecture.tokens
    x = _normed(graph, architecture, state, stream)
    kind, prefix = architecture.pool.kind, architecture.prefix
    if architecture.pool.refine is not None:
        # Norms and refining work token by token on what is asked, so a class token needs no other
        # token refined.
        asked = {"token": 1, "distilled": 2}.get(kind)
        x = _refined(graph, form, architecture.pool.refine, x, asked)
        tokens = asked or tokens
    plain = replace(form, rows="matrix")
    width = architecture.read_width(architecture.head_reads)
    if kind == "distilled":
        return _distilled(graph, form, architecture, state, x, width)
    if kind == "dense":
        return _dense(graph, form, architecture, state, x)
    if kind == "attention":
        rows = x if architecture.pool.prefix else _patches(graph, form, x, prefix, tokens)
        x = attention_pool(
            graph,
            form,
            architecture.pool,
            state,
            rows,
            tokens - (0 if architecture.pool.prefix else prefix),
        )
    elif kind == "token":
        x = (
            graph.node("Reshape", [_one(graph, form, x, tokens), graph.sizes([-1, width])], "pool")
            if form.rows == "batch" or tokens > 1
            else x
        )
    elif kind == "token_mean":
        first = graph.node(
            "Reshape",
            [first_tokens(graph, form, x, 1, "class"), graph.sizes([-1, width])],
            "class.row",
        )
        x = graph.node(
            "Concat",
            [first, _mean(graph, form, _patches(graph, form, x, prefix, tokens))],
            "pool.joined",
            axis=-1,
        )
    else:
        rows = x if kind.endswith("_all") else _patches(graph, form, x, prefix, tokens)
        if kind.startswith("mean"):
            x = _mean(graph, form, rows)
        elif kind.startswith("max"):
            x = _largest(graph, form, rows, "pool")
        else:
            both = graph.node(
                "Add",
                [_largest(graph, form, rows, "pool.max"), _mean(graph, form, rows)],
                "pool.both",
            )
            x = graph.node("Mul", [both, graph.scalar("half", 0.5)], "pool.avgmax")
    if architecture.pool_norm is not None:
        x = norm(
            graph,
            x,
            architecture.pool_norm,
            state.get("pool_norm.weight"),
            state.get("pool_norm.bias"),
            "pool_norm",
        )
    return _answer(graph, plain, architecture, state, x, "head")


def _normed(graph: Graph, architecture: Architecture, state: State, stream: Stream) -> str:
    spec, weight, bias = architecture.norm, state.get("norm.weight"), state.get("norm.bias")
    if architecture.head_reads is None and spec is not None:
        return stream.read_normed(spec, weight, bias, "norm")
    x = stream.read("head.stream")
    if architecture.head_reads is not None:
        x = pick_channels(graph, x, architecture.head_reads, "head.reads")
    return x if spec is None else norm(graph, x, spec, weight, bias, "norm")


def _answer(
    graph: Graph, form: Form, architecture: Architecture, state: State, x: str, classifier: str
) -> str:
    spec = architecture.head
    if spec is None:
        if architecture.feature_writes is None:
            return x
        return place(graph, x, architecture.feature_writes, architecture.classes, "features")
    if spec.hidden:
        inner = Linear(np.ascontiguousarray(state["pre_head.weight"].T), state.get("pre_head.bias"))
        x = activation(
            graph, spec.hidden_act, linear(graph, form, x, inner, "pre_head"), "pre_head.act"
        )
    outer = Linear(
        np.ascontiguousarray(state[f"{classifier}.weight"].T), state.get(f"{classifier}.bias")
    )
    return activation(
        graph, spec.act, linear(graph, form, x, outer, classifier), f"{classifier}.act"
    )


def _distilled(
    graph: Graph, form: Form, architecture: Architecture, state: State, x: str, width: int
) -> str:
    spec, plain = architecture.head, replace(form, rows="matrix")
    if spec is not None and spec.hidden is None and spec.act == "identity":
        # The mean of two classifiers on two rows is one classifier on the rows side by side.
        x = graph.node(
            "Reshape",
            [first_tokens(graph, form, x, 2, "asked"), graph.sizes([-1, 2 * width])],
            "pool",
        )
        matrix = np.concatenate([state["head.weight"].T, state["head_dist.weight"].T]) / 2
        shift = (state["head.bias"] + state["head_dist.bias"]) / 2 if "head.bias" in state else None
        return linear(graph, plain, x, Linear(np.ascontiguousarray(matrix), shift), "head")
    axis = 0 if form.rows == "matrix" else 1
    answers = []
    for number, classifier in enumerate(("head", "head_dist")):
        row = graph.node(
            "Slice",
            [x, graph.sizes([number]), graph.sizes([number + 1]), graph.sizes([axis])],
            f"{classifier}.row",
        )
        flat = graph.reshape(row, [-1, width], f"{classifier}.flat")
        answers.append(_answer(graph, plain, architecture, state, flat, classifier))
    both = graph.node("Add", answers, "head.both")
    return graph.node("Mul", [both, graph.scalar("half", 0.5)], "head.mean")


def _dense(graph: Graph, form: Form, architecture: Architecture, state: State, x: str) -> str:
    width = architecture.read_width(architecture.head_reads)
    first = graph.node(
        "Reshape", [first_tokens(graph, form, x, 1, "class"), graph.sizes([-1, width])], "class.row"
    )
    patches = _answer(
        graph,
        form,
        architecture,
        state,
        _patches(graph, form, x, architecture.prefix, architecture.tokens),
        "head_dist",
    )
    best = graph.node(
        "Mul",
        [_largest(graph, form, patches, "head_dist.best"), graph.scalar("half", 0.5)],
        "head_dist.half",
    )
    return graph.node(
        "Add",
        [_answer(graph, replace(form, rows="matrix"), architecture, state, first, "head"), best],
        "head.dense",
    )


def _refined(graph: Graph, form: Form, spec: RefineSpec, x: str, asked: int | None) -> str:
    """softmax(scale x xᵀ) x among the channels of each head. Requires rows without padding."""
    heads, wide, matrix = len(spec.channels), max(spec.channels), form.rows == "matrix"
    even = len(set(spec.channels)) == 1
    starts = np.cumsum([0, *spec.channels])
    if not even:
        spread = tuple(
            head * wide + channel
            for head, channels in enumerate(spec.channels)
            for channel in range(channels)
        )
        x = place(graph, x, spread, heads * wide, "refine.even")
    lead, heads_first = ([], [1, 0, 2]) if matrix else ([0], [0, 2, 1, 3])
    apart = graph.reshape(x, [*lead, -1, heads, wide], "refine.heads")
    keys = graph.node("Transpose", [apart], "refine.keys", perm=heads_first)
    turned = graph.node(
        "Transpose", [apart], "refine.turned", perm=[1, 2, 0] if matrix else [0, 2, 3, 1]
    )
    asking = keys
    if asked is not None:
        axis = 1 if matrix else 2
        asking = graph.node(
            "Slice",
            [keys, graph.sizes([0]), graph.sizes([asked]), graph.sizes([axis])],
            "refine.asking",
        )
    scaled = graph.node("Mul", [asking, graph.scalar("refine.scale", spec.scale)], "refine.scaled")
    shares = graph.node(
        "Softmax",
        [graph.node("MatMul", [scaled, turned], "refine.scores")],
        "refine.softmax",
        axis=-1,
    )
    mixed = graph.node(
        "Transpose",
        [graph.node("MatMul", [shares, keys], "refine.mix")],
        "refine.tokens",
        perm=heads_first,
    )
    y = graph.reshape(mixed, [*lead, -1, heads * wide], "refine.rows")
    if even:
        return y
    kept = tuple(
        head * wide + channel
        for head in range(heads)
        for channel in range(int(starts[head + 1] - starts[head]))
    )
    return pick_channels(graph, y, kept, "refine.kept")


def _one(graph: Graph, form: Form, x: str, tokens: int) -> str:
    return x if tokens == 1 else first_tokens(graph, form, x, 1, "class")


def _patches(graph: Graph, form: Form, x: str, prefix: int, tokens: int) -> str:
    if not prefix:
        return x
    axis = 0 if form.rows == "matrix" else 1
    return graph.node(
        "Slice", [x, graph.sizes([prefix]), graph.sizes([tokens]), graph.sizes([axis])], "patches"
    )


def _mean(graph: Graph, form: Form, rows: str) -> str:
    matrix = form.rows == "matrix"
    return graph.node(
        "ReduceMean", [rows, graph.sizes([0 if matrix else 1])], "pool", keepdims=1 if matrix else 0
    )


def _largest(graph: Graph, form: Form, rows: str, name: str) -> str:
    matrix = form.rows == "matrix"
    return graph.node(
        "ReduceMax", [rows, graph.sizes([0 if matrix else 1])], name, keepdims=1 if matrix else 0
    )
