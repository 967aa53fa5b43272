"""A transformer block of given widths as an ONNX graph with random weights: what a cost table
times. Needs the package `onnx`, not torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BlockShape:
    """One pre-norm block: tokens read, tokens passed on, heads, widths of each head's queries/keys
    and values, FFN width, residual width.
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
                raise ValueError(f"{name} = {value}: at least 1 is wanted")
        if self.tokens_out > self.tokens_in:
            raise ValueError(
                f"tokens_out = {self.tokens_out} is more than tokens_in = {self.tokens_in}"
            )

    @property
    def macs(self) -> int:
        """Multiply-adds of the block, attention products included, queries only for the tokens
        passed on.
        """
        n, m, heads, d = self.tokens_in, self.tokens_out, self.heads, self.embed
        project = d * heads * (m * self.qk + n * self.qk + n * self.v)
        attend = n * m * heads * (self.qk + self.v)
        return project + attend + m * heads * self.v * d + 2 * m * d * self.ffn


def block_model(shape: BlockShape, copies: int = 4, seed: int = 0) -> bytes:
    """An ONNX model, tokens (1, tokens_in, embed) -> (tokens_out, embed), that sums `copies` such
    blocks, each with weights of its own.

    Several copies in one model make one block's share of the call's fixed cost small.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    n, m, h, d = shape.tokens_in, shape.tokens_out, shape.heads, shape.embed

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def linear(name: str, source: str, rows: int, columns: int) -> str:
        matrix = constant(
            f"{name}.w", (rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)
        )
        return node(
            "Gemm",
            [source, matrix, constant(f"{name}.b", np.zeros(columns, dtype=np.float32))],
            name,
        )

    def norm(name: str, source: str) -> str:
        scale, shift = (
            constant(f"{name}.s", np.ones(d, dtype=np.float32)),
            constant(f"{name}.o", np.zeros(d, dtype=np.float32)),
        )
        return node("LayerNormalization", [source, scale, shift], name, axis=-1, epsilon=1e-6)

    def heads_first(name: str, source: str, tokens: int, width: int, order: list[int]) -> str:
        split = node(
            "Reshape",
            [source, constant(f"{name}.r", np.array([tokens, h, width], dtype=np.int64))],
            f"{name}.split",
        )
        return node("Transpose", [split], name, perm=order)

    flat = node("Reshape", ["tokens", constant("flat", np.array([n, d], dtype=np.int64))], "x")
    first, last, axis = (
        constant(name, np.array([value], dtype=np.int64))
        for name, value in (("first", 0), ("last", m), ("axis", 0))
    )
    total = ""
    for copy in range(copies):
        at = f"b{copy}"
        normed = norm(f"{at}.n1", flat)
        asking = normed if m == n else node("Slice", [normed, first, last, axis], f"{at}.ask")
        kept = flat if m == n else node("Slice", [flat, first, last, axis], f"{at}.keep")
        query = heads_first(
            f"{at}.qh", linear(f"{at}.q", asking, d, h * shape.qk), m, shape.qk, [1, 0, 2]
        )
        key = heads_first(
            f"{at}.kh", linear(f"{at}.k", normed, d, h * shape.qk), n, shape.qk, [1, 2, 0]
        )
        value = heads_first(
            f"{at}.vh", linear(f"{at}.v", normed, d, h * shape.v), n, shape.v, [1, 0, 2]
        )
        scaled = node(
            "Mul",
            [query, constant(f"{at}.scale", np.float32(shape.qk**-0.5).reshape(1))],
            f"{at}.qs",
        )
        weight = node("Softmax", [node("MatMul", [scaled, key], f"{at}.a")], f"{at}.p", axis=-1)
        mixed = node(
            "Transpose", [node("MatMul", [weight, value], f"{at}.m")], f"{at}.t", perm=[1, 0, 2]
        )
        joined = node(
            "Reshape",
            [mixed, constant(f"{at}.j", np.array([m, h * shape.v], dtype=np.int64))],
            f"{at}.c",
        )
        stream = node("Add", [kept, linear(f"{at}.o", joined, h * shape.v, d)], f"{at}.x1")
        hidden = node(
            "Gelu", [linear(f"{at}.f1", norm(f"{at}.n2", stream), d, shape.ffn)], f"{at}.g"
        )
        out = node("Add", [stream, linear(f"{at}.f2", hidden, shape.ffn, d)], f"{at}.x2")
        total = out if copy == 0 else node("Add", [total, out], f"sum{copy}")
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, n, d])],
        [helper.make_tensor_value_info(total, TensorProto.FLOAT, [m, d])],
        weights,
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return data
