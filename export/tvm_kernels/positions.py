"""Rotary positions and relative biases, and the places of the tokens that selections keep.

The tables have a row for each token of the stem. Rows of a stream are its first ones, until a
selection keeps others of each image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...compress.network.architecture import AttentionSpec
from ...compress.network.modules.relative_bias import offsets
from .attention import LOG2_E
from .emitter import Emitter
from .lanes import Expr, Lanes, bind
from .loops import over_threads, share_bounds
from .matrices import Positions, State, Stream
from .program import Value
from .rope import Rotate, rotate_heads


@dataclass(frozen=True)
class ChosenPositions:
    """The positions of the prefix rows and of the chosen patches.

    Attributes:
        images: Batch size.
        prefix: The first rows of each image, which stay.
        kept: Number of patches that are chosen.
        before: Rows of each image whose positions are given; None: each row has its own number.
    """

    images: int
    prefix: int
    kept: int
    before: int | None


def choose_positions(spec: ChosenPositions, threads: int) -> Any:
    """The kernel: (places (images, kept), [positions]) -> positions (images, prefix + kept)."""
    rows = spec.prefix + spec.kept
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        places = T.arg("places", T.buffer((spec.images * spec.kept,), "int32"))
        positions = None
        if spec.before is not None:
            positions = T.arg("positions", T.buffer((spec.images * spec.before,), "int32"))
        out = T.arg("out", T.buffer((spec.images * rows,), "int32"))

        def share(part: Expr, parts: int) -> None:
            def store(image: Expr, row: Expr, source: Expr) -> None:
                if positions is not None:
                    source = positions[image * spec.before + source]
                T.buffer_store(out, source, [image * rows + row])

            with T.serial(*share_bounds(spec.images, part, parts)) as image:
                if spec.prefix:
                    with T.serial(0, spec.prefix) as row:
                        store(image, row, row)
                with T.serial(0, spec.kept) as number:
                    place = bind(places[image * spec.kept + number])
                    store(image, spec.prefix + number, spec.prefix + place)

        over_threads(share, threads)
    return builder.get()


def chosen_positions(
    emitter: Emitter, chosen: Value, prefix: int, kept: int, before: Positions | None
) -> Positions:
    """Emit the positions behind a selection.

    Args:
        emitter: Receives the call.
        chosen: The chosen places among the patches, (batch, kept) int32, flat.
        prefix: Rows before the patches, which stay.
        kept: How many patches stay.
        before: The positions before the selection; None: the first tokens of the stem.
    """
    spec = ChosenPositions(emitter.batch, prefix, kept, None if before is None else before.rows)
    value = emitter.program.call(
        "choose_positions",
        spec,
        lambda: choose_positions(spec, emitter.schedule.threads),
        [chosen, *([] if before is None else [before.value])],
        (emitter.batch * (prefix + kept),),
        "int32",
    )
    return Positions(value, prefix + kept)


def rotate(
    emitter: Emitter,
    x: Stream,
    first: int,
    core: AttentionSpec,
    state: State,
    positions: Positions | None,
) -> Stream:
    """Emit queries or keys with rotary positions; the other columns stay.

    Args:
        emitter: Receives the call.
        x: The input.
        first: The first column of the first head.
        core: The attention.
        state: Its parameters, with the table of angles.
        positions: Which tokens of the stem the rows are; None: the first ones.
    """
    rope = core.rope
    assert rope is not None
    table = state["rope.table"]
    spec = Rotate(
        images=emitter.batch,
        rows=x.rows,
        width=x.width,
        first=first,
        heads=core.heads,
        each=core.qk,
        prefix=rope.prefix,
        patches=rope.tokens,
        tables=len(table),
        layout=rope.layout,
        positions=None if positions is None else positions.rows,
    )
    operands = [x.value, emitter.constant(np.ascontiguousarray(table).ravel())]
    operands += [] if positions is None else [positions.value]
    threads = emitter.schedule.threads
    shape = (emitter.batch * x.rows * x.width,)
    value = emitter.program.call(
        "rotate", spec, lambda: rotate_heads(spec, threads), operands, shape
    )
    return Stream(value, x.rows, x.width, x.used)


@dataclass(frozen=True)
class PairBias:
    """Biases of the pairs of the first rows of each image.

    Attributes:
        images: Batch size.
        heads: Number of heads.
        queries: Rows that are queries.
        keys: Rows that are keys.
        columns: Number of offsets in the table.
        tokens: Tokens of the stem.
        positions: Rows of each image whose positions are given.
    """

    images: int
    heads: int
    queries: int
    keys: int
    columns: int
    tokens: int
    positions: int


def gather_bias(spec: PairBias, lanes: Lanes, threads: int) -> Any:
    """The kernel: (table, index, positions) -> out, all flat.

    The table has the shape (columns, heads); the index (tokens, tokens) its row for each pair of
    tokens; out (images, heads, queries, keys rounded up to whole vectors), with zeros at the end.
    """
    stride = lanes.up(spec.keys)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        table = T.arg("table", T.buffer((spec.columns * spec.heads,), "float32"))
        index = T.arg("index", T.buffer((spec.tokens * spec.tokens,), "int32"))
        positions = T.arg("positions", T.buffer((spec.images * spec.positions,), "int32"))
        size = spec.images * spec.heads * spec.queries * stride
        out = T.arg("out", T.buffer((size,), "float32"))

        def share(part: Expr, parts: int) -> None:
            bounds = share_bounds(spec.images * spec.queries, part, parts)
            with T.serial(*bounds) as pair:
                image, row = bind(pair // spec.queries), bind(pair % spec.queries)
                at = bind(image * spec.positions)
                start = bind(positions[at + row] * spec.tokens)
                # From one head to the next.
                step = spec.queries * stride
                target = bind((image * spec.heads * spec.queries + row) * stride)
                with T.serial(0, spec.keys) as key:
                    column = bind(index[start + positions[at + key]] * spec.heads)
                    with T.serial(0, spec.heads) as head:
                        T.buffer_store(out, table[column + head], [target + head * step + key])
                if stride > spec.keys:
                    with T.serial(0, spec.heads) as head, T.serial(spec.keys, stride) as key:
                        T.buffer_store(out, T.float32(0), [target + head * step + key])

        over_threads(share, threads)
    return builder.get()


def score_bias(
    emitter: Emitter,
    core: AttentionSpec,
    state: State,
    shape: tuple[int, int],
    positions: Positions | None,
) -> Value | None:
    """Emit what a relative bias adds to the scores: keys rounded up to whole vectors.

    Args:
        emitter: Receives constants and calls.
        core: The attention.
        state: Its parameters.
        shape: (queries, keys), the first rows of the stream.
        positions: Which tokens of the stem the rows are; None: the first ones.

    Returns:
        (heads, queries, keys), for each image with positions, flat; None without a bias.
    """
    spec, lanes = core.bias, emitter.lanes
    if spec is None:
        return None
    # Pairs with a learned token may read a zero behind the table. Scores are times log2 e.
    table = np.pad(state["bias.table"], ((0, 1), (0, 0))) * np.float32(LOG2_E)
    table = np.repeat(table, core.parts, axis=1)
    index = offsets(spec).numpy()
    if positions is None:
        bias = table[index[: shape[0], : shape[1]]].transpose(2, 0, 1)
        padding = lanes.up(shape[1]) - shape[1]
        return emitter.constant(np.pad(bias, ((0, 0), (0, 0), (0, padding))).ravel())
    pairs = PairBias(
        images=emitter.batch,
        heads=table.shape[1],
        queries=shape[0],
        keys=shape[1],
        columns=len(table),
        tokens=len(index),
        positions=positions.rows,
    )
    operands = [
        emitter.constant(np.ascontiguousarray(table).ravel()),
        emitter.constant(index.astype(np.int32).ravel()),
        positions.value,
    ]
    return emitter.program.call(
        "gather_bias",
        pairs,
        lambda: gather_bias(pairs, lanes, emitter.schedule.threads),
        operands,
        (pairs.images * pairs.heads * pairs.queries * lanes.up(pairs.keys),),
    )
