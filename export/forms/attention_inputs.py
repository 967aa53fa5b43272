"""What every form of attention reads: projected queries, keys and values, and the relative bias.

Norms and rotations work on (…, tokens, heads, width), before anything is transposed, so that the
standard's operator needs no transposes at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...compress.network.architecture import AttentionSpec
from ...compress.network.modules.relative_bias import offsets
from ..graphs.model_proto import SCORES
from .attention_weights import AttentionWeights
from .form import Form
from .graph import Array, Graph
from .positions import Positions
from .rows import Linear, Norm, first_tokens, linear, norm, scale_and_shift


@dataclass(frozen=True)
class AttentionRows:
    """The token rows that an attention reads.

    Attributes:
        x: All rows: `tokens` of them, then `padding` rows that no query attends to.
        queries: The rows that are queries.
        tokens: Number of tokens that came in, all of them keys.
        padding: Number of padding rows.
        query_count: Number of query rows where they are the first rows of x only, None where all of
            x are queries.
        positions: Which tokens of the stem the rows are, maybe of more rows; None: the first ones.
    """

    x: str
    queries: str
    tokens: int
    padding: int
    query_count: int | None
    positions: Positions | None = None

    @property
    def token_queries(self) -> int:
        """Number of queries that are tokens; they come first."""
        return self.tokens if self.query_count is None else min(self.query_count, self.tokens)

    @property
    def padding_queries(self) -> int:
        """Number of queries behind them that are padding."""
        count = self.tokens + self.padding if self.query_count is None else self.query_count
        return count - self.token_queries


@dataclass(frozen=True)
class AttentionWriter:
    """One attention in the making: where it is written, its weights and its rows."""

    graph: Graph
    form: Form
    spec: AttentionSpec
    weights: AttentionWeights
    rows: AttentionRows
    name: str

    @property
    def matrix(self) -> bool:
        """Whether rows have no batch dimension."""
        return self.form.rows == "matrix"

    @property
    def heads_first(self) -> list[int]:
        """The permutation (…, tokens, heads, width) -> (…, heads, tokens, width), and back."""
        return [1, 0, 2] if self.matrix else [0, 2, 1, 3]

    @property
    def sources(self) -> tuple[tuple[str, Linear, str], ...]:
        """Input rows, projection and label of queries, keys and values."""
        rows, weights = self.rows, self.weights
        return ((rows.queries, weights.q, "q"), (rows.x, weights.k, "k"), (rows.x, weights.v, "v"))

    @property
    def plain(self) -> bool:
        """Whether nothing works on single heads before the scores."""
        spec = self.spec
        return (
            spec.q_norm is None
            and spec.k_norm is None
            and spec.rope is None
            and not self.rows.padding
        )

    def node(self, operator: str, inputs: Sequence[str], label: str, **attributes: object) -> str:
        """Add a node named after the attention."""
        return self.graph.node(operator, inputs, f"{self.name}.{label}", **attributes)  # type: ignore[arg-type]

    def reshape(self, x: str, shape: Sequence[int], label: str) -> str:
        """Reshape to `shape`, after the batch dimension if there is one."""
        lead = [] if self.matrix else [0]
        return self.graph.reshape(x, [*lead, *shape], f"{self.name}.{label}")

    def transpose_heads(self, x: str, label: str) -> str:
        """Swap the dimensions of heads and tokens."""
        return self.node("Transpose", [x], label, perm=self.heads_first)

    def linear(self, x: str, layer: Linear, label: str) -> str:
        """Write a Linear named after the attention."""
        return linear(self.graph, self.form, x, layer, f"{self.name}.{label}")

    def projections(self) -> tuple[str, str, str]:
        """Write q, k and v of shape (…, tokens, heads, width), with their norms and rotations."""
        spec, weights, rows = self.spec, self.weights, self.rows
        shapes = (
            (spec.heads * spec.parts, spec.qk),
            (spec.kv_heads * spec.parts, spec.qk),
            (spec.kv_heads, spec.v),
        )
        if self.form.attention == "fused-qkv" and rows.query_count is None:
            products = self._fused_products([heads * width for heads, width in shapes])
        else:
            products = [self.linear(x, layer, label) for x, layer, label in self.sources]
        norms = {"q": weights.q_norm, "k": weights.k_norm}
        made = []
        for product, label, shape in zip(products, "qkv", shapes, strict=True):
            if rows.padding and label != "q":
                product = first_tokens(
                    self.graph, self.form, product, rows.tokens, f"{self.name}.{label}.real"
                )
            y = self.reshape(product, [-1, *shape], f"{label}.split")
            y = self.head_norm(norms.get(label), y, f"{label}_norm")
            made.append(y if label == "v" else self._rotated(y, label))
        return made[0], made[1], made[2]

    def _fused_products(self, widths: list[int]) -> list[str]:
        layers = (self.weights.q, self.weights.k, self.weights.v)
        weight = np.concatenate([layer.weight for layer in layers], axis=1)
        bias = None if all(layer.bias is None for layer in layers) else joined_bias(layers)
        fused = self.linear(self.rows.x, Linear(weight, bias), "qkv")
        inputs = [fused, self.graph.sizes(widths)]
        return self.graph.node_outputs("Split", inputs, f"{self.name}.qkv.split", 3, axis=-1)

    def flat_projections(self) -> list[str]:
        """Write q, k and v of shape (batch, tokens, heads * width)."""
        spec, lead = self.spec, 1 if self.matrix else 0
        widths = (spec.heads * spec.qk, spec.kv_heads * spec.qk, spec.kv_heads * spec.v)
        return [
            self.graph.reshape(value, [lead, -1, width], f"{self.name}.{label}.flat")
            for value, label, width in zip(self.projections(), "qkv", widths, strict=True)
        ]

    def head_norm(self, layer: Norm | None, x: str, label: str) -> str:
        """Write a norm over each head of (…, tokens, heads, width).

        Weights are shared by all heads, or one row for each.
        """
        if layer is None:
            return x
        name = f"{self.name}.{label}"
        if all(value is None or value.ndim == 1 for value in (layer.weight, layer.bias)):
            return norm(self.graph, x, layer, name)
        y = norm(self.graph, x, Norm(layer.spec), name)
        return scale_and_shift(self.graph, y, layer.weight, layer.bias, name)

    def _rotated(self, x: str, label: str) -> str:
        """Write rope on (…, tokens, heads, qk) whose pairs are split in halves (first, second).

        The result is x cos + (second, first) (-sin, sin).
        """
        spec, weights, rows = self.spec, self.weights, self.rows
        if spec.rope is None or weights.cosine is None or weights.sine is None:
            return x
        if (rows.tokens if label == "k" else rows.token_queries) <= spec.rope.prefix:
            return x
        first, second = self.graph.node_outputs(
            "Split", [x], f"{self.name}.{label}.halves", 2, axis=-1, num_outputs=2
        )
        swapped = self.node("Concat", [second, first], f"{label}.swapped", axis=-1)
        factors = self._token_rows(weights.cosine, label, "rope.cosine")
        kept = self.node("Mul", [x, factors], f"{label}.cosine")
        factors = self._token_rows(weights.sine, label, "rope.sine")
        crossed = self.node("Mul", [swapped, factors], f"{label}.sine")
        return self.node("Add", [kept, crossed], f"{label}.rotated")

    def _token_rows(self, table: Array, label: str, name: str) -> str:
        """Write the rows of a table (tokens of the stem, …) for queries "q" or keys "k"."""
        rows, positions = self.rows, self.rows.positions
        count = rows.tokens if label == "k" else rows.token_queries
        padding = 0 if label == "k" else rows.padding_queries
        name = f"{self.name}.{name}" if SCORES in self.name else name
        if positions is None:
            padded = np.pad(table[:count], ((0, padding), (0, 0), (0, 0)))
            return self.graph.constant(name, padded, shared=True)
        return positions.table_rows(self.graph, table, count + padding, name)

    @property
    def bias_by_image(self) -> bool:
        """Whether the images of a batch have relative biases of their own."""
        positions = self.rows.positions
        return positions is not None and positions.by_image

    def reshape_bias(self, bias: str, shape: Sequence[int], label: str) -> str:
        """Reshape a relative bias (heads, queries, tokens) to `shape`, for each image."""
        lead = [0] if self.bias_by_image else []
        return self.graph.reshape(bias, [*lead, *shape], f"{self.name}.{label}")

    def batched_bias(self) -> str | None:
        """Write the relative bias (batch or 1, heads, queries, tokens)."""
        bias = self.relative_bias()
        if bias is None or self.bias_by_image:
            return bias
        return self.node("Unsqueeze", [bias, self.graph.sizes([0])], "bias.batch")

    def relative_bias(self) -> str | None:
        """Write the relative bias (heads, queries, tokens), gathered from a table of offsets.

        Runtimes fold the Gather when they load the file; in the file, the indices are stored once
        for all sub-layers. With `bias_by_image` there is a dimension of images in front.
        """
        spec, table, rows = self.spec.bias, self.weights.table, self.rows
        if spec is None or table is None:
            return None
        # Pairs with a learned token read the zero that was appended to the table. Queries and keys
        # are leading tokens, in the order of the stream.
        index = offsets(spec).numpy()
        if rows.positions is not None:
            shape = (rows.token_queries + rows.padding_queries, rows.tokens)
            name = f"{self.name}.bias"
            return rows.positions.pair_columns(self.graph, table, index, shape, name)
        index = index[: rows.token_queries, : rows.tokens]
        index = np.pad(index, ((0, rows.padding_queries), (0, 0)))
        if self.graph.operators == "pnnx":
            return self.graph.constant(f"{self.name}.bias", np.ascontiguousarray(table[:, index]))
        positions = self.graph.constant("bias.offsets", index.astype(np.int64), shared=True)
        inputs = [self.graph.constant(f"{self.name}.bias.table", table), positions]
        return self.node("Gather", inputs, "bias", axis=1)


def joined_bias(layers: Sequence[Linear]) -> Array:
    """Return the biases side by side, with zeros where a layer has none."""
    return np.concatenate(
        [
            np.zeros(layer.weight.shape[1], np.float32) if layer.bias is None else layer.bias
            for layer in layers
        ]
    )
