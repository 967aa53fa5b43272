"""Small kernels over rows: means, sums, tables of positions, first rows and first columns."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ...compress.network.token_order import Runs
from .lanes import Lanes, RowLayout


def mean_rows(images: int, rows: int, source: RowLayout, lanes: Lanes) -> Any:
    """The kernel: the mean over rows of each image -> (images, width), flat.

    Args:
        images: Batch size.
        rows: How many rows the mean is over.
        source: Where they are.
        lanes: The vectors; the width is a multiple of them.
    """
    width, count = source.width, lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * source.per_image * width,), "float32"))
        out = T.arg("out", T.buffer((images * width,), "float32"))
        total = T.alloc_buffer((count,), "float32", scope="local")
        with T.serial(0, images) as image, T.serial(0, width // count) as vector:
            lanes.store(total, 0, lanes.splat(0.0))
            with T.serial(0, rows) as row:
                value = lanes.load(x, source.start(image, row) + vector * count)
                lanes.store(total, 0, lanes.load(total, 0) + value)
            mean = lanes.load(total, 0) * lanes.splat(1 / rows)
            lanes.store(out, image * width + vector * count, mean)
    return builder.get()


def largest_of_rows(images: int, rows: int, source: RowLayout, factor: float, lanes: Lanes) -> Any:
    """The kernel: the maximum over rows of each image, times a factor -> (images, width), flat.

    Args:
        images: Batch size.
        rows: How many rows the maximum is over.
        source: Where they are.
        factor: Multiplied with the result.
        lanes: The vectors; the width is a multiple of them.
    """
    width, count = source.width, lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((source.size(images, rows),), "float32"))
        out = T.arg("out", T.buffer((images * width,), "float32"))
        top = T.alloc_buffer((count,), "float32", scope="local")
        with T.serial(0, images) as image, T.serial(0, width // count) as vector:
            lanes.store(top, 0, lanes.load(x, source.start(image, 0) + vector * count))
            with T.serial(1, rows) as row:
                value = lanes.load(x, source.start(image, row) + vector * count)
                lanes.store(top, 0, T.max(lanes.load(top, 0), value))
            largest = lanes.load(top, 0) * lanes.splat(factor)
            lanes.store(out, image * width + vector * count, largest)
    return builder.get()


def add_constant(images: int, rows: int, source: RowLayout, lanes: Lanes) -> Any:
    """The kernel: (x, vector) -> x + vector in each row, (images, rows, width), flat.

    Args:
        images: Batch size.
        rows: Rows of each image that are computed.
        source: Where they are.
        lanes: The vectors; the width is a multiple of them.
    """
    width, count = source.width, lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((source.size(images, rows),), "float32"))
        vector = T.arg("vector", T.buffer((width,), "float32"))
        out = T.arg("out", T.buffer((images * rows * width,), "float32"))
        with (
            T.serial(0, images) as image,
            T.serial(0, rows) as row,
            T.serial(0, width // count) as part,
        ):
            value = lanes.load(x, source.start(image, row) + part * count)
            value = value + lanes.load(vector, part * count)
            lanes.store(out, (image * rows + row) * width + part * count, value)
    return builder.get()


def combine_pairs(rows: int, pairs: int, width: int, lanes: Lanes) -> Any:
    """The kernel: (x, factors (2,)) -> weighted sums of neighbouring pieces of columns, flat.

    Args:
        rows: Rows of all images.
        pairs: Pairs of pieces in a row.
        width: Columns of a piece, a multiple of the vector width.
        lanes: The vectors.
    """
    count = lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows * pairs * 2 * width,), "float32"))
        factors = T.arg("factors", T.buffer((2,), "float32"))
        out = T.arg("out", T.buffer((rows * pairs * width,), "float32"))
        with T.serial(0, rows * pairs) as pair, T.serial(0, width // count) as part:
            index = pair * (2 * width) + part * count
            first, second = lanes.load(x, index), lanes.load(x, index + width)
            value = first * lanes.splat(factors[0]) + second * lanes.splat(factors[1])
            lanes.store(out, pair * width + part * count, value)
    return builder.get()


def add_rows(images: int, rows: int, sources: tuple[RowLayout, RowLayout], lanes: Lanes) -> Any:
    """The kernel: (x, y) -> x + y, (images, rows, width), flat.

    Args:
        images: Batch size.
        rows: Rows of each image that are computed.
        sources: Where those of x and of y are; both have the same width.
        lanes: The vectors; the width is a multiple of them.
    """
    size, count = rows * sources[0].width, lanes.count
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x, y = (
            T.arg(name, T.buffer((source.size(images, rows),), "float32"))
            for name, source in zip("xy", sources, strict=True)
        )
        out = T.arg("out", T.buffer((images * size,), "float32"))
        with T.serial(0, images) as image, T.serial(0, size // count) as part:
            first, second = (
                lanes.load(buffer, source.start(image, 0) + part * count)
                for buffer, source in zip((x, y), sources, strict=True)
            )
            lanes.store(out, image * size + part * count, first + second)
    return builder.get()


def add_table(images: int, runs: Runs, width: int, lanes: Lanes) -> Any:
    """The kernel: (x, table) -> rows of the table, in some runs plus those of x, for each image.

    Args:
        images: Batch size.
        runs: The rows of the table: for each run whether they stay as they are, and the first and
            the end of them; elsewhere of the rows of x that are added.
        width: Columns of a row, a multiple of the vector width.
        lanes: The vectors.
    """
    count = lanes.count
    rows = sum(stop - start for _, start, stop in runs)
    added = sum(stop - start for stays, start, stop in runs if not stays)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * added * width,), "float32"))
        table = T.arg("table", T.buffer((rows * width,), "float32"))
        out = T.arg("out", T.buffer((images * rows * width,), "float32"))
        with T.serial(0, images) as image:
            row = 0
            for stays, start, stop in runs:
                first, size = row * width, (stop - start) * width
                with T.serial(0, size // count) as part:
                    value = lanes.load(table, first + part * count)
                    if not stays:
                        source = image * (added * width) + start * width + part * count
                        value = lanes.load(x, source) + value
                    lanes.store(out, image * (rows * width) + first + part * count, value)
                row += stop - start
    return builder.get()


def first_rows(images: int, rows: int, source: RowLayout) -> Any:
    """The kernel: the first `rows` rows of each image, flat."""
    width = source.width
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * source.per_image * width,), "float32"))
        out = T.arg("out", T.buffer((images * rows * width,), "float32"))
        with T.serial(0, images) as image, T.serial(0, rows * width) as index:
            T.buffer_store(out, x[source.start(image, 0) + index], [image * rows * width + index])
    return builder.get()


def first_columns(rows: int, width: int, kept: int) -> Any:
    """The kernel: rows of `width` columns, flat -> their first columns (rows, kept)."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows * width,), "float32"))
        out = T.arg("out", T.buffer((rows, kept), "float32"))
        with T.serial(0, rows) as row, T.serial(0, kept) as column:
            T.buffer_store(out, x[row * width + column], [row, column])
    return builder.get()
