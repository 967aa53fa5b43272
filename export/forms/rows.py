"""Linear layers, norms and selections over token rows, in the two row layouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...compress.network.architecture import NormSpec
from .form import Form
from .graph import Array, Graph

RUNTIME = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """y = x W + b with W of shape (in, out), already transposed for the product; b may be
    absent.
    """

    weight: Array
    bias: Array | None


def linear(graph: Graph, form: Form, x: str, layer: Linear, name: str) -> str:
    """(…, in) -> (…, out). With matrix rows one Gemm; with a batch MatMul and Add (which ONNX
    Runtime fuses again, at the price of Reshapes).
    """
    if graph.linears == "int8" and name != "stem":
        return int8_linear(graph, x, layer, name)
    weight = graph.constant(f"{name}.weight", layer.weight)
    bias = None if layer.bias is None else graph.constant(f"{name}.bias", layer.bias)
    if form.rows == "matrix" and bias is not None and graph.linears != "product":
        return graph.node("Gemm", [x, weight, bias], name)
    product = graph.node("MatMul", [x, weight], name)
    return product if bias is None else graph.node("Add", [product, bias], f"{name}.add")


def int8_linear(graph: Graph, x: str, layer: Linear, name: str) -> str:
    """Weights in eight bits with a scale a column, the input in eight bits with one scale found for
    each image: one node of ONNX Runtime.
    """
    largest = 2 ** (graph.weight_bits - 1) - 1
    scale = (np.abs(layer.weight).max(axis=0) / largest).astype(np.float32)
    scale[scale == 0] = 1.0
    quantized = np.clip(np.rint(layer.weight / scale), -largest, largest).astype(np.int8)
    inputs = [
        x,
        graph.constant(f"{name}.weight", quantized),
        graph.constant(f"{name}.weight.scale", scale),
    ]
    inputs.append(graph.constant(f"{name}.weight.zero", np.zeros(scale.shape, np.int8)))
    if layer.bias is not None:
        inputs.append(graph.constant(f"{name}.bias", layer.bias))
    return graph.node("DynamicQuantizeMatMul", inputs, name, domain=RUNTIME)


def norm(
    graph: Graph, x: str, spec: NormSpec, weight: Array | None, bias: Array | None, name: str
) -> str:
    """LayerNorm or RMSNorm over the last dimension. `weight`, `bias`: (width,), or anything that
    broadcasts for RMSNorm.
    """
    if spec.kind == "rms" and weight is not None and weight.ndim == 1 and graph.runtime_norm:
        # ONNX Runtime's own name for RMSNorm; the standard's came with opset 23, at which this
        # runtime no longer fuses Transpose into MatMul.
        y = graph.node(
            "SimplifiedLayerNormalization",
            [x, graph.constant(f"{name}.weight", weight)],
            name,
            axis=-1,
            epsilon=spec.eps,
        )
        return (
            y
            if bias is None
            else graph.node("Add", [y, graph.constant(f"{name}.bias", bias)], f"{name}.biased")
        )
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
    if weight is not None:
        y = graph.node("Mul", [y, graph.constant(f"{name}.weight", weight)], f"{name}.scaled")
    if bias is not None:
        y = graph.node("Add", [y, graph.constant(f"{name}.bias", bias)], f"{name}.biased")
    return y


def first_tokens(graph: Graph, form: Form, x: str, count: int, name: str) -> str:
    """The first `count` token rows."""
    axis = 0 if form.rows == "matrix" else 1
    return graph.node(
        "Slice", [x, graph.sizes([0]), graph.sizes([count]), graph.sizes([axis])], name
    )


def pick_channels(graph: Graph, x: str, indices: tuple[int, ...], name: str) -> str:
    """x[..., indices]."""
    return graph.node("Gather", [x, graph.sizes(indices)], name, axis=-1)


def place(graph: Graph, y: str, writes: tuple[int, ...], width: int, name: str) -> str:
    """(…, written) -> (…, width) with zeros elsewhere, by index: one column of zeros is appended,
    and whatever is not written reads it.
    """
    where = np.full(width, len(writes), np.int64)
    where[list(writes)] = np.arange(len(writes))
    wider = graph.node("Pad", [y, graph.sizes([0, 1]), "", graph.sizes([-1])], f"{name}.wider")
    return graph.node("Gather", [wider, graph.constant(f"{name}.channels", where)], name, axis=-1)
