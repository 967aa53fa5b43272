"""The residual stream: what is added to it waits for the next norm, which may take residual, bias
and norm in one node.
"""

from __future__ import annotations

import numpy as np

from ...compress.network.architecture import NormSpec
from .form import Form
from .graph import Array, Graph
from .rows import RUNTIME, first_tokens, norm


class Stream:
    """(tokens, embed) rows. Ensures that a branch reads everything that was written before it.

    With `skip-norm`, one written value (whose bias is not added yet) is held back until a norm over
    the whole stream asks for it.
    """

    def __init__(self, graph: Graph, form: Form, value: str) -> None:
        self.graph, self.form, self.value = graph, form, value
        self._held: tuple[str, Array | None] | None = None

    @property
    def holds_back(self) -> bool:
        """Whether writers should leave their bias to the stream."""
        return self.form.residual == "skip-norm"

    def write(self, y: str, bias: Array | None, name: str) -> None:
        """stream += y + bias."""
        if self.holds_back and self._held is None:
            self._held = (y, bias)
            return
        self.settle(name)
        self._add(y, bias, name)

    def write_constant(self, vector: Array, name: str) -> None:
        """stream += vector, the same for each token."""
        self.settle(name)
        self.value = self.graph.node(
            "Add", [self.value, self.graph.constant(f"{name}.value", vector)], name
        )

    def write_by_index(self, y: str, writes: tuple[int, ...], count: int, name: str) -> None:
        """stream[..., writes] += y, for `count` rows of a matrix."""
        self.settle(name)
        # One row of indices on disk; runtimes spread it when they load.
        where = self.graph.node(
            "Expand",
            [self.graph.sizes_row(writes), self.graph.sizes([count, len(writes)])],
            f"{name}.channels",
        )
        self.value = self.graph.node(
            "ScatterElements", [self.value, where, y], f"{name}.residual", axis=1, reduction="add"
        )

    def read(self, name: str) -> str:
        """Everything written so far."""
        self.settle(name)
        return self.value

    def read_normed(
        self, spec: NormSpec, weight: Array | None, bias: Array | None, name: str
    ) -> str:
        """norm(stream)."""
        if self._held is None or spec.kind != "layer":
            return norm(self.graph, self.read(name), spec, weight, bias, name)
        y, y_bias = self._held
        self._held = None
        scale = np.ones(spec.width, np.float32) if weight is None else weight
        shift = np.zeros(spec.width, np.float32) if bias is None else bias
        inputs = [
            y,
            self.value,
            self.graph.constant(f"{name}.weight", scale),
            self.graph.constant(f"{name}.bias", shift),
        ]
        if y_bias is not None:
            inputs.append(self.graph.constant(f"{name}.written", y_bias))
        outputs = self.graph.node_outputs(
            "SkipLayerNormalization", inputs, name, 4, domain=RUNTIME, epsilon=spec.eps
        )
        self.graph.drop_outputs([1, 2])
        self.value = outputs[3]
        return str(outputs[0])

    def keep_first(self, count: int, name: str) -> None:
        """Forget all tokens but the first `count`."""
        self.settle(name)
        self.value = first_tokens(self.graph, self.form, self.value, count, name)

    def settle(self, name: str) -> None:
        """Add what is held back."""
        if self._held is not None:
            y, bias = self._held
            self._held = None
            self._add(y, bias, f"{name}.held")

    def _add(self, y: str, bias: Array | None, name: str) -> None:
        if bias is not None:
            y = self.graph.node(
                "Add", [y, self.graph.constant(f"{name}.bias", bias)], f"{name}.biased"
            )
        self.value = self.graph.node("Add", [self.value, y], f"{name}.residual")
