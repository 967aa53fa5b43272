"""Norms of queries or keys, head by head (qk_norm), inside rows whose other columns stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...compress.network.architecture import NormSpec
from .lanes import Buffer, Expr
from .loops import over_threads, share_bounds


@dataclass(frozen=True)
class HeadNorm:
    """Rows in which head h has norm.width columns from first + h * stride on.

    Attributes:
        rows: Rows of all images.
        width: Columns of a row.
        first: The first column of the first head.
        heads: Number of heads.
        norm: The norm of each head.
        per_head: Whether each head has its own weights.
        stride: Columns from head to head, by default norm.width; columns between heads become zero.
    """

    rows: int
    width: int
    first: int
    heads: int
    norm: NormSpec
    per_head: bool
    stride: int | None = None


def norm_heads(spec: HeadNorm, threads: int) -> Any:
    """The kernel: (x, weights (heads, norm.width), biases) -> out, all flat.

    It works number by number, since head widths need not be whole vectors.
    """
    each = spec.norm.width
    stride = spec.stride or each
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((spec.rows * spec.width,), "float32"))
        weight = T.arg("weight", T.buffer((spec.heads * each,), "float32"))
        bias = T.arg("bias", T.buffer((spec.heads * each,), "float32"))
        out = T.arg("out", T.buffer((spec.rows * spec.width,), "float32"))

        def share(part: Expr, parts: int) -> None:
            sums = T.alloc_buffer((2,), "float32", scope="local")
            with T.serial(*share_bounds(spec.rows, part, parts)) as row:
                other_columns = (
                    (0, spec.first),
                    (spec.first + spec.heads * stride, spec.width),
                )
                for start, stop in other_columns:
                    with T.serial(start, stop) as column:
                        index = row * spec.width + column
                        T.buffer_store(out, x[index], [index])
                with T.serial(0, spec.heads) as head:
                    first = T.Bind(row * spec.width + spec.first + head * stride)
                    mean, scale = _statistics(spec.norm, x, first, sums)
                    with T.serial(0, each) as column:
                        parameter = head * each + column
                        value = (x[first + column] - mean) * scale * weight[parameter]
                        T.buffer_store(out, value + bias[parameter], [first + column])
                    if stride > each:
                        with T.serial(each, stride) as column:
                            T.buffer_store(out, T.float32(0), [first + column])

        over_threads(share, threads)
    return builder.get()


def _statistics(norm: NormSpec, x: Buffer, first: Expr, sums: Buffer) -> tuple[Expr, Expr]:
    """(mean, 1 / standard deviation) of one head; the mean is 0 for RMSNorm."""
    width = norm.width
    T.buffer_store(sums, T.float32(0), [0])
    T.buffer_store(sums, T.float32(0), [1])
    if norm.kind == "layer":
        with T.serial(0, width) as column:
            T.buffer_store(sums, sums[0] + x[first + column] * T.float32(1 / width), [0])
    with T.serial(0, width) as column:
        difference = x[first + column] - sums[0]
        T.buffer_store(sums, sums[1] + difference * difference, [1])
    variance = sums[1] * T.float32(1 / width)
    scale = T.Bind(T.float32(1) / T.sqrt(variance + T.float32(norm.eps)))
    return T.Bind(sums[0]), scale
