"""Windows of an image as rows: what convolutions and soft splits before the patches multiply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, Lanes, bind
from .loops import over_threads, row_behind, rows_between, share_bounds

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """A grid of windows. A row has the pixels of a window, and each pixel its channels.

    In windows of the network's input, which has its channels first, each channel has its pixels.

    Attributes:
        images: Batch size.
        channels: Channels of the source.
        size: Rows and columns of the source.
        row_width: Elements from one pixel of the source to the next; None: the network's input.
        grid: Windows down and across.
        kernel: Height and width of a window.
        stride: Pixels from window to window, down and across.
        padding: Rows and columns of zeros around the source.
        prefix: Rows of zeros before the windows of each image.
        listed: How many windows a table lists, which alone are cut out; None: all of the grid.
        gaps: For each row of zeros between the windows the number of windows before it.
    """

    images: int
    channels: int
    size: Pair
    row_width: int | None
    grid: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    prefix: int = 0
    listed: int | None = None
    gaps: tuple[int, ...] = ()

    @property
    def windows(self) -> int:
        """Windows of each image."""
        return self.listed or math.prod(self.grid)

    @property
    def rows(self) -> int:
        """Rows of each image."""
        return self.prefix + len(self.gaps) + self.windows

    @property
    def depth(self) -> int:
        """Columns of a row."""
        return self.channels * math.prod(self.kernel)


def cut_windows(spec: Windows, lanes: Lanes, threads: int) -> Any:
    """The kernel: (source, [top and left pixel of each listed window]) -> rows, flat."""
    (height, width), count = spec.size, spec.windows
    shape: tuple[int, ...] = (spec.images, spec.channels, height, width)
    if spec.row_width is not None:
        shape = (spec.images * height * width * spec.row_width,)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        source = T.arg("source", T.buffer(shape, "float32"))
        table = None
        if spec.listed is not None:
            table = T.arg("corners", T.buffer((2 * spec.listed,), "int32"))
        out = T.arg("out", T.buffer((spec.images * spec.rows * spec.depth,), "float32"))
        for row in rows_between(spec.prefix, spec.gaps):
            with T.serial(0, spec.images) as image, T.serial(0, spec.depth) as index:
                start = (image * spec.rows + row) * spec.depth
                T.buffer_store(out, T.float32(0), [start + index])

        def share(part: Expr, parts: int) -> None:
            with T.serial(*share_bounds(spec.images * count, part, parts)) as index:
                image, number = bind(index // count), bind(index % count)
                if table is None:
                    top = number // spec.grid[1] * spec.stride[0] - spec.padding[0]
                    left = number % spec.grid[1] * spec.stride[1] - spec.padding[1]
                else:
                    top, left = table[2 * number], table[2 * number + 1]
                row = row_behind(number, spec.prefix, spec.gaps)
                target = bind((image * spec.rows + row) * spec.depth)
                _cut_window(spec, lanes, (source, out), (image, bind(top), bind(left)), target)

        over_threads(share, threads)
    return builder.get()


def _cut_window(
    spec: Windows,
    lanes: Lanes,
    buffers: tuple[Buffer, Buffer],
    place: tuple[Expr, Expr, Expr],
    target: Expr,
) -> None:
    """The row of one window.

    Args:
        spec: The kernel.
        lanes: The vectors.
        buffers: The source, and the rows.
        place: The image, and the top and left pixel of the window.
        target: The first element of the row.
    """
    (height, width), (image, top, left) = spec.size, place
    with T.serial(0, spec.kernel[0]) as i, T.serial(0, spec.kernel[1]) as j:
        y, x = bind(top + i), bind(left + j)
        pixel, into = (image, y, x), (target, i, j)
        if spec.padding == (0, 0):
            _copy_pixel(spec, lanes, buffers, pixel, into)
        else:
            with T.If(T.And(T.And(y >= 0, y < height), T.And(x >= 0, x < width))):
                with T.Then():
                    _copy_pixel(spec, lanes, buffers, pixel, into)
                with T.Else():
                    _copy_pixel(spec, lanes, buffers, None, into)


def _copy_pixel(
    spec: Windows,
    lanes: Lanes,
    buffers: tuple[Buffer, Buffer],
    pixel: tuple[Expr, Expr, Expr] | None,
    place: tuple[Expr, Expr, Expr],
) -> None:
    """All channels of one pixel; None is a pixel of zeros.

    Args:
        spec: The kernel.
        lanes: The vectors.
        buffers: The source, and the rows.
        pixel: The image, row and column of the pixel.
        place: The first element of the window's row, and row and column in the window.
    """
    (source, out), (target, i, j) = buffers, place
    down, across = spec.kernel
    if spec.row_width is None:
        with T.serial(0, spec.channels) as c:
            value = T.float32(0) if pixel is None else source[pixel[0], c, pixel[1], pixel[2]]
            T.buffer_store(out, value, [target + (c * down + i) * across + j])
        return
    begin = bind(target + (i * across + j) * spec.channels)
    start: Expr = 0
    if pixel is not None:
        image, y, x = pixel
        start = bind(((image * spec.size[0] + y) * spec.size[1] + x) * spec.row_width)
    full = spec.channels // lanes.count
    with T.serial(0, full) as vector:
        at = vector * lanes.count
        values = lanes.zero() if pixel is None else lanes.load(source, start + at)
        lanes.store(out, begin + at, values)
    with T.serial(full * lanes.count, spec.channels) as c:
        value = T.float32(0) if pixel is None else source[start + c]
        T.buffer_store(out, value, [begin + c])
