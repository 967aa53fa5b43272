"""T2T-ViT's soft splits, from the weights of one `compress.network.modules.soft_split.SoftSplit`.

Everything here stays in float where the blocks are quantized, as the patch embedding does: the
nodes are named `before.<number>.…`. The linear attention also stays in single precision where the
rest is half: its features span more orders of magnitude than half precision holds.
"""

from __future__ import annotations

import math

import numpy as np

from ...compress.network.architecture import SoftSplitSpec
from ..graphs.model_proto import LINEAR_ATTENTION
from .ffn import ffn
from .form import Form
from .graph import Array, Graph, State, entries_below
from .rows import Linear, Norm, linear, norm


def soft_split(
    graph: Graph,
    form: Form,
    spec: SoftSplitSpec,
    state: State,
    images: str,
    *,
    size: tuple[int, int],
    name: str,
) -> str:
    """Write one soft split with its attention and feed-forward layer.

    Args:
        graph: Gets the nodes.
        form: Decides the layout of the rows.
        spec: The soft split.
        state: Its weights.
        images: Values (batch, channels, height, width).
        size: Rows and columns of windows.
        name: Prefix of the node names.

    Returns:
        Values (batch, spec.channels, rows, columns).
    """
    windows = norm(
        graph,
        _windows(graph, form, spec, images, name),
        Norm.of(spec.norm, state, "norm"),
        f"{name}.norm",
    )
    q, k, v = (
        linear(graph, form, windows, layer, f"{name}.{label}")
        for layer, label in zip(_projections(spec, state), "qkv", strict=True)
    )
    if spec.features is None:
        y = _softmax(graph, form, q, k, v, name)
    else:
        y = _Performer(graph, form, spec, state["features"], name).attend(q, k, v, math.prod(size))
    y = linear(graph, form, y, Linear.of(state, "out"), f"{name}.out")
    y = graph.node("Add", [v, y], f"{name}.attended")
    inner = norm(graph, y, Norm.of(spec.ffn_norm, state, "ffn_norm"), f"{name}.ffn_norm")
    hidden, out = ffn(graph, form, spec.ffn, entries_below(state, "ffn"), inner, f"{name}.ffn")
    y = graph.node(
        "Add", [y, linear(graph, form, hidden, out, f"{name}.ffn.fc2")], f"{name}.tokens"
    )
    flat = _transpose(graph, form, y, f"{name}.flat")
    batch = 1 if form.rows == "matrix" else 0
    return graph.reshape(flat, [batch, spec.channels, *size], f"{name}.pixels")


def _windows(graph: Graph, form: Form, spec: SoftSplitSpec, images: str, name: str) -> str:
    """The pixels of each window, rows (…, windows, channels * pixels of a window).

    A convolution of each channel alone with kernels of a single one copies them exactly.
    """
    area = math.prod(spec.kernel)
    channels = spec.norm.width // area
    kernel = np.eye(area, dtype=np.float32).reshape(area, 1, *spec.kernel)
    copied = graph.node(
        "Conv",
        [images, graph.constant(f"{name}.windows.weight", np.tile(kernel, (channels, 1, 1, 1)))],
        f"{name}.windows",
        kernel_shape=list(spec.kernel),
        strides=list(spec.stride),
        pads=2 * list(spec.padding),
        group=channels,
    )
    lead = [] if form.rows == "matrix" else [0]
    flat = graph.reshape(copied, [*lead, channels * area, -1], f"{name}.windows.flat")
    return _transpose(graph, form, flat, f"{name}.windows.rows")


def _transpose(graph: Graph, form: Form, x: str, name: str) -> str:
    return graph.node("Transpose", [x], name, perm=[1, 0] if form.rows == "matrix" else [0, 2, 1])


def _projections(spec: SoftSplitSpec, state: State) -> list[Linear]:
    """Queries, keys and values, the queries with the scale of the softmax."""
    found = []
    scales = (1.0 if spec.scale is None else spec.scale, 1.0, 1.0)
    for number, scale in enumerate(scales):
        rows = slice(number * spec.channels, (number + 1) * spec.channels)
        weight = np.ascontiguousarray(state["qkv.weight"][rows].T * np.float32(scale))
        bias = state["qkv.bias"][rows] * np.float32(scale) if spec.qkv_bias else None
        found.append(Linear(weight, bias))
    return found


def _softmax(graph: Graph, form: Form, q: str, k: str, v: str, name: str) -> str:
    """softmax(q kᵀ) v of one head."""
    keys = _transpose(graph, form, k, f"{name}.keys")
    scores = graph.node("MatMul", [q, keys], f"{name}.scores")
    shares = graph.node("Softmax", [scores], f"{name}.shares", axis=-1)
    return graph.node("MatMul", [shares, v], f"{name}.values")


class _Performer:
    """Attention whose cost is linear in the tokens, with fixed random features.

    Sums are products with ones, which every converter reads.
    """

    def __init__(
        self, graph: Graph, form: Form, spec: SoftSplitSpec, directions: Array, name: str
    ) -> None:
        self.graph, self.form, self.spec = graph, form, spec
        self.directions, self.name = directions, f"{name}.{LINEAR_ATTENTION}"

    def attend(self, q: str, k: str, v: str, tokens: int) -> str:
        """φ(q) (φ(k)ᵀ v) / (φ(q) Σφ(k) + ε) for rows (…, tokens, width)."""
        graph, name = self.graph, self.name
        q, k = self._features(q, "q"), self._features(k, "k")
        keys = _transpose(graph, self.form, k, f"{name}.keys")
        ones = np.ones((tokens, 1), np.float32)
        total = graph.product(keys, ones, f"{name}.ones", f"{name}.total")
        divisor = graph.node("MatMul", [q, total], f"{name}.product")
        eps = graph.scalar(f"{name}.eps", self.spec.features_eps)
        divisor = graph.node("Add", [divisor, eps], f"{name}.divisor")
        summary = graph.node("MatMul", [keys, v], f"{name}.summary")
        y = graph.node("MatMul", [q, summary], f"{name}.values")
        return graph.node("Div", [y, divisor], f"{name}.output")

    def _features(self, x: str, label: str) -> str:
        """exp(w x - |x|² / 2) / sqrt(m), rows (…, tokens, features)."""
        graph, name, count = self.graph, f"{self.name}.{label}", len(self.directions)
        matrix = np.ascontiguousarray(self.directions.T)
        projected = graph.product(x, matrix, f"{self.name}.directions", f"{name}.projected")
        square = graph.node("Mul", [x, x], f"{name}.square")
        half = np.full((self.directions.shape[1], 1), 0.5, np.float32)
        length = graph.product(square, half, f"{self.name}.half", f"{name}.length")
        exponent = graph.node("Sub", [projected, length], f"{name}.exponent")
        features = graph.node("Exp", [exponent], f"{name}.exp")
        factor = graph.scalar(f"{self.name}.factor", count**-0.5)
        return graph.node("Mul", [features, factor], name)
