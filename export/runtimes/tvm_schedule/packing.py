"""Weights in the order in which the kernels read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .tiles import Run, pieces

Array = NDArray[np.float32]


def panels(weight: Array, runs: tuple[Run, ...], lanes: int) -> Array:
    """(K, N) -> the panels one behind the other, each (K, its vectors * lanes), flat; columns that fill the last vector are zero."""
    depth, width = weight.shape
    wide = np.zeros((depth, sum(run.length for run in runs) * lanes), np.float32)
    wide[:, :width] = weight
    parts = [wide[:, start * lanes : (start + size) * lanes].ravel() for start, size in pieces(runs)]
    return np.concatenate(parts)


def padded(vector: Array, width: int) -> Array:
    """A vector with zeros behind it."""
    return np.pad(vector, (0, width - len(vector))).astype(np.float32)


def padded_heads(matrix: Array, heads: int, width: int) -> Array:
    """(rows, heads * w) -> (rows, heads * width): zero columns behind each head's own."""
    rows = matrix.shape[0]
    own = matrix.reshape(rows, heads, -1)
    return np.pad(own, ((0, 0), (0, 0), (0, width - own.shape[2]))).reshape(rows, heads * width)
