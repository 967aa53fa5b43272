"""The places of chosen tokens: which rows of the tables of rope and relative bias they read.

Behind a selection by content the tokens of each image are others, so that what is a constant for
the tokens of the stem is gathered. The nodes are named like those of selections, which reduced
precisions leave alone, and equal ones are written once for all attentions between two selections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..graphs.model_proto import SELECT
from .graph import Array, Graph


@dataclass(frozen=True)
class Positions:
    """For each row of the stream its token of the stem; rows that pad the stream have the first.

    Attributes:
        value: int64 (rows,), or (batch, rows) if `by_image`.
        rows: Number of rows.
        by_image: Whether the images of a batch have their own.
    """

    value: str
    rows: int
    by_image: bool

    def of(self, graph: Graph, chosen: Positions) -> Positions:
        """The positions behind a selection that keeps the rows `chosen` of the stream."""
        by_image, name = self.by_image or chosen.by_image, f"{SELECT}positions.kept"
        if self.by_image and chosen.by_image:
            each = graph.node("Unsqueeze", [chosen.value, graph.sizes([-1])], f"{name}.each")
            value = graph.node("GatherND", [self.value, each], name, batch_dims=1)
        else:
            inputs = [self.value, chosen.value]
            value = graph.node("Gather", inputs, name, axis=1 if self.by_image else 0)
        return Positions(value, chosen.rows, by_image)

    def table_rows(self, graph: Graph, table: Array, count: int, name: str) -> str:
        """Gather the rows of a table for the first rows of the stream.

        Args:
            graph: Gets the nodes.
            table: One row for each token of the stem.
            count: How many rows of the stream.
            name: Name of the table, part of the names of the nodes.

        Returns:
            (count, …), or (batch, count, …) by image.
        """
        label = _label(name)
        inputs = [graph.constant(f"{label}.table", table, shared=True), self._first(graph, count)]
        return graph.shared_node("Gather", inputs, label, axis=0)

    def pair_columns(
        self, graph: Graph, table: Array, index: Array, shape: tuple[int, int], name: str
    ) -> str:
        """Gather the columns of a table for the pairs of the first rows of the stream.

        Args:
            graph: Gets the nodes.
            table: (heads, columns).
            index: The column of each pair of tokens of the stem, (tokens, tokens).
            shape: How many rows are queries, and how many are keys.
            name: Name of the result.

        Returns:
            (heads, queries, keys), or (batch, heads, queries, keys) by image.
        """
        pairs = _label("pairs")
        queries, keys = (self._first(graph, count) for count in shape)
        column, row = graph.sizes([-1]), graph.sizes([-2])
        queries = graph.shared_node("Unsqueeze", [queries, column], f"{pairs}.queries")
        keys = graph.shared_node("Unsqueeze", [keys, row], f"{pairs}.keys")
        length = graph.constant(f"{pairs}.length", np.array(len(index), np.int64))
        starts = graph.shared_node("Mul", [queries, length], f"{pairs}.starts")
        places = graph.shared_node("Add", [starts, keys], pairs)
        flat = graph.constant("bias.offsets", index.ravel().astype(np.int64), shared=True)
        offsets = graph.shared_node("Gather", [flat, places], f"{pairs}.offsets", axis=0)
        inputs = [graph.constant(f"{name}.table", table), offsets]
        found = graph.node("Gather", inputs, _label(name), axis=1)
        if not self.by_image:
            return found
        return graph.node("Transpose", [found], _label(f"{name}.by_image"), perm=[1, 0, 2, 3])

    def _first(self, graph: Graph, count: int) -> str:
        if count == self.rows:
            return self.value
        bounds = [graph.sizes([0]), graph.sizes([count]), graph.sizes([-1])]
        return graph.shared_node("Slice", [self.value, *bounds], _label("first"))


def _label(name: str) -> str:
    return name if name.startswith(SELECT) else f"{SELECT}positions.{name}"
