"""Image sizes: how they are written, and which ones a stem divides into whole patches."""

from __future__ import annotations

import math
import re
from typing import cast

from ...core.errors import InputError
from .architecture import Architecture, AttentionSpec, StemSpec

Size = tuple[int, int]
LARGEST = 1_000_000
MAX_TOKENS = 65_536
# A relative bias has an index of (tokens, tokens).
MAX_BIASED_TOKENS = 8192


def parse_image_size(image_size: object) -> Size:
    """Return (height, width) of a number, a pair, or text such as "160" or "160x192".

    Raises:
        InputError: `image_size` is none of these, or out of range.
    """
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
            f"image size {image_size!r}: write 160, or 160x192 for height x width, "
            f"in pixels above 0 and up to {LARGEST}"
        )
    return cast("Size", pair)


def format_image_size(size: Size) -> str:
    """Return the size as text, for example "160x192"."""
    return f"{size[0]}x{size[1]}"


def require_whole_patches(architecture: Architecture, size: Size) -> None:
    """Raise InputError if the stem does not divide `size` into whole patches.

    The message names the nearest heights or widths that work.
    """
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
            f"image size {format_image_size(size)}: {name} {side} does not make whole patches, "
            f"which start every {stride} pixels; {nearest}"
        )


def _fits(stem: StemSpec, side: int, trained: int, axis: int) -> bool:
    """Whether no pixel is left over, or as many as at the trained size."""
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
    """Raise InputError if a saved model of this size would have too many tokens to be loaded."""
    tokens = architecture.learned_tokens + math.prod(architecture.stem.sizes(*size)[-1])
    most = max_tokens(architecture)
    if tokens > most:
        raise InputError(
            f"image size {format_image_size(size)}: it makes {tokens} tokens, "
            f"more than the {most} that this version supports; "
            f"{largest_square(architecture, most - architecture.learned_tokens)}"
        )


def max_tokens(architecture: Architecture) -> int:
    """Return the number of tokens above which a model is not loaded."""
    biased = any(
        isinstance(branch.core, AttentionSpec) and branch.core.bias is not None
        for branch in architecture.branches
    )
    return MAX_BIASED_TOKENS if biased else MAX_TOKENS


def largest_square(architecture: Architecture, patches: int) -> str:
    """Return the end of an error message: the largest square image with at most `patches`."""
    stem, trained = architecture.stem, architecture.image[1:]
    strides = _stride(stem, 0), _stride(stem, 1)
    side = math.isqrt(max(0, patches) * strides[0] * strides[1]) + max(strides)
    while side > 0:
        down, across = stem.sizes(side, side)[-1]
        if down * across <= patches and all(
            _fits(stem, side, trained[axis], axis) for axis in (0, 1)
        ):
            return f"{format_image_size((side, side))} is the largest square that works"
        side -= 1
    return "no square of this model is small enough"
