"""From the image to token rows: convolutions, patch embedding, positions, prefix tokens.

The convolution's bias is folded into the positions, and where the stem fills only a part of the
stream, its weights get zero columns for the rest. Where a norm stands between, neither can be
folded, and both are written after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...compress.network.architecture import Architecture, SoftSplitSpec
from ...compress.network.token_order import stem_runs
from .ffn import activation
from .form import Form
from .graph import Array, Graph, State, entries_below
from .rows import (
    Linear,
    Norm,
    int8_linear,
    linear,
    norm,
    scatter_array,
    scatter_channels,
    slice_tokens,
)
from .soft_split import soft_split

# Share of the patches up to which selecting and multiplying them is faster than a convolution of
# all. ONNX Runtime 1.31, one thread, 196 patches: 86 % for DeiT-T, 96 % for DeiT-S; with 41 % it
# takes 0.62 and 0.54 of the convolution's time.
FEW_PATCHES = 0.9


def stem(
    graph: Graph,
    form: Form,
    architecture: Architecture,
    state: State,
    *,
    batch: int | str,
    padding: int = 0,
) -> str:
    """Write everything before the first sub-layer.

    Args:
        graph: Gets the nodes.
        form: Decides the layout of the rows and how patches are cut.
        architecture: The network.
        state: Its weights.
        batch: A size, or the name of a free dimension.
        padding: How many rows of zeros to append.

    Returns:
        Rows (tokens + padding, embed), or with a batch.
    """
    weights = _stem_weights(architecture, state)
    rows = _patches(graph, form, architecture, state, weights)
    if architecture.patch_norm is not None:
        layer = Norm.of(architecture.patch_norm, state, "patch_norm")
        rows = norm(graph, rows, layer, "patch_norm")
        if "position" in state:
            position = graph.constant("position", state["position"])
            rows = graph.node("Add", [rows, position], "stem.positioned")
    zeros = np.zeros((padding, weights.patch.shape[0]), np.float32) if padding else None
    if weights.prefix is not None or zeros is not None:
        rows = _concatenated(graph, form, architecture, (weights.prefix, rows, zeros), batch)
    if architecture.stem_norm is not None:
        layer = Norm.of(architecture.stem_norm, state, "stem_norm")
        rows = norm(graph, rows, layer, "stem_norm")
    if weights.channels is None:
        return rows
    return scatter_channels(graph, rows, weights.channels, architecture.embed, "stem.scattered")


@dataclass(frozen=True)
class _StemWeights:
    """Folded weights of the stem.

    Attributes:
        patch: Kernel (width, channels, height, width).
        offset: What is added to its outputs, (patches or 1, width), or None.
        prefix: Rows of the learned tokens (tokens, width), or None.
        channels: Where to scatter the rows in the stream afterwards, or None.
    """

    patch: Array
    offset: Array | None
    prefix: Array | None
    channels: Sequence[int] | None


def _stem_weights(architecture: Architecture, state: State) -> _StemWeights:
    patch, bias = state["stem.weight"], state.get("stem.bias")
    offset, prefix = state.get("position"), state.get("prefix")
    if architecture.patch_norm is not None:
        offset = None if bias is None else bias[None]
    elif bias is not None:
        offset = bias[None] if offset is None else offset + bias
    writes, embed = architecture.stem_writes, architecture.embed
    if writes is None or architecture.stem_norm is not None or architecture.patch_norm is not None:
        return _StemWeights(patch, offset, prefix, writes)
    wide = scatter_array(patch.T, writes, embed).T
    return _StemWeights(
        wide,
        None if offset is None else scatter_array(offset, writes, embed),
        None if prefix is None else scatter_array(prefix, writes, embed),
        None,
    )


def _patches(
    graph: Graph, form: Form, architecture: Architecture, state: State, weights: _StemWeights
) -> str:
    if _by_product(graph, form, architecture):
        return _patches_by_product(graph, form, architecture, weights)
    spec, width, matrix = architecture.stem, weights.patch.shape[0], form.rows == "matrix"
    images = "images"
    sizes = spec.sizes(*architecture.image[1:])
    for number, (conv, size) in enumerate(zip(spec.before, sizes, strict=False)):
        name = f"before.{number}"
        if isinstance(conv, SoftSplitSpec):
            part = entries_below(state, name)
            images = soft_split(graph, form, conv, part, images, size=size, name=name)
            continue
        inputs = [images, graph.constant(f"{name}.weight", state[f"{name}.conv.weight"])]
        if conv.bias:
            inputs.append(graph.constant(f"{name}.bias", state[f"{name}.conv.bias"]))
        images = _convolution(graph, inputs, name, conv.kernel, conv.stride, conv.padding)
        images = activation(graph, conv.act, images, f"{name}.act")
    inputs = [images, graph.constant("stem.weight", weights.patch)]
    pixels = _convolution(
        graph, inputs, "stem", spec.patch, spec.stride or spec.patch, spec.padding
    )
    flat = graph.reshape(pixels, [width, -1] if matrix else [0, width, -1], "stem.flat")
    if architecture.order is not None and graph.operators == "pnnx":
        # pnnx has no Gather of rows; a product with a selection matrix is exact.
        selection = np.eye(math.prod(architecture.grid), dtype=np.float32)[:, architecture.order]
        flat = graph.product(flat, selection, "stem.selection", "stem.selected")
    rows = graph.node("Transpose", [flat], "stem.rows", perm=[1, 0] if matrix else [0, 2, 1])
    if graph.operators != "pnnx":
        rows = _ordered(graph, form, architecture, rows)
    return _with_offset(graph, rows, weights.offset)


def _by_product(graph: Graph, form: Form, architecture: Architecture) -> bool:
    """Whether patches are cut out by a Reshape and multiplied.

    A convolution also computes the patches that are never embedded.
    """
    if not _reshapable(architecture):
        return False
    few = architecture.patches <= FEW_PATCHES * math.prod(architecture.grid)
    return form.stem != "conv" or (few and graph.operators != "pnnx")


def _ordered(graph: Graph, form: Form, architecture: Architecture, rows: str) -> str:
    """Select the rows of the patches that are embedded, in the order of the stream."""
    if architecture.order is None:
        return rows
    places = graph.constant("stem.order", np.array(architecture.order, np.int64))
    axis = 0 if form.rows == "matrix" else 1
    return graph.node("Gather", [rows, places], "stem.selected", axis=axis)


def _convolution(
    graph: Graph,
    inputs: Sequence[str],
    name: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> str:
    return graph.node(
        "Conv",
        inputs,
        name,
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=2 * list(padding),
    )


def _reshapable(architecture: Architecture) -> bool:
    """Whether patches tile the image without overlap, so that a Reshape can cut them out."""
    spec, (down, across) = architecture.stem, architecture.grid
    height, width = architecture.image[1:]
    return (
        height == down * spec.patch[0]
        and width == across * spec.patch[1]
        and (spec.stride or spec.patch) == spec.patch
        and spec.padding == (0, 0)
        and not spec.before
    )


def _patches_by_product(
    graph: Graph, form: Form, architecture: Architecture, weights: _StemWeights
) -> str:
    # Before the product, so that only patches that are embedded are multiplied.
    rows = _ordered(graph, form, architecture, _pixel_rows(graph, form, architecture))
    matrix = np.ascontiguousarray(weights.patch.reshape(weights.patch.shape[0], -1).T)
    if form.stem != "int8" or graph.linears != "int8":
        return linear(graph, form, rows, Linear(matrix, weights.offset), "stem")
    # The operator adds one bias row to all rows, and positions are a row each.
    rows = int8_linear(graph, rows, Linear(matrix, None), "stem")
    return _with_offset(graph, rows, weights.offset)


def _with_offset(graph: Graph, rows: str, offset: Array | None) -> str:
    if offset is None:
        return rows
    constant = graph.constant("stem.position", offset)
    return graph.node("Add", [rows, constant], "stem.positioned")


def _pixel_rows(graph: Graph, form: Form, architecture: Architecture) -> str:
    """Cut images into rows (…, patches, channels * patch area)."""
    channels, (down, across) = architecture.image[0], architecture.grid
    height, width = architecture.stem.patch
    matrix = form.rows == "matrix"
    lead = [channels] if matrix else [0, channels]
    blocks = graph.reshape("images", [*lead, down, height, across, width], "stem.blocks")
    patches_first = [1, 3, 0, 2, 4] if matrix else [0, 2, 4, 1, 3, 5]
    blocks = graph.node("Transpose", [blocks], "stem.patches_first", perm=patches_first)
    area = channels * height * width
    return graph.reshape(blocks, [-1, area] if matrix else [0, -1, area], "stem.patches")


def _concatenated(
    graph: Graph,
    form: Form,
    architecture: Architecture,
    parts: tuple[Array | None, str, Array | None],
    batch: int | str,
) -> str:
    """Rows of learned tokens and of patches in the order of the stream, padding rows."""
    learned, patches, padding = parts
    listed: list[str] = []
    for is_learned, start, stop in stem_runs(architecture):
        # One run, or the first of several.
        suffix = f".{start}" if start else ""
        if is_learned:
            assert learned is not None
            listed.append(_rows(graph, form, f"prefix{suffix}", learned[start:stop], batch))
        elif stop - start == architecture.patches:
            listed.append(patches)
        else:
            name = f"stem.run{suffix}"
            listed.append(slice_tokens(graph, form, patches, start, stop, name))
    if padding is not None:
        listed.append(_rows(graph, form, "padding", padding, batch))
    return graph.node("Concat", listed, "tokens", axis=0 if form.rows == "matrix" else 1)


def _rows(graph: Graph, form: Form, name: str, value: Array, batch: int | str) -> str:
    """Constant rows, for each image."""
    if form.rows == "matrix":
        return graph.constant(name, value)
    return _repeated(graph, name, value, batch)


def _repeated(graph: Graph, label: str, value: Array, batch: int | str) -> str:
    """The same rows for each image."""
    if isinstance(batch, int):
        return graph.constant(label, np.repeat(value[None], batch, axis=0))
    first = graph.node("Shape", ["images"], f"{label}.batch", start=0, end=1)
    shape = graph.node("Concat", [first, graph.sizes(value.shape)], f"{label}.shape", axis=0)
    return graph.node("Expand", [graph.constant(label, value[None]), shape], f"{label}.repeated")
