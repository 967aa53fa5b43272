"""From the image to token rows: convolutions, patch embedding, positions, prefix tokens.

Ensures (tokens, width) rows, or (batch, tokens, width): the convolution's bias is folded into the
positions, and where the stem fills only a part of the stream, its weights get zero columns for the
rest. Where a norm stands between, neither can be, and both are done after it.
"""

from __future__ import annotations

import numpy as np

from ...compress.network.architecture import Architecture
from .ffn import activation
from .form import Form
from .graph import Array, Graph
from .rows import Linear, int8_linear, linear, norm, place

State = dict[str, Array]


def stem(
    graph: Graph,
    form: Form,
    architecture: Architecture,
    state: State,
    *,
    batch: int | str,
    padding: int = 0,
) -> str:
    """images -> rows, and `padding` rows of zeros behind them. `batch`: a size, or the name of a
    free dimension.
    """
    weight, offset, prefix, rest = _weights(architecture, state)
    rows = _patches(graph, form, architecture, state, weight, offset)
    if architecture.patch_norm is not None:
        rows = norm(
            graph,
            rows,
            architecture.patch_norm,
            state.get("patch_norm.weight"),
            state.get("patch_norm.bias"),
            "patch_norm",
        )
        if "position" in state:
            rows = graph.node(
                "Add", [rows, graph.constant("position", state["position"])], "stem.placed"
            )
    width = weight.shape[0]
    if prefix is not None or padding:
        rows = _between(
            graph,
            form,
            rows,
            prefix,
            np.zeros((padding, width), np.float32) if padding else None,
            batch,
        )
    if architecture.stem_norm is not None:
        rows = norm(
            graph,
            rows,
            architecture.stem_norm,
            state.get("stem_norm.weight"),
            state.get("stem_norm.bias"),
            "stem_norm",
        )
    return place(graph, rows, rest, architecture.embed, "stem.place") if rest is not None else rows


def _patches(
    graph: Graph,
    form: Form,
    architecture: Architecture,
    state: State,
    weight: Array,
    offset: Array | None,
) -> str:
    spec, width, matrix = architecture.stem, weight.shape[0], form.rows == "matrix"
    stride = spec.stride or spec.patch
    (down, across), patch = architecture.grid, spec.patch
    whole = architecture.image[1] == down * patch[0] and architecture.image[2] == across * patch[1]
    if (
        form.stem != "conv"
        and whole
        and stride == patch
        and spec.padding == (0, 0)
        and not spec.before
    ):
        rows = _cut(graph, form, architecture)
        flat = np.ascontiguousarray(weight.reshape(width, -1).T)
        if form.stem != "int8" or graph.linears != "int8":
            return linear(graph, form, rows, Linear(flat, offset), "stem")
        # Positions are a row each, and the product adds one row to all.
        rows = int8_linear(graph, rows, Linear(flat, None), "stem")
        return (
            rows
            if offset is None
            else graph.node("Add", [rows, graph.constant("stem.position", offset)], "stem.placed")
        )
    images = "images"
    for number, conv in enumerate(spec.before):
        name = f"before.{number}"
        inputs = [images, graph.constant(f"{name}.weight", state[f"{name}.conv.weight"])]
        if conv.bias:
            inputs.append(graph.constant(f"{name}.bias", state[f"{name}.conv.bias"]))
        images = graph.node(
            "Conv",
            inputs,
            name,
            kernel_shape=list(conv.kernel),
            strides=list(conv.stride),
            pads=2 * list(conv.padding),
        )
        images = activation(graph, conv.act, images, f"{name}.act")
    pixels = graph.node(
        "Conv",
        [images, graph.constant("stem.weight", weight)],
        "stem",
        kernel_shape=list(patch),
        strides=list(stride),
        pads=2 * list(spec.padding),
    )
    flat = graph.node(
        "Reshape", [pixels, graph.sizes([width, -1] if matrix else [0, width, -1])], "stem.flat"
    )
    rows = graph.node("Transpose", [flat], "stem.rows", perm=[1, 0] if matrix else [0, 2, 1])
    if offset is None:
        return rows
    return graph.node("Add", [rows, graph.constant("stem.position", offset)], "stem.placed")


def _between(
    graph: Graph,
    form: Form,
    rows: str,
    prefix: Array | None,
    padding: Array | None,
    batch: int | str,
) -> str:
    """Prefix rows, rows, padding rows."""
    parts = [("prefix", prefix), ("", None), ("padding", padding)]
    if form.rows == "matrix":
        listed = [
            rows if not label else graph.constant(label, value)  # type: ignore[arg-type]
            for label, value in parts
            if not label or value is not None
        ]
        return graph.node("Concat", listed, "tokens", axis=0)
    listed = [
        rows if not label else _repeated(graph, label, value, batch)  # type: ignore[arg-type]
        for label, value in parts
        if not label or value is not None
    ]
    return graph.node("Concat", listed, "tokens", axis=1)


def _repeated(graph: Graph, label: str, value: Array, batch: int | str) -> str:
    """The same rows for each image."""
    if isinstance(batch, int):
        return graph.constant(label, np.repeat(value[None], batch, axis=0))
    first = graph.node("Shape", ["images"], f"{label}.batch", start=0, end=1)
    shape = graph.node("Concat", [first, graph.sizes(value.shape)], f"{label}.shape", axis=0)
    return graph.node("Expand", [graph.constant(label, value[None]), shape], f"{label}.repeated")


def _weights(
    architecture: Architecture, state: State
) -> tuple[Array, Array | None, Array | None, tuple[int, ...] | None]:
    """Convolution (width, channels, height, width), what is added to its outputs, prefix rows, and
    the channels to place all on afterwards.
    """
    weight, bias = state["stem.weight"], state.get("stem.bias")
    offset, prefix = state.get("position"), state.get("prefix")
    if architecture.patch_norm is not None:
        offset = None if bias is None else bias[None]
    elif bias is not None:
        offset = bias[None] if offset is None else offset + bias
    writes = architecture.stem_writes
    if writes is None or architecture.stem_norm is not None or architecture.patch_norm is not None:
        return weight, offset, prefix, writes
    indices = list(writes)
    wide = np.zeros((architecture.embed, *weight.shape[1:]), np.float32)
    wide[indices] = weight
    return (
        wide,
        widen(offset, indices, architecture.embed),
        widen(prefix, indices, architecture.embed),
        None,
    )


def widen(rows: Array | None, indices: list[int], width: int) -> Array | None:
    """(…, written) -> (…, width) with zeros elsewhere."""
    if rows is None:
        return None
    wide = np.zeros((*rows.shape[:-1], width), np.float32)
    wide[..., indices] = rows
    return wide


def _cut(graph: Graph, form: Form, architecture: Architecture) -> str:
    """images -> (…, patches, channels * patch area)."""
    channels, (down, across), patch = (
        architecture.image[0],
        architecture.grid,
        architecture.stem.patch,
    )
    area = channels * patch[0] * patch[1]
    matrix = form.rows == "matrix"
    lead = [channels] if matrix else [0, channels]
    blocks = graph.node(
        "Reshape", ["images", graph.sizes([*lead, down, patch[0], across, patch[1]])], "stem.blocks"
    )
    turned = graph.node(
        "Transpose", [blocks], "stem.turned", perm=[1, 3, 0, 2, 4] if matrix else [0, 2, 4, 1, 3, 5]
    )
    return graph.node(
        "Reshape", [turned, graph.sizes([-1, area] if matrix else [0, -1, area])], "stem.patches"
    )
