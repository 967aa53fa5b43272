"""From the residual stream to logits: the final norm, pooling of every kind, the classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...compress.network.architecture import Architecture, RefineSpec
from .attention_pool import attention_pool
from .dense_outputs import DenseOutputs
from .ffn import activation
from .form import Form
from .graph import Graph, State
from .rows import (
    Linear,
    Norm,
    first_tokens,
    gather_channels,
    linear,
    norm,
    scatter_channels,
    slice_tokens,
)
from .stream import Stream

# Rows that a pooling by prefix tokens reads.
_PREFIX_ROWS = {"token": 1, "distilled": 2}


def head(
    graph: Graph,
    form: Form,
    architecture: Architecture,
    state: State,
    stream: Stream,
    dense: DenseOutputs,
) -> str:
    """Write everything after the last sub-layer.

    Args:
        graph: Gets the nodes.
        form: Decides the layout of the rows.
        architecture: The network.
        state: Its weights.
        stream: The residual stream after the last sub-layer, without padding rows.
        dense: Gets the normed tokens and the features, where these are requested.

    Returns:
        Logits (1, classes), or with a batch; features where there is no classifier.
    """
    writer = _HeadWriter(graph, form, architecture, state)
    x = writer.final_norm(stream)
    if dense.all_tokens:
        dense.add_tokens(x)
        if architecture.pooled_prefix:
            x = first_tokens(graph, form, x, architecture.pooled_prefix, "pooled")
    if architecture.pool.kind == "none":
        return x
    return writer.logits(x, dense)


@dataclass(frozen=True)
class _HeadWriter:
    graph: Graph
    form: Form
    architecture: Architecture
    state: State

    @property
    def matrix(self) -> bool:
        return self.form.rows == "matrix"

    @property
    def tokens(self) -> int:
        """Rows of the stream that the head reads."""
        return self.architecture.pooled_prefix or self.architecture.final_tokens

    def final_norm(self, stream: Stream) -> str:
        spec, reads = self.architecture.norm, self.architecture.head_reads
        if reads is None and spec is not None:
            return stream.read_normed(Norm.of(spec, self.state, "norm"), "norm")
        x = stream.read("head.stream")
        if reads is not None:
            x = gather_channels(self.graph, x, reads, self.architecture.embed, "head.reads")
        return x if spec is None else norm(self.graph, x, Norm.of(spec, self.state, "norm"), "norm")

    def logits(self, x: str, dense: DenseOutputs) -> str:
        architecture, tokens = self.architecture, self.tokens
        kind = architecture.pool.kind
        if architecture.pool.refine is not None:
            # Norms and refining work token by token, so a class token needs no other one refined.
            count = _PREFIX_ROWS.get(kind)
            x = _refined(self.graph, self.form, architecture.pool.refine, x, count)
            tokens = count or tokens
        if kind == "distilled":
            if dense.features:
                dense.add_features(self._mean_of_rows(x))
            return self._distilled(x)
        if kind == "dense":
            if dense.features:
                dense.add_features(self._class_row(x))
            return self._dense(x)
        x = self._pooled(kind, x, tokens)
        if architecture.pool_norm is not None:
            layer = Norm.of(architecture.pool_norm, self.state, "pool_norm")
            x = norm(self.graph, x, layer, "pool_norm")
        if dense.features:
            dense.add_features(x)
        return self._classified(x, "head", one_row=True)

    def _mean_of_rows(self, x: str) -> str:
        """The mean of class and distillation token."""
        graph = self.graph
        rows = []
        for number in range(2):
            row = slice_tokens(graph, self.form, x, number, number + 1, f"features.{number}")
            rows.append(graph.reshape(row, [-1, self._width], f"features.{number}.flat"))
        both = graph.node("Add", rows, "features.both")
        return graph.node("Mul", [both, graph.scalar("half", 0.5)], "features.mean")

    def _pooled(self, kind: str, x: str, tokens: int) -> str:
        """(…, tokens, width) -> (batch, width)."""
        graph, pool = self.graph, self.architecture.pool
        if kind == "attention":
            rows = x if pool.prefix else self._patches(x, tokens)
            return attention_pool(graph, self.form, pool, self.state, rows)
        if kind == "token":
            if self.matrix and tokens == 1:
                return x
            row = x if tokens == 1 else first_tokens(graph, self.form, x, 1, "class")
            return graph.reshape(row, [-1, self._width], "pool")
        if kind == "token_mean":
            first = self._class_row(x)
            mean = self._mean(self._patches(x, tokens))
            return graph.node("Concat", [first, mean], "pool.joined", axis=-1)
        rows = x if kind.endswith("_all") else self._patches(x, tokens)
        if kind.startswith("mean"):
            return self._mean(rows)
        if kind.startswith("max"):
            return self._maximum(rows, "pool")
        both = graph.node("Add", [self._maximum(rows, "pool.max"), self._mean(rows)], "pool.both")
        return graph.node("Mul", [both, graph.scalar("half", 0.5)], "pool.avgmax")

    def _classified(self, x: str, classifier: str, *, one_row: bool) -> str:
        """Apply a classifier, or spread the features where there is none."""
        graph, state, spec = self.graph, self.state, self.architecture.head
        form = replace(self.form, rows="matrix") if one_row else self.form
        if spec is None:
            writes = self.architecture.feature_writes
            if writes is None:
                return x
            return scatter_channels(graph, x, writes, self.architecture.classes, "features")
        if spec.hidden:
            x = linear(graph, form, x, Linear.of(state, "pre_head"), "pre_head")
            x = activation(graph, spec.hidden_act, x, "pre_head.act")
        x = linear(graph, form, x, Linear.of(state, classifier), classifier)
        return activation(graph, spec.act, x, f"{classifier}.act")

    def _distilled(self, x: str) -> str:
        """The mean of two classifiers on class and distillation token."""
        graph, state, spec = self.graph, self.state, self.architecture.head
        if spec is not None and spec.hidden is None and spec.act == "identity":
            # It is one classifier on the rows side by side.
            rows = first_tokens(graph, self.form, x, 2, "pool.rows")
            x = graph.reshape(rows, [-1, 2 * self._width], "pool")
            weight = np.concatenate([state["head.weight"].T, state["head_dist.weight"].T]) / 2
            bias = None
            if "head.bias" in state:
                bias = (state["head.bias"] + state["head_dist.bias"]) / 2
            layer = Linear(np.ascontiguousarray(weight), bias)
            return linear(graph, replace(self.form, rows="matrix"), x, layer, "head")
        logits = []
        for number, classifier in enumerate(("head", "head_dist")):
            row = slice_tokens(graph, self.form, x, number, number + 1, f"{classifier}.row")
            row = graph.reshape(row, [-1, self._width], f"{classifier}.flat")
            logits.append(self._classified(row, classifier, one_row=True))
        both = graph.node("Add", logits, "head.both")
        return graph.node("Mul", [both, graph.scalar("half", 0.5)], "head.mean")

    def _dense(self, x: str) -> str:
        """Logits of the class token plus half of the largest logits of the patches."""
        graph = self.graph
        first = self._class_row(x)
        patches = self._patches(x, self.tokens)
        patches = self._classified(patches, "head_dist", one_row=False)
        best = self._maximum(patches, "head_dist.best")
        best = graph.node("Mul", [best, graph.scalar("half", 0.5)], "head_dist.half")
        logits = self._classified(first, "head", one_row=True)
        return graph.node("Add", [logits, best], "head.dense")

    @property
    def _width(self) -> int:
        return self.architecture.read_width(self.architecture.head_reads)

    def _class_row(self, x: str) -> str:
        row = first_tokens(self.graph, self.form, x, 1, "class")
        return self.graph.reshape(row, [-1, self._width], "class.row")

    def _patches(self, x: str, tokens: int) -> str:
        prefix = self.architecture.prefix
        if not prefix:
            return x
        return slice_tokens(self.graph, self.form, x, prefix, tokens, "patches")

    def _mean(self, rows: str) -> str:
        return self._reduced("ReduceMean", rows, "pool")

    def _maximum(self, rows: str, name: str) -> str:
        return self._reduced("ReduceMax", rows, name)

    def _reduced(self, operator: str, rows: str, name: str) -> str:
        """Reduce over tokens: (tokens, width) -> (1, width), or (batch, width)."""
        if self.graph.operators == "pnnx":
            return self._pooled_globally(operator, rows, name)
        axes = self.graph.sizes([0 if self.matrix else 1])
        return self.graph.node(operator, [rows, axes], name, keepdims=1 if self.matrix else 0)

    def _pooled_globally(self, operator: str, rows: str, name: str) -> str:
        """The same as a global pooling of channels, which pnnx converts."""
        kind = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}[operator]
        perm = [1, 0] if self.matrix else [0, 2, 1]
        channels = self.graph.node("Transpose", [rows], f"{name}.channels", perm=perm)
        if self.matrix:
            channels = self.graph.node(
                "Unsqueeze", [channels, self.graph.sizes([0])], f"{name}.one"
            )
        pooled = self.graph.node(kind, [channels], name)
        return self.graph.node("Flatten", [pooled], f"{name}.row", axis=1)


def _refined(graph: Graph, form: Form, spec: RefineSpec, x: str, count: int | None) -> str:
    """softmax(scale x xᵀ) x among the channels of each head, for the first `count` rows or all.

    Requires rows without padding.
    """
    heads, width, matrix = len(spec.channels), max(spec.channels), form.rows == "matrix"
    # Heads of unequal width are padded with zeros, which change no score.
    channels = [
        head * width + channel
        for head, own_width in enumerate(spec.channels)
        for channel in range(own_width)
    ]
    equal = len(set(spec.channels)) == 1
    if not equal:
        x = scatter_channels(graph, x, channels, heads * width, "refine.equal")
    lead, heads_first = ([], [1, 0, 2]) if matrix else ([0], [0, 2, 1, 3])
    split = graph.reshape(x, [*lead, -1, heads, width], "refine.heads")
    rows = graph.node("Transpose", [split], "refine.rows_first", perm=heads_first)
    keys_last = [1, 2, 0] if matrix else [0, 2, 3, 1]
    keys = graph.node("Transpose", [split], "refine.keys", perm=keys_last)
    queries = rows
    if count is not None:
        bounds = [graph.sizes([0]), graph.sizes([count]), graph.sizes([1 if matrix else 2])]
        queries = graph.node("Slice", [rows, *bounds], "refine.queries")
    factor = graph.scalar("refine.scale", spec.scale)
    queries = graph.node("Mul", [queries, factor], "refine.scaled")
    scores = graph.node("MatMul", [queries, keys], "refine.scores")
    probabilities = graph.node("Softmax", [scores], "refine.softmax", axis=-1)
    output = graph.node("MatMul", [probabilities, rows], "refine.mix")
    output = graph.node("Transpose", [output], "refine.tokens", perm=heads_first)
    output = graph.reshape(output, [*lead, -1, heads * width], "refine.rows")
    if equal:
        return output
    return gather_channels(graph, output, channels, heads * width, "refine.kept")
