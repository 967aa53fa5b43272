"""Weights, in numpy, in the order in which the kernels read them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .loops import Run, pieces

Array = NDArray[np.float32]
Number = TypeVar("Number", np.float32, np.int8)


def panels(
    weight: NDArray[Number], runs: tuple[Run, ...], lanes: int, group: int = 1
) -> NDArray[Number]:
    """Pack a matrix into panels, one after the other, flat.

    Args:
        weight: Shape (K, N).
        runs: How the columns are split, in vectors.
        lanes: Columns in a vector.
        group: Rows that one instruction multiplies at once; they are stored side by side.

    Returns:
        Each panel has the shape (K / group, its vectors * lanes, group); rows and columns that fill
        the last one are zero.
    """
    depth, width = weight.shape
    groups = -(-depth // group)
    wide = np.zeros((groups * group, sum(run.length for run in runs) * lanes), weight.dtype)
    wide[:depth, :width] = weight
    grouped = wide.reshape(groups, group, -1).transpose(0, 2, 1)
    parts = [
        grouped[:, start * lanes : (start + size) * lanes].ravel() for start, size in pieces(runs)
    ]
    return np.concatenate(parts)


def quantize_weights(weight: Array, *, limit_pairs: bool = False) -> tuple[NDArray[np.int8], Array]:
    """Quantize a matrix symmetrically: codes from -127 to 127, and a scale a column.

    Args:
        weight: Shape (K, N).
        limit_pairs: Make the scales large enough that the codes of rows 2k and 2k + 1 add up to at
            most 128 in size: 255 times each, added, then fit 16 bits.

    Returns:
        The codes (K, N) and the scales (N).
    """
    largest = np.abs(weight).max(axis=0)
    if limit_pairs:
        even, odd = weight[: len(weight) // 2 * 2 : 2], weight[1::2]
        largest = np.abs(even + odd).max(axis=0, initial=0).clip(min=largest)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def padded(vector: Array, width: int) -> Array:
    """A vector padded with zeros to `width` numbers."""
    return np.pad(vector, (0, width - len(vector))).astype(np.float32)


def padded_heads(matrix: Array, heads: int, width: int) -> Array:
    """(rows, heads * w) -> (rows, heads * width), with zero columns after those of each head."""
    rows = matrix.shape[0]
    own = matrix.reshape(rows, heads, -1)
    return np.pad(own, ((0, 0), (0, 0), (0, width - own.shape[2]))).reshape(rows, heads * width)
