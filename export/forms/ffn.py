"""The feed-forward sub-layer, from the weights of one `compress.network.modules.layers.Ffn`."""

from __future__ import annotations

from ...compress.network.architecture import FfnSpec
from .form import Form
from .graph import RUNTIME, Graph, State
from .rows import Linear, Norm, linear, norm


def ffn(
    graph: Graph, form: Form, spec: FfnSpec, state: State, x: str, name: str
) -> tuple[str, Linear]:
    """Write the sub-layer up to its output projection.

    Args:
        graph: Gets the nodes.
        form: Decides how Linears and the activation are written.
        spec: The sub-layer.
        state: Its weights.
        x: Rows (…, embed), already normed.
        name: Prefix of the node names.

    Returns:
        The hidden rows (…, hidden), and the output projection that is still to be applied.
    """
    first, out = Linear.of(state, "fc1"), Linear.of(state, "fc2")
    if spec.gated:
        gate = linear(graph, form, x, Linear.of(state, "gate"), f"{name}.gate")
        gate = activation(graph, spec.act, gate, f"{name}.act")
        product = linear(graph, form, x, first, f"{name}.fc1")
        hidden = graph.node("Mul", [gate, product], f"{name}.gated")
    elif form.activation == "bias-gelu" and spec.act == "gelu" and first.bias is not None:
        product = linear(graph, form, x, Linear(first.weight, None), f"{name}.fc1")
        inputs = [product, graph.constant(f"{name}.fc1.bias", first.bias)]
        hidden = graph.node("BiasGelu", inputs, f"{name}.act", domain=RUNTIME)
    else:
        product = linear(graph, form, x, first, f"{name}.fc1")
        hidden = activation(graph, spec.act, product, f"{name}.act")
    if spec.norm is not None:
        hidden = norm(graph, hidden, Norm.of(spec.norm, state, "norm"), f"{name}.norm")
    return hidden, out


def activation(graph: Graph, kind: str, x: str, name: str) -> str:
    """Write an activation.

    Args:
        graph: Gets the nodes.
        kind: One of the activations of an `FfnSpec`.
        x: Any value.
        name: Name of the last node.

    Returns:
        A value of x's shape; x itself for `identity`.
    """
    if kind == "identity":
        return x
    if kind == "gelu":
        return graph.node("Gelu", [x], name)
    if kind == "gelu_tanh":
        return graph.node("Gelu", [x], name, approximate="tanh")
    if kind == "relu6":
        bounds = [graph.scalar(f"{name}.low", 0.0), graph.scalar(f"{name}.high", 6.0)]
        return graph.node("Clip", [x, *bounds], name)
    if kind in ("silu", "quick_gelu"):
        inner = x
        if kind == "quick_gelu":
            inner = graph.node("Mul", [x, graph.scalar(f"{name}.slope", 1.702)], f"{name}.steep")
        return graph.node("Mul", [x, graph.node("Sigmoid", [inner], f"{name}.sigmoid")], name)
    operators = {"relu": "Relu", "hardswish": "HardSwish", "tanh": "Tanh", "sigmoid": "Sigmoid"}
    return graph.node(operators[kind], [x], name)
