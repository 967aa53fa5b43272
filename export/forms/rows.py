"""Linear layers, norms and selections over token rows, in the two row layouts.

Rows are (tokens, width) for `matrix` forms and (batch, tokens, width) for `batch` forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...compress.network.architecture import NormSpec
from ..graphs.model_proto import in_selection, in_stem
from .form import Form
from .graph import RUNTIME, Array, Graph


@dataclass(frozen=True)
class Linear:
    """y = x W + b with W of shape (in, out), already transposed for the product."""

    weight: Array
    bias: Array | None

    @classmethod
    def of(cls, state: Mapping[str, Array], name: str) -> Linear:
        """Read `name.weight` (out, in) and, if present, `name.bias`."""
        return cls(np.ascontiguousarray(state[f"{name}.weight"].T), state.get(f"{name}.bias"))


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension; weight and bias are (width,), (heads, width) or None."""

    spec: NormSpec
    weight: Array | None = None
    bias: Array | None = None

    @classmethod
    def of(cls, spec: NormSpec, state: Mapping[str, Array], name: str) -> Norm:
        """Read `name.weight` and `name.bias` where they are present."""
        return cls(spec, state.get(f"{name}.weight"), state.get(f"{name}.bias"))


def linear(graph: Graph, form: Form, x: str, layer: Linear, name: str) -> str:
    """Write a Linear as one Gemm (matrix rows), as MatMul and Add, or in eight bits.

    Args:
        graph: Gets the nodes; `graph.linears` selects the kind.
        form: Decides between Gemm and MatMul. ONNX Runtime fuses MatMul and Add again, at the
            price of Reshapes.
        x: Rows (…, in).
        layer: The weights.
        name: Name of the node.

    Returns:
        Rows (…, out).
    """
    if graph.linears == "int8" and not in_stem(name) and not in_selection(name):
        return int8_linear(graph, x, layer, name)
    weight, label = layer.weight, f"{name}.weight"
    if layer.bias is None:
        return graph.product(x, weight, label, name)
    if form.rows == "matrix" and graph.linears != "product":
        inputs = [x, graph.constant(label, weight), graph.constant(f"{name}.bias", layer.bias)]
        return graph.node("Gemm", inputs, name)
    product = graph.product(x, weight, label, name)
    return graph.node("Add", [product, graph.constant(f"{name}.bias", layer.bias)], f"{name}.add")


def int8_linear(graph: Graph, x: str, layer: Linear, name: str) -> str:
    """Write a Linear as ONNX Runtime's DynamicQuantizeMatMul.

    Args:
        graph: Gets the node; `graph.weight_bits` bounds the quantized weights.
        x: Rows (…, in), quantized at run time with one scale for each image.
        layer: The weights, quantized here with one scale for each output column.
        name: Name of the node.

    Returns:
        Rows (…, out).
    """
    largest = 2 ** (graph.weight_bits - 1) - 1
    scale = (np.abs(layer.weight).max(axis=0) / largest).astype(np.float32)
    scale[scale == 0] = 1.0
    quantized = np.clip(np.rint(layer.weight / scale), -largest, largest).astype(np.int8)
    inputs = [
        x,
        graph.constant(f"{name}.weight", quantized),
        graph.constant(f"{name}.weight.scale", scale),
        graph.constant(f"{name}.weight.zero", np.zeros(scale.shape, np.int8)),
    ]
    if layer.bias is not None:
        inputs.append(graph.constant(f"{name}.bias", layer.bias))
    return graph.node("DynamicQuantizeMatMul", inputs, name, domain=RUNTIME)


def norm(graph: Graph, x: str, layer: Norm, name: str) -> str:
    """Write a LayerNorm or RMSNorm over the last dimension.

    Args:
        graph: Gets the nodes; `graph.runtime_norm` allows ONNX Runtime's RMSNorm.
        x: Values (…, width).
        layer: The norm. A LayerNorm has (width,) weights; an RMSNorm any that broadcast.
        name: Name of the last node, or a prefix of it.

    Returns:
        Values (…, width).
    """
    spec, weight, bias = layer.spec, layer.weight, layer.bias
    if spec.kind == "rms" and weight is not None and weight.ndim == 1 and graph.runtime_norm:
        # ONNX Runtime's own name for RMSNorm; the standard's came with opset 23, at which this
        # runtime no longer fuses Transpose into MatMul.
        inputs = [x, graph.constant(f"{name}.weight", weight)]
        y = graph.node("SimplifiedLayerNormalization", inputs, name, axis=-1, epsilon=spec.eps)
        return scale_and_shift(graph, y, None, bias, name)
    if graph.operators == "pnnx":
        return _norm_for_pnnx(graph, x, layer, name)
    if spec.kind == "layer":
        scale = np.ones(spec.width, np.float32) if weight is None else weight
        inputs = [x, graph.constant(f"{name}.weight", scale)]
        if bias is not None:
            inputs.append(graph.constant(f"{name}.bias", bias))
        return graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=spec.eps)
    # RMSNorm has an operator of its own from opset 23 on only; these five run everywhere.
    square = graph.node("Mul", [x, x], f"{name}.square")
    mean = graph.node("ReduceMean", [square, graph.sizes([-1])], f"{name}.mean", keepdims=1)
    shifted = graph.node("Add", [mean, graph.scalar(f"{name}.eps", spec.eps)], f"{name}.shifted")
    y = graph.node("Div", [x, graph.node("Sqrt", [shifted], f"{name}.root")], f"{name}.unit")
    return scale_and_shift(graph, y, weight, bias, name)


def _norm_for_pnnx(graph: Graph, x: str, layer: Norm, name: str) -> str:
    """Write a norm as one operator with all of its inputs; pnnx does not convert others."""
    spec, weight, bias = layer.spec, layer.weight, layer.bias
    if spec.width == 1:
        return _norm_of_one_channel(graph, x, layer, name)
    ones, zeros = np.ones(spec.width, np.float32), np.zeros(spec.width, np.float32)
    if spec.kind == "layer":
        scale = graph.constant(f"{name}.weight", ones if weight is None else weight)
        shift = graph.constant(f"{name}.bias", zeros if bias is None else bias)
        inputs = [x, scale, shift]
        return graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=spec.eps)
    per_row = weight is not None and weight.ndim > 1
    scale = graph.constant(f"{name}.weight", ones if weight is None or per_row else weight)
    y = graph.node("RMSNormalization", [x, scale], name, axis=-1, epsilon=spec.eps)
    return scale_and_shift(graph, y, weight if per_row else None, bias, name)


def _norm_of_one_channel(graph: Graph, x: str, layer: Norm, name: str) -> str:
    """Write a norm over one channel, which is its own mean, without weights of one element."""
    if layer.spec.kind == "layer":
        y = graph.node("Mul", [x, graph.scalar(f"{name}.zero", 0.0)], f"{name}.centred")
    else:
        square = graph.node("Mul", [x, x], f"{name}.square")
        eps = graph.scalar(f"{name}.eps", layer.spec.eps)
        root = graph.node(
            "Sqrt", [graph.node("Add", [square, eps], f"{name}.shifted")], f"{name}.root"
        )
        y = graph.node("Div", [x, root], f"{name}.unit")
    return scale_and_shift(graph, y, layer.weight, layer.bias, name)


def scale_and_shift(
    graph: Graph, x: str, weight: Array | None, bias: Array | None, name: str
) -> str:
    """Write x * weight + bias.

    Args:
        graph: Gets the nodes.
        x: Any value.
        weight: Factors that broadcast to x, or None.
        bias: Summands that broadcast to x, or None.
        name: Prefix of the node names.

    Returns:
        A value of x's shape.
    """
    if weight is not None:
        x = graph.node("Mul", [x, graph.constant(f"{name}.weight", weight)], f"{name}.scaled")
    if bias is not None:
        x = graph.node("Add", [x, graph.constant(f"{name}.bias", bias)], f"{name}.biased")
    return x


def slice_tokens(graph: Graph, form: Form, x: str, start: int, stop: int, name: str) -> str:
    """Write a Slice of token rows.

    Args:
        graph: Gets the node.
        form: Decides which axis holds the tokens.
        x: Rows (…, tokens, width).
        start: First token.
        stop: Token after the last one.
        name: Name of the node.

    Returns:
        Rows (…, stop - start, width).
    """
    axis = 0 if form.rows == "matrix" else 1
    bounds = [graph.sizes([start]), graph.sizes([stop]), graph.sizes([axis])]
    return graph.node("Slice", [x, *bounds], name)


def first_tokens(graph: Graph, form: Form, x: str, count: int, name: str) -> str:
    """Write a Slice of the first `count` token rows.

    Args:
        graph: Gets the node.
        form: Decides which axis holds the tokens.
        x: Rows (…, tokens, width).
        count: How many rows.
        name: Name of the node.

    Returns:
        Rows (…, count, width).
    """
    return slice_tokens(graph, form, x, 0, count, name)


def gather_channels(graph: Graph, x: str, indices: Sequence[int], width: int, name: str) -> str:
    """Write x[..., indices].

    Args:
        graph: Gets the node.
        x: Rows (…, width).
        indices: Channels to select, in order.
        width: Number of channels of x.
        name: Name of the node.

    Returns:
        Rows (…, len(indices)).
    """
    if graph.operators == "pnnx":
        selection = np.eye(width, dtype=np.float32)[:, list(indices)]
        return graph.product(x, selection, f"{name}.selection", name)
    return graph.node("Gather", [x, graph.sizes(indices)], name, axis=-1)


def scatter_channels(graph: Graph, y: str, channels: Sequence[int], width: int, name: str) -> str:
    """Spread rows over a wider one with zeros elsewhere, as one Gather or product.

    For the Gather a column of zeros is appended, and every channel that is not written reads it.

    Args:
        graph: Gets the nodes.
        y: Rows (…, len(channels)).
        channels: The channel of each column.
        width: Number of channels of the result.
        name: Name of the Gather.

    Returns:
        Rows (…, width).
    """
    if graph.operators == "pnnx":
        selection = np.eye(width, dtype=np.float32)[list(channels)]
        return graph.product(y, selection, f"{name}.selection", name)
    index = np.full(width, len(channels), np.int64)
    index[list(channels)] = np.arange(len(channels))
    padded = graph.node("Pad", [y, graph.sizes([0, 1]), "", graph.sizes([-1])], f"{name}.padded")
    return graph.node("Gather", [padded, graph.constant(f"{name}.channels", index)], name, axis=-1)


def scatter_array(rows: Array, channels: Sequence[int], width: int) -> Array:
    """Return (…, len(channels)) as (…, width) with zeros in the other channels."""
    wide = np.zeros((*rows.shape[:-1], width), rows.dtype)
    wide[..., list(channels)] = rows
    return wide
