"""Patches as rows: a row of zeros for each prefix token, then the pixels of each patch.

Pixels are in the order of the convolution's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr
from .loops import over_threads, share_bounds


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
    """

    images: int
    image: tuple[int, int, int]
    grid: tuple[int, int]
    patch: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    prefix: int
    width_out: int

    @property
    def tokens(self) -> int:
        """Rows of each image."""
        return self.prefix + self.grid[0] * self.grid[1]


def cut_patches(spec: Patches, threads: int) -> Any:
    """The kernel: images -> rows (images * tokens, width_out), flat."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        images = T.arg("images", T.buffer((spec.images, *spec.image), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.tokens * spec.width_out,), "float32"))

        def share(part: Expr, parts: int) -> None:
            with (
                T.serial(*share_bounds(spec.images * spec.grid[0], part, parts)) as band,
                T.serial(0, spec.grid[1]) as column,
            ):
                _cut_patch(spec, images, out, band // spec.grid[0], band % spec.grid[0], column)

        prefix_size = spec.prefix * spec.width_out
        with T.serial(0, spec.images) as image, T.serial(0, prefix_size) as index:
            T.buffer_store(out, T.float32(0), [image * spec.tokens * spec.width_out + index])
        over_threads(share, threads)
    return builder.get()


def _cut_patch(
    spec: Patches, images: Buffer, out: Buffer, image: Expr, row: Expr, column: Expr
) -> None:
    """The row of the patch at (row, column) of an image's grid."""
    channels, height, width = spec.image
    down, across = spec.patch
    used = channels * down * across
    token = image * spec.tokens + spec.prefix + row * spec.grid[1] + column
    target = token * spec.width_out
    top = row * spec.stride[0] - spec.padding[0]
    left = column * spec.stride[1] - spec.padding[1]
    with T.serial(0, channels) as c, T.serial(0, down) as i, T.serial(0, across) as j:
        index, y, x = target + (c * down + i) * across + j, top + i, left + j
        pixel = images[image, c, y, x]
        if spec.padding != (0, 0):
            inside = T.And(T.And(y >= 0, y < height), T.And(x >= 0, x < width))
            pixel = T.if_then_else(inside, pixel, T.float32(0))
        T.buffer_store(out, pixel, [index])
    if spec.width_out > used:
        with T.serial(0, spec.width_out - used) as rest:
            T.buffer_store(out, T.float32(0), [target + used + rest])
