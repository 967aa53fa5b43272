"""Outputs of a network that are rows: tokens, patches, and the stream after a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...compress.network.named_outputs import OutputSpec
from .emitter import Emitter
from .lanes import RowLayout
from .matrices import Stream
from .program import Value


def write_output(emitter: Emitter, x: Stream, output: OutputSpec) -> Value:
    """Emit an output: the last rows of each image, at the source model's width.

    Args:
        emitter: Receives the call.
        x: All tokens, in fp32.
        output: The output.

    Returns:
        (batch, rows, width).
    """
    rows, width = output.shape
    layout, places = replace(x.layout, first=x.rows - rows), output.writes
    count = None if places is None else len(places)
    operands = [x.value]
    if places is not None:
        operands.append(emitter.constant(np.array(places, np.int32)))
    return emitter.program.call(
        "output_rows",
        ("output-rows", layout, rows, width, count),
        lambda: output_rows(emitter.batch, rows, layout, width, count),
        operands,
        (emitter.batch, rows, width),
    )


def output_rows(
    images: int, rows: int, source: RowLayout, width: int, places: int | None = None
) -> Any:
    """The kernel: (x, [places]) -> rows without padding, (images, rows, width).

    Args:
        images: Batch size.
        rows: How many rows of each image are written.
        source: Where they are.
        width: Columns of the result.
        places: With index lists, how many columns x has; column i is written to places[i], and the
            others are zero. None: the first columns are copied.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * source.per_image * source.width,), "float32"))
        index = None if places is None else T.arg("places", T.buffer((places,), "int32"))
        out = T.arg("out", T.buffer((images, rows, width), "float32"))
        with T.serial(0, images) as image, T.serial(0, rows) as row:
            if index is None:
                with T.serial(0, width) as column:
                    value = x[source.start(image, row) + column]
                    T.buffer_store(out, value, [image, row, column])
            else:
                with T.serial(0, width) as column:
                    T.buffer_store(out, T.float32(0), [image, row, column])
                with T.serial(0, places) as column:
                    value = x[source.start(image, row) + column]
                    T.buffer_store(out, value, [image, row, index[column]])
    return builder.get()
