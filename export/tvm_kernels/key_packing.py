"""Keys and values of each head, packed in the order in which attention reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, Lanes, bind
from .loops import Run, over_threads, share_bounds, split_evenly


@dataclass(frozen=True)
class HeadColumns:
    """Columns of heads in rows: head h has `each` columns from first + h * each on.

    Attributes:
        width: Columns of a row.
        first: The first column of the first head.
        each: Columns of one head.
    """

    width: int
    first: int
    each: int


def key_panels(tokens: int, lanes: Lanes, vectors: int) -> tuple[Run, ...]:
    """How the tokens are split into panels of at most `vectors` vectors."""
    return split_evenly(lanes.up(tokens) // lanes.count, vectors)


@dataclass(frozen=True)
class KeyPacking:
    """Keys and values as rows, and how they are packed.

    A head's part is [keys, transposed, in panels of tokens | values, row by row].

    Attributes:
        images: Batch size.
        heads: Number of heads.
        tokens: Rows of each image.
        keys: The columns of the keys.
        values: The columns of the values; `each` is a multiple of the vector width, 0 where only
            the keys are packed.
        vectors: The most vectors of tokens in a panel.
    """

    images: int
    heads: int
    tokens: int
    keys: HeadColumns
    values: HeadColumns
    vectors: int

    def head_size(self, lanes: Lanes) -> int:
        """Numbers that one head's keys and values take."""
        return lanes.up(self.tokens) * self.keys.each + self.tokens * self.values.each

    def size(self, lanes: Lanes) -> int:
        """Numbers that all keys and values take."""
        return self.images * self.heads * self.head_size(lanes)


def pack_keys(spec: KeyPacking, lanes: Lanes, threads: int) -> Any:
    """The kernel: rows (images, tokens, width) -> (images, heads, head_size), flat.

    Tokens that fill the last vector of a panel are zero.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        rows = spec.images * spec.tokens * spec.keys.width
        x = T.arg("x", T.buffer((rows,), "float32"))
        out = T.arg("out", T.buffer((spec.size(lanes),), "float32"))
        writer = _Writer(spec, lanes, x, out)

        def share(part: Expr, parts: int) -> None:
            with T.serial(*share_bounds(spec.images * spec.heads, part, parts)) as pair:
                writer.head(pair)

        over_threads(share, threads)
    return builder.get()


class _Writer:
    """Emits the packing of heads. A pair is (image, head), counted over both."""

    def __init__(self, spec: KeyPacking, lanes: Lanes, x: Buffer, out: Buffer) -> None:
        self.spec, self.lanes, self.x, self.out = spec, lanes, x, out

    def head(self, pair: Expr) -> None:
        """Keys and values of one head."""
        spec, lanes, count = self.spec, self.lanes, self.lanes.count
        keys, values, tokens = spec.keys, spec.values, spec.tokens
        rows = bind(pair // spec.heads * (tokens * keys.width))
        column = bind(rows + keys.first + pair % spec.heads * keys.each)
        start = bind(pair * spec.head_size(lanes))
        for run in key_panels(tokens, lanes, spec.vectors):
            partial = (run.start + run.length) * count > tokens
            with (
                T.serial(0, run.count - 1 if partial else run.count) as panel,
                T.serial(0, run.size) as vector,
            ):
                self.transpose(column, start, run, panel, vector, count)
            if partial:
                last, valid = (
                    run.count - 1,
                    tokens - (run.start + run.length - 1) * count,
                )
                with T.serial(0, run.size - 1) as vector:
                    self.transpose(column, start, run, last, vector, count)
                self.transpose(column, start, run, last, run.size - 1, valid)
        if not values.each:
            return
        value = bind(rows + values.first + pair % spec.heads * values.each)
        with T.serial(0, tokens) as token, T.serial(0, values.each // count) as vector:
            target = start + lanes.up(tokens) * keys.each + token * values.each + vector * count
            source = value + token * values.width + vector * count
            lanes.store(self.out, target, lanes.load(self.x, source))

    def transpose(
        self, column: Expr, start: Expr, run: Run, panel: Expr, vector: Expr, valid: int
    ) -> None:
        """One vector of tokens, of which `valid` exist: each key column becomes a vector."""
        lanes, keys, x, out = self.lanes, self.spec.keys, self.x, self.out
        count, stride = lanes.count, run.size * lanes.count
        token = bind((run.start + panel * run.size + vector) * count)
        target = bind(start + (run.start + panel * run.size) * count * keys.each + vector * count)
        with T.serial(0, keys.each) as k:
            if valid == count:
                gathered = lanes.gather(x, column + token * keys.width + k, keys.width)
                lanes.store(out, target + k * stride, gathered)
                return
            for lane in range(count):
                value = (
                    x[column + (token + lane) * keys.width + k] if lane < valid else T.float32(0)
                )
                T.buffer_store(out, value, [target + k * stride + lane])
