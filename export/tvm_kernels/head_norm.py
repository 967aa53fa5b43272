"""Queries or keys normalised head by head (qk_norm), inside rows whose other columns stay as they
are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...compress.network.architecture import NormSpec
from .threads import over_threads
from .tiles import bounds


@dataclass(frozen=True)
class HeadNorm:
    """Rows of `width` columns; head h has norm.width of them from first + h * stride on. per_head:
    each head has weights of its own.

    stride: from head to head, norm.width unless there are columns between them, which become zero.
    """

    rows: int
    width: int
    first: int
    heads: int
    norm: NormSpec
    per_head: bool
    stride: int | None = None


def norm_heads(spec: HeadNorm, threads: int) -> Any:
    """The kernel: (x, weights (heads, each), biases) -> out, all flat. Head widths need not be
    whole vectors, so it goes number by number.
    """
    each = spec.norm.width
    stride = spec.stride or each
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.rows * spec.width,), "float32"))
        weight = T.arg("weight", T.buffer((spec.heads * each,), "float32"))
        bias = T.arg("bias", T.buffer((spec.heads * each,), "float32"))
        out = T.arg("out", T.buffer((spec.rows * spec.width,), "float32"))

        def share(part: Any, parts: int) -> None:
            sums = T.alloc_buffer((2,), "float32", scope="local")
            with T.serial(*bounds(spec.rows, part, parts)) as row:
                for start, stop in (
                    (0, spec.first),
                    (spec.first + spec.heads * stride, spec.width),
                ):
                    with T.serial(start, stop) as column:
                        T.buffer_store(
                            out, x[row * spec.width + column], [row * spec.width + column]
                        )
                with T.serial(0, spec.heads) as head:
                    place = T.Bind(row * spec.width + spec.first + head * stride)
                    T.buffer_store(sums, T.float32(0), [0])
                    T.buffer_store(sums, T.float32(0), [1])
                    if spec.norm.kind == "layer":
                        with T.serial(0, each) as column:
                            T.buffer_store(
                                sums, sums[0] + x[place + column] * T.float32(1 / each), [0]
                            )
                    with T.serial(0, each) as column:
                        difference = x[place + column] - sums[0]
                        T.buffer_store(sums, sums[1] + difference * difference, [1])
                    scale = T.Bind(
                        T.float32(1)
                        / T.sqrt(sums[1] * T.float32(1 / each) + T.float32(spec.norm.eps))
                    )
                    mean = T.Bind(sums[0])
                    with T.serial(0, each) as column:
                        value = (x[place + column] - mean) * scale * weight[
                            head * each + column
                        ] + bias[head * each + column]
                        T.buffer_store(out, value, [place + column])
                    if stride > each:
                        with T.serial(each, stride) as column:
                            T.buffer_store(out, T.float32(0), [place + column])

        over_threads(share, threads)
    return builder.get()
