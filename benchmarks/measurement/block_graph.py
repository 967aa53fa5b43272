"""A transformer block of given widths as an ONNX graph with random weights.

Needs the package `onnx`, not torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one pre-norm transformer block.

    Attributes:
        tokens_in: Tokens that the block reads.
        tokens_out: Tokens that it passes on.
        heads: Attention heads.
        qk: Width of each head's queries and keys.
        v: Width of each head's values.
        ffn: Hidden width of the FFN.
        embed: Width of the residual stream.
    """

    tokens_in: int
    tokens_out: int
    heads: int
    qk: int
    v: int
    ffn: int
    embed: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.tokens_out > self.tokens_in:
            raise ValueError(
                f"tokens_out = {self.tokens_out} is more than tokens_in = {self.tokens_in}"
            )

    @property
    def macs(self) -> int:
        """Multiply-adds of the block, with attention products, and queries of kept tokens only."""
        n, m, heads, d = self.tokens_in, self.tokens_out, self.heads, self.embed
        project = d * heads * (m * self.qk + n * self.qk + n * self.v)
        attend = n * m * heads * (self.qk + self.v)
        return project + attend + m * heads * self.v * d + 2 * m * d * self.ffn


def block_model(shape: BlockShape, copies: int = 4, seed: int = 0) -> bytes:
    """Return an ONNX model that adds up the outputs of `copies` such blocks.

    Each block has weights of its own. Several of them in one model make one block's share of the
    call's fixed cost small. Shapes: tokens (1, tokens_in, embed) -> (tokens_out, embed).
    """
    from onnx import TensorProto, helper

    n, m, d = shape.tokens_in, shape.tokens_out, shape.embed
    graph = _BlockGraph(shape, seed)
    total = graph.block("b0")
    for copy in range(1, copies):
        total = graph.node("Add", [total, graph.block(f"b{copy}")], f"sum{copy}")
    proto = helper.make_graph(
        graph.nodes,
        "block",
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, n, d])],
        [helper.make_tensor_value_info(total, TensorProto.FLOAT, [m, d])],
        graph.weights,
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(proto, opset_imports=[opset], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


class _BlockGraph:
    """Nodes and weights of blocks that all read `tokens`; each method returns an output's name."""

    def __init__(self, shape: BlockShape, seed: int) -> None:
        self.shape, self.rng = shape, np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.tokens = self.reshape("x", "tokens", [shape.tokens_in, shape.embed])
        self.kept_rows = [
            self.integers(name, [value])
            for name, value in (("first", 0), ("last", shape.tokens_out), ("axis", 0))
        ]

    def constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def integers(self, name: str, values: list[int]) -> str:
        return self.constant(name, np.array(values, dtype=np.int64))

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def reshape(self, name: str, source: str, sizes: list[int]) -> str:
        return self.node("Reshape", [source, self.integers(f"{name}.shape", sizes)], name)

    def linear(self, name: str, source: str, rows: int, columns: int) -> str:
        values = self.rng.standard_normal((rows, columns)) / rows**0.5
        matrix = self.constant(f"{name}.w", values.astype(np.float32))
        bias = self.constant(f"{name}.b", np.zeros(columns, dtype=np.float32))
        return self.node("Gemm", [source, matrix, bias], name)

    def norm(self, name: str, source: str) -> str:
        scale = self.constant(f"{name}.s", np.ones(self.shape.embed, dtype=np.float32))
        shift = self.constant(f"{name}.o", np.zeros(self.shape.embed, dtype=np.float32))
        inputs = [source, scale, shift]
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=1e-6)

    def heads(self, name: str, source: str, tokens: int, width: int, order: list[int]) -> str:
        """Project all heads, and transpose (tokens, heads, width) to `order`."""
        heads = self.shape.heads
        flat = self.linear(name, source, self.shape.embed, heads * width)
        split = self.reshape(f"{name}.split", flat, [tokens, heads, width])
        return self.node("Transpose", [split], f"{name}.heads", perm=order)

    def block(self, at: str) -> str:
        shape = self.shape
        n, m, h, d = shape.tokens_in, shape.tokens_out, shape.heads, shape.embed
        qk, v, ffn = shape.qk, shape.v, shape.ffn
        normed, kept = self.norm(f"{at}.n1", self.tokens), self.tokens
        queried = normed
        if m < n:
            queried = self.node("Slice", [normed, *self.kept_rows], f"{at}.queried")
            kept = self.node("Slice", [kept, *self.kept_rows], f"{at}.kept")
        query = self.heads(f"{at}.q", queried, m, qk, [1, 0, 2])
        key = self.heads(f"{at}.k", normed, n, qk, [1, 2, 0])
        value = self.heads(f"{at}.v", normed, n, v, [1, 0, 2])
        scale = self.constant(f"{at}.scale", np.float32(qk**-0.5).reshape(1))
        scaled = self.node("Mul", [query, scale], f"{at}.qs")
        scores = self.node("MatMul", [scaled, key], f"{at}.a")
        weights = self.node("Softmax", [scores], f"{at}.p", axis=-1)
        mixed = self.node("MatMul", [weights, value], f"{at}.m")
        tokens_first = self.node("Transpose", [mixed], f"{at}.t", perm=[1, 0, 2])
        joined = self.reshape(f"{at}.c", tokens_first, [m, h * v])
        stream = self.node("Add", [kept, self.linear(f"{at}.o", joined, h * v, d)], f"{at}.x1")
        hidden = self.linear(f"{at}.f1", self.norm(f"{at}.n2", stream), d, ffn)
        active = self.node("Gelu", [hidden], f"{at}.g")
        return self.node("Add", [stream, self.linear(f"{at}.f2", active, ffn, d)], f"{at}.x2")
