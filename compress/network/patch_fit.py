"""Which image sizes a stem cuts into patches, and how they are written. Free of torch."""

from __future__ import annotations

import math
import re
from typing import cast

from ...core.errors import InputError
from .architecture import Architecture, AttentionSpec, StemSpec

Size = tuple[int, int]
LARGEST = 1_000_000
MAX_TOKENS = 65_536
# A relative bias has a table entry for every pair of tokens.
MAX_BIASED_TOKENS = 8192


def checked_size(image_size: object) -> Size:
    """(height, width) of a number, a pair, or text such as 160 or 160x192. Errors: InputError."""
    size: object = image_size
    if isinstance(size, str):
        found = re.fullmatch(
            r"(\d{1,9})(?:\s*[x×]\s*(\d{1,9}))?", size.strip(), re.IGNORECASE | re.ASCII
        )
        size = None if found is None else (int(found[1]), int(found[2] or found[1]))
    if isinstance(size, int) and not isinstance(size, bool):
        size = (size, size)
    pair = tuple(size) if isinstance(size, tuple | list) else ()
    if len(pair) != 2 or any(
        isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= LARGEST
        for side in pair
    ):
        raise InputError(
            f"image size {image_size!r}: write 160, or 160x192 for height x width, in pixels above 0 and up to {LARGEST}"
        )
    return cast("Size", pair)


def shown(size: Size) -> str:
    """160x192, as it is written on the command line."""
    return f"{size[0]}x{size[1]}"


def require_whole_patches(architecture: Architecture, size: Size) -> None:
    """Errors: InputError with the nearest heights or widths that the stem cuts into patches."""
    stem, trained = architecture.stem, architecture.image[1:]
    for axis, (name, side) in enumerate(zip(("height", "width"), size, strict=True)):
        if _fits(stem, side, trained[axis], axis):
            continue
        stride = _stride(stem, axis)
        above = next(
            other
            for other in range(side + 1, side + trained[axis] + stride + 1)
            if _fits(stem, other, trained[axis], axis)
        )
        below = next(
            (
                other
                for other in range(side - 1, max(0, side - stride - 1), -1)
                if _fits(stem, other, trained[axis], axis)
            ),
            None,
        )
        nearest = (
            f"{below} and {above} are the nearest that work"
            if below
            else f"{above} is the smallest that works"
        )
        raise InputError(
            f"image size {shown(size)}: {name} {side} does not make whole patches, which start every {stride} pixels; {nearest}"
        )


def _fits(stem: StemSpec, side: int, trained: int, axis: int) -> bool:
    """Whether no pixel is left over, or the stem at least meets the far edge as it does at the
    trained size.
    """
    if stem.sizes(side, side)[-1][axis] < 1:
        return False
    if side % _stride(stem, axis) == trained % _stride(stem, axis):
        return True
    inner = side
    for conv, after in zip(_geometry(stem), stem.sizes(side, side), strict=True):
        kernel, stride, padding = (pair[axis] for pair in conv)
        if (inner + 2 * padding - kernel) % stride:
            return False
        inner = after[axis]
    return True


def _geometry(stem: StemSpec) -> list[tuple[Size, Size, Size]]:
    """Kernel, stride and padding of each convolution."""
    return [(conv.kernel, conv.stride, conv.padding) for conv in stem.before] + [
        (stem.patch, stem.stride or stem.patch, stem.padding)
    ]


def _stride(stem: StemSpec, axis: int) -> int:
    return math.prod(stride[axis] for _, stride, _ in _geometry(stem))


def require_few_tokens(architecture: Architecture, size: Size) -> None:
    """Errors: InputError where a saved model of this size would not be read."""
    grid = architecture.stem.sizes(*size)[-1]
    most = (
        MAX_BIASED_TOKENS
        if any(
            isinstance(branch.core, AttentionSpec) and branch.core.bias
            for branch in architecture.branches
        )
        else MAX_TOKENS
    )
    if architecture.prefix + math.prod(grid) > most:
        made = f"it makes {architecture.prefix + math.prod(grid)} tokens, more than the {most} that this version takes"
        raise InputError(
            f"image size {shown(size)}: {made}; {largest_square(architecture, most - architecture.prefix)}"
        )


def largest_square(architecture: Architecture, patches: int) -> str:
    """The end of a refusal: the largest square image of so many patches."""
    stem, trained = architecture.stem, architecture.image[1:]
    strides = _stride(stem, 0), _stride(stem, 1)
    side = math.isqrt(max(0, patches) * strides[0] * strides[1]) + max(strides)
    while side > 0:
        down, across = stem.sizes(side, side)[-1]
        if down * across <= patches and all(
            _fits(stem, side, trained[axis], axis) for axis in (0, 1)
        ):
            return f"{shown((side, side))} is the largest square that works"
        side -= 1
    return "no square of this model is small enough"
