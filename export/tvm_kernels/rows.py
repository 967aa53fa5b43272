"""Small kernels over rows: their mean, a constant added to them, and the first columns alone."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Lanes
from .place import Rows


def mean_rows(images: int, rows: int, source: Rows, lanes: Lanes) -> Any:
    """The kernel: the mean over `rows` rows of each image -> (images, width), flat."""
    width = source.width
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * source.per_image * width,), "float32"))
        out = T.arg("out", T.buffer((images * width,), "float32"))
        total = T.alloc_buffer((lanes.count,), "float32", scope="local")
        with T.serial(0, images) as image, T.serial(0, width // lanes.count) as vector:
            lanes.store(total, 0, lanes.splat(0.0))
            with T.serial(0, rows) as row:
                lanes.store(
                    total,
                    0,
                    lanes.load(total, 0)
                    + lanes.load(x, source.start(image, row) + vector * lanes.count),
                )
            lanes.store(
                out,
                image * width + vector * lanes.count,
                lanes.load(total, 0) * lanes.splat(1 / rows),
            )
    return builder.get()


def add_constant(rows: int, width: int, lanes: Lanes) -> Any:
    """The kernel: (x, vector) -> x + vector in each of `rows` rows, flat."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows * width,), "float32"))
        vector = T.arg("vector", T.buffer((width,), "float32"))
        out = T.arg("out", T.buffer((rows * width,), "float32"))
        with T.serial(0, rows) as row, T.serial(0, width // lanes.count) as part:
            place = row * width + part * lanes.count
            lanes.store(out, place, lanes.load(x, place) + lanes.load(vector, part * lanes.count))
    return builder.get()


def combine_pairs(rows: int, pairs: int, width: int, lanes: Lanes) -> Any:
    """The kernel: (x, factors (2,)) -> the sum of each row's two neighbouring pieces of `width`
    columns, each times its factor, flat.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows * pairs * 2 * width,), "float32"))
        factors = T.arg("factors", T.buffer((2,), "float32"))
        out = T.arg("out", T.buffer((rows * pairs * width,), "float32"))
        with T.serial(0, rows * pairs) as pair, T.serial(0, width // lanes.count) as part:
            place = pair * (2 * width) + part * lanes.count
            first, second = lanes.load(x, place), lanes.load(x, place + width)
            lanes.store(
                out,
                pair * width + part * lanes.count,
                first * lanes.splat(factors[0]) + second * lanes.splat(factors[1]),
            )
    return builder.get()


def add_rows(rows: int, width: int, lanes: Lanes) -> Any:
    """The kernel: (x, y) -> x + y, flat."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x, y = (T.arg(name, T.buffer((rows * width,), "float32")) for name in "xy")
        out = T.arg("out", T.buffer((rows * width,), "float32"))
        with T.serial(0, rows * width // lanes.count) as part:
            place = part * lanes.count
            lanes.store(out, place, lanes.load(x, place) + lanes.load(y, place))
    return builder.get()


def place_rows(images: int, prefix: int, rows: int, width: int, lanes: Lanes) -> Any:
    """The kernel: (x, table (prefix + rows, width)) -> each image's table, to which its rows are
    added behind the prefix, flat.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * rows * width,), "float32"))
        table = T.arg("table", T.buffer(((prefix + rows) * width,), "float32"))
        out = T.arg("out", T.buffer((images * (prefix + rows) * width,), "float32"))
        ahead, count = prefix * width, lanes.count
        with T.serial(0, images) as image:
            if prefix:
                with T.serial(0, ahead // count) as part:
                    lanes.store(
                        out,
                        image * (ahead + rows * width) + part * count,
                        lanes.load(table, part * count),
                    )
            with T.serial(0, rows * width // count) as part:
                value = lanes.load(x, image * (rows * width) + part * count) + lanes.load(
                    table, ahead + part * count
                )
                lanes.store(out, image * (ahead + rows * width) + ahead + part * count, value)
    return builder.get()


def first_rows(images: int, rows: int, source: Rows) -> Any:
    """The kernel: the first `rows` rows of each image, flat."""
    width = source.width
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((images * source.per_image * width,), "float32"))
        out = T.arg("out", T.buffer((images * rows * width,), "float32"))
        with T.serial(0, images) as image, T.serial(0, rows * width) as place:
            T.buffer_store(out, x[source.start(image, 0) + place], [image * rows * width + place])
    return builder.get()


def first_columns(rows: int, width: int, wanted: int) -> Any:
    """The kernel: flat rows of `width` -> (rows, wanted)."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows * width,), "float32"))
        out = T.arg("out", T.buffer((rows, wanted), "float32"))
        with T.serial(0, rows) as row, T.serial(0, wanted) as column:
            T.buffer_store(out, x[row * width + column], [row, column])
    return builder.get()
