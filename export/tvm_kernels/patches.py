"""Patches as rows: each prefix token a row of zeros, then each patch's numbers in the order of the
convolution's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .threads import over_threads
from .tiles import bounds


@dataclass(frozen=True)
class Patches:
    """Images (images, channels, height, width) cut into a grid. width_out: columns of a row, at
    least channels * patch area; the rest is zero.
    """

    images: int
    image: tuple[int, int, int]
    grid: tuple[int, int]
    patch: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    prefix: int
    width_out: int


def cut_patches(spec: Patches, threads: int) -> Any:
    """The kernel: images -> rows (images * (prefix + patches), width_out), flat."""
    channels, height, width = spec.image
    down, across = spec.patch
    tokens = spec.prefix + spec.grid[0] * spec.grid[1]
    used = channels * down * across
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        images = T.arg("images", T.buffer((spec.images, channels, height, width), "float32"))
        out = T.arg("out", T.buffer((spec.images * tokens * spec.width_out,), "float32"))

        def share(part: Any, parts: int) -> None:
            with (
                T.serial(*bounds(spec.images * spec.grid[0], part, parts)) as band,
                T.serial(0, spec.grid[1]) as column,
            ):
                image, row = band // spec.grid[0], band % spec.grid[0]
                target = (
                    image * tokens + spec.prefix + row * spec.grid[1] + column
                ) * spec.width_out
                top, left = (
                    row * spec.stride[0] - spec.padding[0],
                    column * spec.stride[1] - spec.padding[1],
                )
                with T.serial(0, channels) as c, T.serial(0, down) as i, T.serial(0, across) as j:
                    place = target + (c * down + i) * across + j
                    if spec.padding == (0, 0):
                        T.buffer_store(out, images[image, c, top + i, left + j], [place])
                    else:
                        inside = T.And(
                            T.And(top + i >= 0, top + i < height),
                            T.And(left + j >= 0, left + j < width),
                        )
                        T.buffer_store(
                            out,
                            T.if_then_else(
                                inside, images[image, c, top + i, left + j], T.float32(0)
                            ),
                            [place],
                        )
                if spec.width_out > used:
                    with T.serial(0, spec.width_out - used) as rest:
                        T.buffer_store(out, T.float32(0), [target + used + rest])

        with T.serial(0, spec.images) as image, T.serial(0, spec.prefix * spec.width_out) as place:
            T.buffer_store(out, T.float32(0), [image * tokens * spec.width_out + place])
        over_threads(share, threads)
    return builder.get()
