"""Keys and values of each head in the order in which attention multiplies with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import named
from .lanes import Expr, Lanes
from .schedule import Tile
from .threads import over_threads
from .tiles import Run, bounds, even


@dataclass(frozen=True)
class Heads:
    """Where heads lie in rows of `width` columns: head h has columns first + h * each ... and
    `each` of them.
    """

    width: int
    first: int
    each: int


def key_panels(tokens: int, lanes: Lanes, tile: Tile) -> tuple[Run, ...]:
    """Tokens in panels, counted in vectors: the columns of the product of queries with keys."""
    return even(lanes.up(tokens) // lanes.count, tile.vectors)


def pack_keys(
    images: int,
    heads: int,
    tokens: int,
    keys: Heads,
    values: Heads,
    lanes: Lanes,
    tile: Tile,
    threads: int,
) -> Any:
    """The kernel: rows (images, tokens, width) -> (images, heads, [keys turned on their side in
    panels of tokens | values row by row]), flat.

    Tokens that fill the last vector of a panel are zero.
    """
    count = lanes.count
    side = lanes.up(tokens)
    size = packed_size(tokens, keys, values, lanes)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * tokens * keys.width,), "float32"))
        out = T.arg("out", T.buffer((images * heads * size,), "float32"))

        def turn(
            column: Expr, start: Expr, run: Run, panel: Expr, vector: Expr, wanted: int
        ) -> None:
            """One vector of tokens, of which `wanted` exist: each key column of theirs is a vector
            of the panel.
            """
            token = named((run.start + panel * run.size + vector) * count)
            place = named(
                start + (run.start + panel * run.size) * count * keys.each + vector * count
            )
            with T.serial(0, keys.each) as k:
                if wanted == count:
                    lanes.store(
                        out,
                        place + k * (run.size * count),
                        lanes.gather(x, column + token * keys.width + k, keys.width),
                    )
                    return
                for lane in range(count):
                    value = (
                        x[column + (token + lane) * keys.width + k]
                        if lane < wanted
                        else T.float32(0)
                    )
                    T.buffer_store(out, value, [place + k * (run.size * count) + lane])

        def head_of(pair: Expr) -> None:
            rows = named(pair // heads * (tokens * keys.width))
            column = named(rows + keys.first + pair % heads * keys.each)
            start = named(pair * size)
            for run in key_panels(tokens, lanes, tile):
                last = (run.start + run.length) * count > tokens
                with (
                    T.serial(0, run.count - 1 if last else run.count) as panel,
                    T.serial(0, run.size) as vector,
                ):
                    turn(column, start, run, panel, vector, count)
                if last:
                    with T.serial(0, run.size - 1) as vector:
                        turn(column, start, run, run.count - 1, vector, count)
                    turn(
                        column,
                        start,
                        run,
                        run.count - 1,
                        run.size - 1,
                        tokens - (run.start + run.length - 1) * count,
                    )
            value = named(rows + values.first + pair % heads * values.each)
            with T.serial(0, tokens) as token, T.serial(0, values.each // count) as vector:
                target = start + side * keys.each + token * values.each + vector * count
                lanes.store(
                    out, target, lanes.load(x, value + token * values.width + vector * count)
                )

        def share(part: Expr, parts: int) -> None:
            with T.serial(*bounds(images * heads, part, parts)) as pair:
                head_of(pair)

        over_threads(share, threads)
    return builder.get()


def packed_size(tokens: int, keys: Heads, values: Heads, lanes: Lanes) -> int:
    """Numbers that one head's keys and values take."""
    return lanes.up(tokens) * keys.each + tokens * values.each
