"""The calls that a program is made of, each in one method: products, norms, codes, and what rows
need besides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compress.network.architecture import AttentionSpec, NormSpec
from .codes import Coding, Encode, Range, encode_rows
from .dense import Dense, dense
from .head_norm import HeadNorm, norm_heads
from .lanes import Lanes
from .matrices import Matrix, State, Stream
from .norm import Normalise, normalise
from .packing import Array, in_eight_bits, padded, panels
from .place import Rows
from .precision import Precision
from .program import Program, Value
from .rope import Turn, turn_heads
from .rows import add_constant, add_rows, combine_pairs, first_rows, mean_rows, place_rows
from .schedule import Schedule


class Emitter:
    """Writes kernels into a program, for `batch` images, in the numbers of a precision."""

    def __init__(
        self, program: Program, lanes: Lanes, schedule: Schedule, batch: int, precision: Precision
    ) -> None:
        self.program, self.lanes, self.schedule, self.batch, self.precision = (
            program,
            lanes,
            schedule,
            batch,
            precision,
        )
        # Rows that other kernels read in fp32 are turned into codes once, however many products
        # read them.
        self._encoded: list[tuple[Stream, Stream]] = []

    def dense(
        self,
        x: Stream,
        rows: int,
        matrix: Matrix,
        *,
        act: str = "identity",
        factor: Stream | None = None,
        residual: Stream | None = None,
        for_products: bool = False,
        exact: bool = False,
        skipped: int = 0,
    ) -> Stream:
        """`rows` rows of x, behind those skipped, times a matrix, and what comes behind it.

        for_products: nothing else reads the result. exact: in fp32 in any precision.
        """
        x = x if exact else self.in_codes(x)
        depth, used = matrix.weight.shape
        width = self.lanes.up(used)
        weights, bias = self.weights(x, matrix)
        writes, known = (
            self.precision.for_products(whole_rows=False) if for_products else (None, None)
        )
        spec = Dense(
            self.batch,
            rows,
            depth,
            width,
            replace(x.place, first=skipped),
            bias is not None,
            act,
            None if factor is None else factor.place,
            None if residual is None else residual.place,
            x.coding,
            writes,
        )
        group = 1 if x.coding is None else x.coding.dot.group
        packed = panels(weights[0], spec.panels(self.lanes, self.schedule), self.lanes.count, group)
        operands = [
            x.value,
            *(
                self.program.constant(part)
                for part in (packed, *(padded(part, width) for part in weights[1:]))
            ),
        ]
        if bias is not None:
            operands.append(self.program.constant(padded(bias, width)))
        operands += [other.value for other in (factor, residual) if other is not None]
        operands += self.range_operand(writes, known)
        shape = (self.batch * rows * width,)
        value = self.program.call(
            "dense",
            spec,
            lambda: dense(spec, self.lanes, self.schedule),
            operands,
            shape,
            stored(writes),
        )
        return Stream(value, rows, width, used, writes, known)

    def in_codes(self, x: Stream) -> Stream:
        """The rows as products read them in this precision."""
        if x.coding is not None:
            return x
        for known, found in self._encoded:
            if known.value.same_as(x.value):
                return found
        coding, span = self.precision.read(x)
        if coding is None:
            return x
        spec = Encode(self.batch, x.rows, x.used, x.place, coding)
        length = coding.row_length(x.used)
        operands = [x.value, *self.range_operand(coding, span)]
        shape = (self.batch * x.rows * length,)
        value = self.program.call(
            "encode",
            spec,
            lambda: encode_rows(spec, self.schedule.threads),
            operands,
            shape,
            stored(coding),
        )
        found = Stream(value, x.rows, length, x.used, coding, span)
        self._encoded.append((x, found))
        return found

    def range_operand(self, coding: Coding | None, known: Range | None) -> list[Value]:
        """What a kernel needs that writes codes of a range known beforehand."""
        return (
            [self.program.constant(known.operand(coding.dot))]
            if coding is not None and known is not None
            else []
        )

    @staticmethod
    def weights(x: Stream, matrix: Matrix) -> tuple[tuple[NDArray[Any], ...], Array | None]:
        """((weights, [scales], [sums]), bias) of a product with rows as they are: what
        `Dense.operands` names.
        """
        if x.coding is None:
            return (matrix.weight,), matrix.bias
        codes, scales = in_eight_bits(matrix.weight)
        sums = (scales * codes.sum(axis=0, dtype=np.int64)).astype(np.float32)
        if x.range is None:
            return (codes, scales, sums), matrix.bias
        shift = np.float32(x.range.base(x.coding.dot)) * sums
        return (
            codes,
            scales * np.float32(x.range.step),
        ), shift if matrix.bias is None else shift + matrix.bias

    def normed(
        self,
        x: Stream,
        norm: NormSpec,
        *,
        columns: tuple[int, ...] | None = None,
        affine: tuple[Array | None, Array | None] | None = None,
        for_products: bool = False,
    ) -> Stream:
        """Rows normalised over the columns named, or over all that mean something. for_products:
        nothing else reads them.
        """
        writes, known = (
            self.precision.for_products(whole_rows=True) if for_products else (None, None)
        )
        spec = Normalise(
            self.batch,
            x.rows,
            norm.width,
            x.place,
            norm.kind == "layer",
            norm.eps,
            affine is not None,
            columns is not None,
            writes,
        )
        width = self.lanes.up(norm.width)
        operands = [x.value]
        if columns is not None:
            operands.append(self.program.constant(np.array(columns, np.int32)))
        if affine is not None:
            weight, bias = affine
            operands.append(
                self.program.constant(
                    padded(np.ones(norm.width, np.float32) if weight is None else weight, width)
                )
            )
            operands.append(
                self.program.constant(
                    padded(np.zeros(norm.width, np.float32) if bias is None else bias, width)
                )
            )
        operands += self.range_operand(writes, known)
        length = width if writes is None else writes.row_length(norm.width)
        shape = (self.batch * x.rows * length,)
        value = self.program.call(
            "norm",
            spec,
            lambda: normalise(spec, self.lanes, self.schedule.threads),
            operands,
            shape,
            stored(writes),
        )
        return Stream(value, x.rows, length, norm.width, writes, known)

    def heads_normed(
        self,
        x: Stream,
        spec: HeadNorm,
        state: State,
        name: str,
        scale: float,
        chosen: tuple[int, ...] | None = None,
    ) -> Stream:
        """Queries or keys normalised head by head, the other columns as they are."""
        shape = (spec.heads, spec.norm.width)
        weight, bias = (
            state.get(f"{name}.weight", np.ones(1, np.float32)),
            state.get(f"{name}.bias", np.zeros(1, np.float32)),
        )
        if spec.per_head and chosen is not None:
            weight, bias = (
                part[list(chosen)] if part.ndim == 2 else part for part in (weight, bias)
            )
        weight, bias = (
            np.broadcast_to(weight, shape) * np.float32(scale),
            np.broadcast_to(bias, shape) * np.float32(scale),
        )
        operands = [
            x.value,
            self.program.constant(weight.astype(np.float32).ravel()),
            self.program.constant(bias.astype(np.float32).ravel()),
        ]
        value = self.program.call(
            "head_norm",
            spec,
            lambda: norm_heads(spec, self.schedule.threads),
            operands,
            (spec.rows * spec.width,),
        )
        return Stream(value, x.rows, x.width, x.used)

    def keys_normed(self, x: Stream, core: AttentionSpec, state: State) -> Stream:
        """Keys that begin with the first column, head by head."""
        assert core.k_norm is not None
        spec = HeadNorm(
            self.batch * x.rows, x.width, 0, core.heads, core.k_norm, core.qk_norm_per_head
        )
        return self.heads_normed(x, spec, state, "k_norm", 1.0)

    def turned(self, x: Stream, first: int, core: AttentionSpec, state: State) -> Stream:
        """Queries or keys turned by their positions, the other columns as they are."""
        rope = core.rope
        assert rope is not None
        table = state["rope.table"]
        spec = Turn(
            self.batch,
            x.rows,
            x.width,
            first,
            core.heads,
            core.qk,
            rope.prefix,
            rope.tokens,
            len(table),
            rope.layout,
        )
        operands = [x.value, self.program.constant(np.ascontiguousarray(table).ravel())]
        value = self.program.call(
            "turn",
            spec,
            lambda: turn_heads(spec, self.schedule.threads),
            operands,
            (self.batch * x.rows * x.width,),
        )
        return Stream(value, x.rows, x.width, x.used)

    def kept(self, x: Stream, rows: int) -> Stream:
        """The first rows of each image."""
        value = self.program.call(
            "first",
            (x.place, rows),
            lambda: first_rows(self.batch, rows, x.place),
            [x.value],
            (self.batch * rows * x.width,),
        )
        return Stream(value, rows, x.width, x.used)

    def constant_added(self, x: Stream, vector: Array) -> Stream:
        """The same numbers added to every row."""
        rows = self.batch * x.rows
        operands = [x.value, self.program.constant(padded(vector, x.width))]
        value = self.program.call(
            "add",
            ("add", rows, x.width),
            lambda: add_constant(rows, x.width, self.lanes),
            operands,
            (rows * x.width,),
        )
        return Stream(value, x.rows, x.width, x.used)

    def added(self, x: Stream, y: Stream) -> Stream:
        """Row by row."""
        rows = self.batch * x.rows
        key = ("add-rows", rows, x.width)
        value = self.program.call(
            "add_rows",
            key,
            lambda: add_rows(rows, x.width, self.lanes),
            [x.value, y.value],
            (rows * x.width,),
        )
        return Stream(value, x.rows, x.width, x.used)

    def combined(self, x: Stream, pairs: int, factors: tuple[float, float]) -> Stream:
        """One piece of columns instead of each two neighbours: their sum, each times its factor."""
        rows, width = self.batch * x.rows, x.width // (2 * pairs)
        operands = [x.value, self.program.constant(np.array(factors, np.float32))]
        key = ("combine", rows, pairs, width)
        value = self.program.call(
            "combine",
            key,
            lambda: combine_pairs(rows, pairs, width, self.lanes),
            operands,
            (rows * pairs * width,),
        )
        return Stream(value, x.rows, pairs * width, pairs * width)

    def placed(self, x: Stream, table: Array) -> Stream:
        """Rows behind as many new ones as the table has more; the table, (rows, width), is added to
        all.
        """
        rows, prefix = len(table), len(table) - x.rows
        operands = [x.value, self.program.constant(table.ravel())]
        key = ("place", prefix, x.rows, x.width)
        value = self.program.call(
            "place",
            key,
            lambda: place_rows(self.batch, prefix, x.rows, x.width, self.lanes),
            operands,
            (self.batch * rows * x.width,),
        )
        return Stream(value, rows, x.width, x.used)

    def mean(self, x: Stream, skipped: int) -> Stream:
        """One row: the mean of all but the first `skipped`."""
        place, rows = Rows(x.rows, x.width, skipped), x.rows - skipped
        value = self.program.call(
            "mean",
            place,
            lambda: mean_rows(self.batch, rows, place, self.lanes),
            [x.value],
            (self.batch * x.width,),
        )
        return Stream(value, 1, x.width, x.used)


def stored(coding: Coding | None) -> str:
    """TIR's type of what a kernel writes."""
    return "float32" if coding is None else coding.dot.stored
