"""Patches as rows: a row of zeros for each learned token, and the pixels of each patch.

Pixels are in the order of the convolution's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, Lanes, bind
from .loops import over_threads, row_behind, rows_between, share_bounds


@dataclass(frozen=True)
class Patches:
    """A grid of patches.

    Attributes:
        images: Batch size.
        image: (channels, height, width).
        grid: Patches down and across.
        patch: Height and width of a patch.
        stride: Pixels from patch to patch, down and across.
        padding: Rows and columns of zeros around the image.
        prefix: Rows of zeros before the patches.
        width_out: Columns of a row, at least channels * patch area; the rest is zero.
        listed: How many patches a table lists, which alone are cut out, in its order; None: all
            patches of the grid, row by row.
        gaps: For each row of zeros between the patches the number of patches before it.
    """

    images: int
    image: tuple[int, int, int]
    grid: tuple[int, int]
    patch: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    prefix: int
    width_out: int
    listed: int | None = None
    gaps: tuple[int, ...] = ()

    @property
    def patches(self) -> int:
        """Patches of each image."""
        return self.listed or self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Rows of each image."""
        return self.prefix + len(self.gaps) + self.patches


def corners(spec: Patches, order: Sequence[int]) -> NDArray[np.int32]:
    """The table of a kernel with `listed` patches: top and left pixel of each, flat.

    Args:
        spec: The kernel.
        order: The patches, counted row by row in the grid.
    """
    places = np.stack(np.divmod(order, spec.grid[1]), axis=1)
    return (places * spec.stride - spec.padding).astype(np.int32).ravel()


def cut_patches(spec: Patches, lanes: Lanes, threads: int) -> Any:
    """The kernel: (images, [corners]) -> rows (images * tokens, width_out), flat."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        images = T.arg("images", T.buffer((spec.images, *spec.image), "float32"))
        table = None
        if spec.listed is not None:
            table = T.arg("corners", T.buffer((2 * spec.listed,), "int32"))
        out = T.arg("out", T.buffer((spec.images * spec.tokens * spec.width_out,), "float32"))

        def share(part: Expr, parts: int) -> None:
            if table is not None:
                count = spec.patches
                with T.serial(*share_bounds(spec.images * count, part, parts)) as index:
                    number = bind(index % count)
                    corner = bind(table[2 * number]), bind(table[2 * number + 1])
                    _cut_patch(spec, lanes, (images, out), (index // count, number), corner)
                return
            (down, across), stride, padding = spec.grid, spec.stride, spec.padding
            with (
                T.serial(*share_bounds(spec.images * down, part, parts)) as band,
                T.serial(0, across) as column,
            ):
                row = band % down
                corner = row * stride[0] - padding[0], column * stride[1] - padding[1]
                place = band // down, row * across + column
                _cut_patch(spec, lanes, (images, out), place, corner)

        for row in rows_between(spec.prefix, spec.gaps):
            with T.serial(0, spec.images) as image, T.serial(0, spec.width_out) as index:
                start = (image * spec.tokens + row) * spec.width_out
                T.buffer_store(out, T.float32(0), [start + index])
        over_threads(share, threads)
    return builder.get()


def _cut_patch(
    spec: Patches,
    lanes: Lanes,
    buffers: tuple[Buffer, Buffer],
    place: tuple[Expr, Expr],
    corner: tuple[Expr, Expr],
) -> None:
    """The row of one patch.

    Args:
        spec: The kernel.
        lanes: The vectors, which are used where they fill the patch's rows.
        buffers: The pixels, and the rows.
        place: The image, and the number of the patch among its rows.
        corner: Its top and left pixel.
    """
    channels, height, width = spec.image
    down, across = spec.patch
    used = channels * down * across
    (images, out), (image, number), (top, left) = buffers, place, corner
    row = row_behind(number, spec.prefix, spec.gaps)
    target = bind((image * spec.tokens + row) * spec.width_out)
    whole = spec.padding == (0, 0) and across % lanes.count == 0
    count = lanes.count if whole else 1
    with T.serial(0, channels) as c, T.serial(0, down) as i, T.serial(0, across // count) as j:
        index, y, x = target + (c * down + i) * across + j * count, top + i, left + j * count
        pixel = images[image, c, y, lanes.at(x) if whole else x]
        if spec.padding != (0, 0):
            inside = T.And(T.And(y >= 0, y < height), T.And(x >= 0, x < width))
            pixel = T.if_then_else(inside, pixel, T.float32(0))
        T.buffer_store(out, pixel, [lanes.at(index) if whole else index])
    if spec.width_out > used:
        with T.serial(0, spec.width_out - used) as rest:
            T.buffer_store(out, T.float32(0), [target + used + rest])
