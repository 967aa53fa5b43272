"""The feed-forward sub-layer. Requires the weights of one `compress.vit.ffn.Ffn`; ensures the same
function before its output projection.
"""

from __future__ import annotations

import numpy as np

from ...compress.network.architecture import FfnSpec
from .form import Form
from .graph import Array, Graph
from .rows import RUNTIME, Linear, linear, norm

State = dict[str, Array]


def ffn(
    graph: Graph, form: Form, spec: FfnSpec, state: State, x: str, name: str
) -> tuple[str, Linear]:
    """Hidden rows and the output projection."""
    first = Linear(np.ascontiguousarray(state["fc1.weight"].T), state.get("fc1.bias"))
    out = Linear(np.ascontiguousarray(state["fc2.weight"].T), state.get("fc2.bias"))
    if spec.gated:
        gate = Linear(np.ascontiguousarray(state["gate.weight"].T), state.get("gate.bias"))
        opened = activation(
            graph, spec.act, linear(graph, form, x, gate, f"{name}.gate"), f"{name}.act"
        )
        hidden = graph.node(
            "Mul", [opened, linear(graph, form, x, first, f"{name}.fc1")], f"{name}.gated"
        )
    elif form.activation == "bias-gelu" and spec.act == "gelu" and first.bias is not None:
        product = linear(graph, form, x, Linear(first.weight, None), f"{name}.fc1")
        hidden = graph.node(
            "BiasGelu",
            [product, graph.constant(f"{name}.fc1.bias", first.bias)],
            f"{name}.act",
            domain=RUNTIME,
        )
    else:
        hidden = activation(
            graph, spec.act, linear(graph, form, x, first, f"{name}.fc1"), f"{name}.act"
        )
    if spec.norm is not None:
        hidden = norm(
            graph,
            hidden,
            spec.norm,
            state.get("norm.weight"),
            state.get("norm.bias"),
            f"{name}.norm",
        )
    return hidden, out


def activation(graph: Graph, kind: str, x: str, name: str) -> str:
    """One of the activations that an `FfnSpec` knows."""
    if kind == "identity":
        return x
    if kind == "gelu":
        return graph.node("Gelu", [x], name)
    if kind == "gelu_tanh":
        return graph.node("Gelu", [x], name, approximate="tanh")
    if kind == "relu6":
        bounds = [
            graph.scalar(f"{name}.{label}", value) for label, value in (("low", 0.0), ("high", 6.0))
        ]
        return graph.node("Clip", [x, *bounds], name)
    if kind in ("silu", "quick_gelu"):
        inner = x
        if kind == "quick_gelu":
            inner = graph.node("Mul", [x, graph.scalar(f"{name}.slope", 1.702)], f"{name}.steep")
        return graph.node("Mul", [x, graph.node("Sigmoid", [inner], f"{name}.sigmoid")], name)
    operator = {"relu": "Relu", "hardswish": "HardSwish", "tanh": "Tanh", "sigmoid": "Sigmoid"}[
        kind
    ]
    return graph.node(operator, [x], name)
