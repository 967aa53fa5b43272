"""The residual stream, in which a written value can wait for the norm that reads it.

ONNX Runtime's SkipLayerNormalization takes residual, bias and norm in one node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .form import Form
from .graph import RUNTIME, Array, Graph
from .rows import Norm, first_tokens, norm


class Stream:
    """(tokens, embed) rows, or with a batch. Every read sees everything that was written before it.

    With `skip-norm`, one written value (whose bias is not added yet) is deferred until a norm over
    the whole stream reads it.
    """

    def __init__(self, graph: Graph, form: Form, value: str) -> None:
        self.graph, self.form, self.value = graph, form, value
        self._deferred: tuple[str, Array | None] | None = None

    @property
    def defers(self) -> bool:
        """Whether writers should leave their bias to the stream."""
        return self.form.residual == "skip-norm"

    def write(self, y: str, bias: Array | None, name: str) -> None:
        """Add y + bias to the stream."""
        if self.defers and self._deferred is None:
            self._deferred = (y, bias)
            return
        self.settle(name)
        self._add(y, bias, name)

    def write_constant(self, vector: Array, name: str) -> None:
        """Add `vector` to each token of the stream."""
        self.settle(name)
        constant = self.graph.constant(f"{name}.value", vector)
        self.value = self.graph.node("Add", [self.value, constant], name)

    def write_by_index(self, y: str, channels: Sequence[int], count: int, name: str) -> None:
        """Add y to stream[:, channels], for matrix rows.

        Args:
            y: Rows (count, len(channels)).
            channels: The channels that are written.
            count: Number of rows of the stream.
            name: Prefix of the node names.
        """
        self.settle(name)
        graph = self.graph
        # One row of indices in the file; runtimes expand it when they load.
        shape = [graph.sizes_row(channels), graph.sizes([count, len(channels)])]
        index = graph.node("Expand", shape, f"{name}.channels")
        self.value = graph.node(
            "ScatterElements", [self.value, index, y], f"{name}.residual", axis=1, reduction="add"
        )

    def read(self, name: str) -> str:
        """Return everything written so far."""
        self.settle(name)
        return self.value

    def read_normed(self, layer: Norm, name: str) -> str:
        """Return norm(stream)."""
        spec = layer.spec
        if self._deferred is None or spec.kind != "layer":
            return norm(self.graph, self.read(name), layer, name)
        y, y_bias = self._deferred
        self._deferred = None
        weight = np.ones(spec.width, np.float32) if layer.weight is None else layer.weight
        bias = np.zeros(spec.width, np.float32) if layer.bias is None else layer.bias
        inputs = [
            y,
            self.value,
            self.graph.constant(f"{name}.weight", weight),
            self.graph.constant(f"{name}.bias", bias),
        ]
        if y_bias is not None:
            inputs.append(self.graph.constant(f"{name}.written", y_bias))
        outputs = self.graph.node_outputs(
            "SkipLayerNormalization", inputs, name, 4, domain=RUNTIME, epsilon=spec.eps
        )
        self.graph.drop_outputs([1, 2])
        self.value = outputs[3]
        return outputs[0]

    def keep_first(self, count: int, name: str) -> None:
        """Drop all tokens but the first `count`."""
        self.settle(name)
        self.value = first_tokens(self.graph, self.form, self.value, count, name)

    def settle(self, name: str) -> None:
        """Add the deferred value."""
        if self._deferred is not None:
            y, bias = self._deferred
            self._deferred = None
            self._add(y, bias, f"{name}.deferred")

    def _add(self, y: str, bias: Array | None, name: str) -> None:
        if bias is not None:
            constant = self.graph.constant(f"{name}.bias", bias)
            y = self.graph.node("Add", [y, constant], f"{name}.biased")
        self.value = self.graph.node("Add", [self.value, y], f"{name}.residual")
