"""LayerNorm and RMSNorm of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, Lanes, RowLayout, bind
from .loops import over_threads, share_bounds, sum_over
from .quantization import Quantizer, quantize_row


@dataclass(frozen=True)
class Normalize:
    """out = (x - mean) / sqrt(variance + eps), or x / sqrt(mean of squares + eps) if not centred.

    The columns after `width` that fill the last vector become zero.

    Attributes:
        images: Batch size.
        rows: Rows of each image.
        width: How many columns are normalised.
        source: Where x is.
        centred: Whether the mean is subtracted (LayerNorm).
        eps: Added to the variance.
        affine: Whether weight and bias are applied; otherwise the next product contains them.
        gather: Whether the columns are chosen by an index list; otherwise they are the first ones.
        output_quantizer: The rows are quantized.
    """

    images: int
    rows: int
    width: int
    source: RowLayout
    centred: bool
    eps: float
    affine: bool = False
    gather: bool = False
    output_quantizer: Quantizer | None = None

    @property
    def merged_rows(self) -> tuple[int, int]:
        """(images, rows); all images as one where their rows follow each other."""
        if self.source.per_image == self.rows and not self.source.first:
            return 1, self.images * self.rows
        return self.images, self.rows


class _Row(NamedTuple):
    """A row that begins at an index of a buffer."""

    buffer: Buffer
    start: Expr


class _Operands(NamedTuple):
    x: Buffer
    columns: Buffer | None
    weight: Buffer | None
    bias: Buffer | None
    static_range: Buffer | None
    out: Buffer


def normalize(spec: Normalize, lanes: Lanes, threads: int) -> Any:
    """The kernel: (x, [columns], [weight], [bias], [range]) -> out, all flat.

    out has the shape (images, rows, whole vectors), or that of quantized rows.
    """
    stride, quantizer = lanes.up(spec.width), spec.output_quantizer
    length = stride if quantizer is None else quantizer.row_length(spec.width)
    images, rows = spec.merged_rows
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        operands = _operands(spec, stride, length)

        def share(part: Expr, parts: int) -> None:
            local = None
            if quantizer is not None:
                local = T.alloc_buffer((stride,), "float32", scope="local")
            with T.serial(*share_bounds(images * rows, part, parts)) as row:
                start = (
                    spec.source.start(row // rows, row % rows)
                    if images > 1
                    else spec.source.start(0, row)
                )
                into = _Row(operands.out, bind(row * stride)) if local is None else _Row(local, 0)
                _normalize_row(spec, lanes, operands, start, into)
                if quantizer is not None:
                    quantize_row(
                        quantizer,
                        spec.width,
                        lambda column: lanes.load(local, column),
                        operands.out,
                        bind(row * length),
                        operands.static_range,
                    )

        over_threads(share, threads)
    return builder.get()


def _operands(spec: Normalize, stride: int, length: int) -> _Operands:
    quantizer, source = spec.output_quantizer, spec.source
    x_size = spec.images * source.per_image * source.width
    x = T.arg("x", T.buffer((x_size,), "float32"))
    columns = T.arg("columns", T.buffer((spec.width,), "int32")) if spec.gather else None
    weight = T.arg("weight", T.buffer((stride,), "float32")) if spec.affine else None
    bias = T.arg("bias", T.buffer((stride,), "float32")) if spec.affine else None
    static = quantizer is not None and quantizer.static
    static_range = T.arg("range", T.buffer((2,), "float32")) if static else None
    stored = "float32" if quantizer is None else quantizer.dot.stored
    images, rows = spec.merged_rows
    out = T.arg("out", T.buffer((images * rows * length,), stored))
    return _Operands(x, columns, weight, bias, static_range, out)


def _normalize_row(
    spec: Normalize, lanes: Lanes, operands: _Operands, start: Expr, into: _Row
) -> None:
    """One row of x, which begins at `start`, into another buffer."""
    if operands.columns is None:
        source = _Row(operands.x, bind(start))
    else:
        for column in range(spec.width, lanes.up(spec.width)):
            T.buffer_store(into.buffer, T.float32(0), [into.start + column])
        with T.serial(0, spec.width) as column:
            value = operands.x[start + operands.columns[column]]
            T.buffer_store(into.buffer, value, [into.start + column])
        source = into
    mean = None
    if spec.centred:
        total = sum_over(
            lanes,
            spec.width,
            lambda column: lanes.load(source.buffer, source.start + column),
        )
        mean = bind(lanes.splat(bind(total * T.float32(1 / spec.width))))

    def difference(column: Expr) -> Expr:
        value = lanes.load(source.buffer, source.start + column)
        return bind(value if mean is None else value - mean)

    def square(column: Expr) -> Expr:
        value = difference(column)
        return value * value

    squares = sum_over(lanes, spec.width, square)
    variance = squares * T.float32(1 / spec.width)
    scale = bind(lanes.splat(bind(T.float32(1) / T.sqrt(variance + T.float32(spec.eps)))))

    def write(column: Expr, valid: int) -> None:
        value = difference(column) * scale
        if operands.weight is not None:
            value = value * lanes.load(operands.weight, column)
        if operands.bias is not None:
            value = value + lanes.load(operands.bias, column)
        lanes.store(into.buffer, into.start + column, lanes.first(valid, value, 0.0))

    full, tail = divmod(spec.width, lanes.count)
    with T.serial(0, full) as vector:
        write(vector * lanes.count, lanes.count)
    if tail:
        write(full * lanes.count, tail)
