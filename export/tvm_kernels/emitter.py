"""The calls that a network's program consists of, one method a kind of kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compress.network.architecture import NormSpec
from ...compress.network.token_order import Runs
from .attention import Attend, attend
from .dense import Dense, dense
from .head_norm import HeadNorm, norm_heads
from .key_packing import pack_keys
from .lanes import Lanes
from .matrices import Affine, Matrix, Stream
from .norm import Normalize, normalize
from .packing import Array, padded, panels, quantize_weights
from .precision import FP32, Float, Precision, RowFormat
from .program import Program, Value
from .quantization import Quantize, quantize_rows
from .row_kernels import (
    add_constant,
    add_rows,
    add_table,
    combine_pairs,
    first_rows,
    mean_rows,
)
from .schedule import Schedule


@dataclass(frozen=True)
class Epilogue:
    """What follows a product while its results are in registers.

    Attributes:
        act: The activation.
        factor: Multiplied with the activated result.
        residual: Added at the end.
        only_products: Only products read the result, so that it may be quantized.
    """

    act: str = "identity"
    factor: Stream | None = None
    residual: Stream | None = None
    only_products: bool = False


PLAIN = Epilogue()


class Emitter:
    """Adds calls of kernels to a program.

    Args:
        program: The program.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        batch: Batch size.
        precision: The format of the rows that products read.
    """

    def __init__(
        self,
        program: Program,
        lanes: Lanes,
        schedule: Schedule,
        batch: int,
        precision: Precision,
    ) -> None:
        self.program = program
        self.lanes = lanes
        self.schedule = schedule
        self.batch = batch
        self.precision = precision
        # Rows that other kernels read in fp32 are quantized once, for all products that read them.
        self._quantized: list[tuple[Stream, Stream]] = []

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Rows that are quantized inside are not used outside, see `Program.branch`."""
        before = list(self._quantized)
        try:
            yield
        finally:
            self._quantized = before

    @property
    def computes_fp32(self) -> bool:
        """Whether products read fp32 in any case."""
        return isinstance(self.precision, Float)

    def constant(self, value: NDArray[Any]) -> Value:
        """Numbers that are part of the program."""
        return self.program.constant(value)

    def dense(
        self,
        x: Stream,
        rows: int,
        matrix: Matrix,
        epilogue: Epilogue = PLAIN,
        *,
        skipped: int = 0,
        force_fp32: bool = False,
    ) -> Stream:
        """A linear layer.

        Args:
            x: The input.
            rows: Rows of each image.
            matrix: Weights and bias.
            epilogue: What follows the product.
            skipped: The first rows of each image that are skipped.
            force_fp32: Compute in fp32 in any precision.
        """
        x = x if force_fp32 else self.quantized(x)
        depth, used = matrix.weight.shape
        width = self.lanes.up(used)
        (weight, *scales), bias = product_weights(x, matrix)
        out = self.output_format(epilogue.only_products, whole_rows=False)
        factor, residual = epilogue.factor, epilogue.residual
        spec = Dense(
            images=self.batch,
            rows=rows,
            depth=depth,
            width=width,
            source=replace(x.layout, first=skipped),
            bias=bias is not None,
            act=epilogue.act,
            factor=None if factor is None else factor.layout,
            residual=None if residual is None else residual.layout,
            input_quantizer=x.quantizer,
            output_quantizer=out.quantizer,
        )
        group = 1 if x.quantizer is None else x.quantizer.dot.group
        packed = panels(weight, spec.panels(self.lanes, self.schedule), self.lanes.count, group)
        numbers = [packed, *(padded(part, width) for part in scales)]
        if bias is not None:
            numbers.append(padded(bias, width))
        operands = [x.value, *(self.constant(part) for part in numbers)]
        operands += [other.value for other in (factor, residual) if other is not None]
        operands += self.range_operand(out)
        value = self.program.call(
            "dense",
            spec,
            lambda: dense(spec, self.lanes, self.schedule),
            operands,
            (self.batch * rows * width,),
            stored(out),
        )
        return Stream(value, rows, width, used, *out)

    def quantized(self, x: Stream) -> Stream:
        """The rows in the format in which products read them."""
        if x.quantizer is not None:
            return x
        for known, found in self._quantized:
            if known.value.same_as(x.value) and known.rows >= x.rows:
                return found.first_rows(x.rows)
        into = self.precision.input(x)
        if into.quantizer is None:
            return x
        spec = Quantize(self.batch, x.rows, x.used, x.layout, into.quantizer)
        length = into.quantizer.row_length(x.used)
        value = self.program.call(
            "quantize",
            spec,
            lambda: quantize_rows(spec, self.schedule.threads),
            [x.value, *self.range_operand(into)],
            (self.batch * x.rows * length,),
            stored(into),
        )
        found = Stream(value, x.rows, length, x.used, *into)
        self._quantized.append((x, found))
        return found

    def output_format(self, only_products: bool, *, whole_rows: bool) -> RowFormat:
        """The format in which a kernel writes rows, see `Precision.output`."""
        return self.precision.output(whole_rows=whole_rows) if only_products else FP32

    def range_operand(self, rows: RowFormat) -> list[Value]:
        """The operand of a kernel that quantizes with a static range, or none."""
        if rows.quantizer is None or rows.range is None:
            return []
        return [self.constant(rows.range.operand(rows.quantizer.dot))]

    def norm(
        self,
        x: Stream,
        norm: NormSpec,
        *,
        columns: tuple[int, ...] | None = None,
        affine: Affine | None = None,
        only_products: bool = False,
    ) -> Stream:
        """Normalised rows.

        Args:
            x: The input.
            norm: The norm.
            columns: The columns that are normalised, by default the first ones.
            affine: Weight and bias; None where the next product contains them.
            only_products: Only products read the result, so that it may be quantized.
        """
        out = self.output_format(only_products, whole_rows=True)
        spec = Normalize(
            images=self.batch,
            rows=x.rows,
            width=norm.width,
            source=x.layout,
            centred=norm.kind == "layer",
            eps=norm.eps,
            affine=affine is not None,
            gather=columns is not None,
            output_quantizer=out.quantizer,
        )
        width = self.lanes.up(norm.width)
        operands = [x.value]
        if columns is not None:
            operands.append(self.constant(np.array(columns, np.int32)))
        if affine is not None:
            weight, bias = affine
            weight = np.ones(norm.width, np.float32) if weight is None else weight
            bias = np.zeros(norm.width, np.float32) if bias is None else bias
            operands += [self.constant(padded(part, width)) for part in (weight, bias)]
        operands += self.range_operand(out)
        length = width if out.quantizer is None else out.quantizer.row_length(norm.width)
        value = self.program.call(
            "norm",
            spec,
            lambda: normalize(spec, self.lanes, self.schedule.threads),
            operands,
            (self.batch * x.rows * length,),
            stored(out),
        )
        return Stream(value, x.rows, length, norm.width, *out)

    def head_norm(self, x: Stream, spec: HeadNorm, affine: Affine, scale: float = 1.0) -> Stream:
        """Columns of heads, normalised head by head; the other columns stay.

        Args:
            x: The input.
            spec: Which columns, and the norm.
            affine: Weight and bias: one number for all, one a column, or one a head and column.
            scale: Multiplied with the result.
        """
        shape = (spec.heads, spec.norm.width)
        weight, bias = affine
        operands = [x.value]
        for part, default in ((weight, np.ones), (bias, np.zeros)):
            numbers = default(1, np.float32) if part is None else part
            numbers = np.broadcast_to(numbers, shape) * np.float32(scale)
            operands.append(self.constant(numbers.astype(np.float32).ravel()))
        return self._same_shape(
            x, "head_norm", spec, lambda: norm_heads(spec, self.schedule.threads), operands
        )

    def attend(
        self,
        spec: Attend,
        queries: Stream,
        keys_values: Stream,
        bias: Value | None = None,
        *,
        only_products: bool,
    ) -> tuple[Stream, Value | None]:
        """The heads' sums of values for each query, side by side; and the sums of columns, if any.

        Args:
            spec: The kernel, in fp32.
            queries: Rows that contain the queries.
            keys_values: Rows that contain keys and values.
            bias: Added to the scores, see `Attend.biased`.
            only_products: Only products read the result, so that it may be quantized.
        """
        lanes, schedule = self.lanes, self.schedule
        packed = self.packed_keys(spec, keys_values)
        out = self.output_format(only_products, whole_rows=False)
        spec = replace(spec, output_quantizer=out.quantizer)
        operands = [queries.value, packed]
        if bias is not None:
            operands.append(bias)
        operands += self.range_operand(out)
        width = spec.heads * spec.values.each
        results = [((spec.images * spec.query_rows * width,), stored(out))]
        if spec.columns:
            results.append(((spec.images * spec.heads * lanes.up(spec.tokens),), "float32"))
        value, *columns = self.program.call_all(
            "attend", spec, lambda: attend(spec, lanes, schedule), operands, results
        )
        found = Stream(value, spec.query_rows, width, width, *out)
        return found, columns[0] if columns else None

    def packed_keys(self, spec: Attend, keys_values: Stream) -> Value:
        """Keys and values in the order in which a kernel with this specification reads them."""
        packing = spec.packing(self.schedule.tile(spec.shape).vectors)
        return self.program.call(
            "pack_keys",
            packing,
            lambda: pack_keys(packing, self.lanes, self.schedule.threads),
            [keys_values.value],
            (packing.size(self.lanes),),
        )

    def contiguous(self, x: Stream) -> Stream:
        """The rows without others between those of two images or after them, copied if need be."""
        if x.layout.per_image == x.rows:
            return x
        value = self.program.call(
            "first_rows",
            ("first-rows", x.layout, x.rows),
            lambda: first_rows(self.batch, x.rows, x.layout),
            [x.value],
            (self.batch * x.rows * x.width,),
        )
        return Stream(value, x.rows, x.width, x.used)

    def add_constant(self, x: Stream, vector: Array) -> Stream:
        """The same vector added to every row."""
        operands = [x.value, self.constant(padded(vector, x.width))]
        return self._same_shape(
            x,
            "add_constant",
            ("add-constant", x.rows, x.layout),
            lambda: add_constant(self.batch, x.rows, x.layout, self.lanes),
            operands,
        )

    def add(self, x: Stream, y: Stream) -> Stream:
        """The sum of two streams."""
        layouts = (x.layout, y.layout)
        return self._same_shape(
            x,
            "add_rows",
            ("add-rows", x.rows, layouts),
            lambda: add_rows(self.batch, x.rows, layouts, self.lanes),
            [x.value, y.value],
        )

    def combine_pairs(self, x: Stream, pairs: int, factors: tuple[float, float]) -> Stream:
        """Weighted sums of neighbouring pieces of columns; there are 2 * `pairs` pieces."""
        rows, width = self.batch * x.rows, x.width // (2 * pairs)
        operands = [x.value, self.constant(np.array(factors, np.float32))]
        value = self.program.call(
            "combine_pairs",
            ("combine-pairs", rows, pairs, width),
            lambda: combine_pairs(rows, pairs, width, self.lanes),
            operands,
            (rows * pairs * width,),
        )
        return Stream(value, x.rows, pairs * width, pairs * width)

    def add_table(self, x: Stream, table: Array, runs: Runs) -> Stream:
        """The rows of a table, to some of which those of x are added, for each image.

        Args:
            x: The input.
            table: Shape (rows, width), with at least as many rows as x.
            runs: The rows of the table: for each run whether they stay as they are, and else the
                first and the end of the rows of x that are added.
        """
        rows = len(table)
        value = self.program.call(
            "add_table",
            ("add-table", runs, x.width),
            lambda: add_table(self.batch, runs, x.width, self.lanes),
            [x.value, self.constant(table.ravel())],
            (self.batch * rows * x.width,),
        )
        return Stream(value, rows, x.width, x.used)

    def mean(self, x: Stream, skipped: int) -> Stream:
        """One row an image: the mean of all rows but the first `skipped`."""
        layout, rows = replace(x.layout, first=skipped), x.rows - skipped
        value = self.program.call(
            "mean",
            ("mean", layout, rows),
            lambda: mean_rows(self.batch, rows, layout, self.lanes),
            [x.value],
            (self.batch * x.width,),
        )
        return Stream(value, 1, x.width, x.used)

    def _same_shape(
        self,
        x: Stream,
        name: str,
        key: Hashable,
        kernel: Callable[[], Any],
        operands: list[Value],
    ) -> Stream:
        """Call a kernel whose result has the rows of `x`, one after the other."""
        shape = (self.batch * x.rows * x.width,)
        value = self.program.call(name, key, kernel, operands, shape)
        return Stream(value, x.rows, x.width, x.used)


def product_weights(x: Stream, matrix: Matrix) -> tuple[tuple[NDArray[Any], ...], Array | None]:
    """((weights, [scales], [sums]), bias) of a product with `x`, see `Dense.operands`."""
    if x.quantizer is None:
        return (matrix.weight,), matrix.bias
    codes, scales = quantize_weights(matrix.weight, limit_pairs=x.quantizer.dot.limits_pairs)
    sums = (scales * codes.sum(axis=0, dtype=np.int64)).astype(np.float32)
    if x.range is None:
        return (codes, scales, sums), matrix.bias
    shift = np.float32(x.range.base(x.quantizer.dot)) * sums
    bias = shift if matrix.bias is None else shift + matrix.bias
    return (codes, scales * np.float32(x.range.step)), bias


def stored(rows: RowFormat) -> str:
    """TIR's type of rows in a format."""
    return "float32" if rows.quantizer is None else rows.quantizer.dot.stored
