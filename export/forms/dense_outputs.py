"""Outputs besides the logits: normed tokens, pooled features, and the stream after a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...compress.network.architecture import Architecture
from ...compress.network.named_outputs import OutputSpec, needs_all_tokens
from .form import Form
from .graph import Graph
from .rows import scatter_channels, slice_tokens
from .stream import Stream


def form_for_outputs(form: Form, architecture: Architecture, outputs: Sequence[OutputSpec]) -> Form:
    """Return a form without the choices that change or leave out what outputs contain.

    Args:
        form: The form.
        architecture: The network.
        outputs: The requested outputs; empty for the logits alone.
    """
    if needs_all_tokens(architecture, outputs):
        form = replace(form, last_queries=False, last_keys=False)
    # A block's output is the stream itself, which centring changes.
    if form.norm == "centred-rms" and any(output.kind == "block" for output in outputs):
        form = replace(form, norm="layer")
    return form


class DenseOutputs:
    """Collects the values of the requested outputs while a network is written.

    Args:
        graph: Gets the nodes.
        form: Decides the layout of the rows.
        architecture: The network.
        outputs: The requested outputs; empty for the logits alone.
    """

    def __init__(
        self, graph: Graph, form: Form, architecture: Architecture, outputs: Sequence[OutputSpec]
    ) -> None:
        self.graph, self.form, self.architecture = graph, form, architecture
        self.outputs = outputs
        self._values: dict[str, str] = {}

    @property
    def all_tokens(self) -> bool:
        """Whether normed tokens are requested that the head may not read."""
        return any(output.kind in ("tokens", "patches") for output in self.outputs)

    @property
    def features(self) -> bool:
        """Whether the pooled features are requested."""
        return any(output.kind == "features" for output in self.outputs)

    def after_steps(self, stream: Stream, count: int) -> None:
        """Add the outputs that are read from the stream after `count` steps."""
        for output in self.outputs:
            if output.after == count:
                value = stream.read(f"{output.name}.stream")
                self._values[output.name] = self._rows(value, output)

    def add_tokens(self, normed: str) -> None:
        """Add the outputs that are read from all tokens after the final norm."""
        for output in self.outputs:
            if output.kind in ("tokens", "patches"):
                self._values[output.name] = self._rows(normed, output)

    def add_features(self, pooled: str) -> None:
        """Add the features, from one row for each image."""
        for output in self.outputs:
            if output.kind == "features":
                self._values[output.name] = self._spread(pooled, output)

    def values(self, logits: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return (name, value, shape for one image) of each output, in order.

        Args:
            logits: The value of the logits.
        """
        if not self.outputs:
            return [("logits", logits, (self.architecture.classes,))]
        values = {**self._values, "logits": logits}
        return [(output.name, values[output.name], output.shape) for output in self.outputs]

    def _rows(self, x: str, output: OutputSpec) -> str:
        """The rows of an output: (tokens, width), or with a batch -> (batch, rows, width)."""
        graph, tokens, name = self.graph, self.architecture.tokens, output.name
        # Rows of padding follow the tokens.
        first = self.architecture.tokens - output.shape[0]
        if first or self.form.tile > 1:
            x = slice_tokens(graph, self.form, x, first, tokens, f"{name}.rows")
        x = self._spread(x, output)
        if self.form.rows == "matrix":
            x = graph.reshape(x, [1, *output.shape], f"{name}.batch")
        return x

    def _spread(self, x: str, output: OutputSpec) -> str:
        if output.writes is None:
            return x
        name = f"{output.name}.channels"
        return scatter_channels(self.graph, x, output.writes, output.shape[-1], name)
