"""From the image to token rows: patch embedding, positions, prefix tokens.

Ensures (tokens, width) rows, or (batch, tokens, width): the convolution's bias is folded into the positions, and where the stem fills only a part of the
stream, its weights get zero columns for the rest.
"""

from __future__ import annotations

import numpy as np

from ...compress.architecture import Architecture
from .form import Form
from .graph import Array, Graph
from .rows import Linear, linear

State = dict[str, Array]


def stem(graph: Graph, form: Form, architecture: Architecture, state: State, *, batch: int | str) -> str:
    """images -> rows. `batch`: a size, or the name of a free dimension."""
    weight, offset, prefix = _weights(architecture, state)
    width, (down, across) = weight.shape[0], architecture.grid
    patch = architecture.stem.patch
    whole = architecture.image[1] == down * patch[0] and architecture.image[2] == across * patch[1]
    if form.stem == "matrix" and whole:
        rows = _cut(graph, form, architecture)
        layer = Linear(np.ascontiguousarray(weight.reshape(width, -1).T), offset)
        rows = linear(graph, form, rows, layer, "stem")
    else:
        inputs = ["images", graph.constant("stem.weight", weight)]
        pixels = graph.node("Conv", inputs, "stem", kernel_shape=list(patch), strides=list(patch))
        matrix = form.rows == "matrix"
        flat = graph.node("Reshape", [pixels, graph.sizes([width, -1] if matrix else [0, width, -1])], "stem.flat")
        rows = str(graph.node("Transpose", [flat], "stem.rows", perm=[1, 0] if matrix else [0, 2, 1]))
        if offset is not None:
            rows = str(graph.node("Add", [rows, graph.constant("stem.position", offset)], "stem.placed"))
    if prefix is None:
        return rows
    if form.rows == "matrix":
        return str(graph.node("Concat", [graph.constant("prefix", prefix), rows], "tokens", axis=0))
    if isinstance(batch, int):
        return str(graph.node("Concat", [graph.constant("prefix", np.repeat(prefix[None], batch, axis=0)), rows], "tokens", axis=1))
    first = graph.node("Shape", ["images"], "batch", start=0, end=1)
    shape = graph.node("Concat", [first, graph.sizes(prefix.shape)], "prefix.shape", axis=0)
    repeated = graph.node("Expand", [graph.constant("prefix", prefix[None]), shape], "prefix.repeated")
    return str(graph.node("Concat", [repeated, rows], "tokens", axis=1))


def _weights(architecture: Architecture, state: State) -> tuple[Array, Array | None, Array | None]:
    """Convolution (width, channels, height, width), what is added to patch rows, and prefix rows; widened to the stream unless a norm follows."""
    weight, bias = state["stem.weight"], state.get("stem.bias")
    offset, prefix = state.get("position"), state.get("prefix")
    if bias is not None:
        offset = bias[None] if offset is None else offset + bias
    if architecture.stem_writes is None or architecture.stem_norm is not None:
        return weight, offset, prefix
    indices = list(architecture.stem_writes)
    wide = np.zeros((architecture.embed, *weight.shape[1:]), np.float32)
    wide[indices] = weight
    return wide, widen(offset, indices, architecture.embed), widen(prefix, indices, architecture.embed)


def widen(rows: Array | None, indices: list[int], width: int) -> Array | None:
    """(…, written) -> (…, width) with zeros elsewhere."""
    if rows is None:
        return None
    wide = np.zeros((*rows.shape[:-1], width), np.float32)
    wide[..., indices] = rows
    return wide


def _cut(graph: Graph, form: Form, architecture: Architecture) -> str:
    """images -> (…, patches, channels * patch area)."""
    channels, (down, across), patch = architecture.image[0], architecture.grid, architecture.stem.patch
    area = channels * patch[0] * patch[1]
    matrix = form.rows == "matrix"
    lead = [channels] if matrix else [0, channels]
    blocks = graph.node("Reshape", ["images", graph.sizes([*lead, down, patch[0], across, patch[1]])], "stem.blocks")
    turned = graph.node("Transpose", [blocks], "stem.turned", perm=[1, 3, 0, 2, 4] if matrix else [0, 2, 4, 1, 3, 5])
    return str(graph.node("Reshape", [turned, graph.sizes([-1, area] if matrix else [0, -1, area])], "stem.patches"))
