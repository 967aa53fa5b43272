"""Matrices as numbers while a program is written, and values that rows flow through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .codes import Coding, Range
from .packing import Array
from .place import Rows
from .program import Value

State = dict[str, Array]


@dataclass(frozen=True)
class Matrix:
    """x W + b as numbers: weight (K, N), bias (N,) or None."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True)
class Stream:
    """A value of `rows` rows for each image, `width` elements in a row, of which the first `used`
    mean something.

    coding: they are codes. range: what the codes of all rows mean, where they were known
    beforehand.
    """

    value: Value
    rows: int
    width: int
    used: int
    coding: Coding | None = None
    range: Range | None = None

    @property
    def place(self) -> Rows:
        """Where its rows lie."""
        return Rows(self.rows, self.width)


@dataclass(frozen=True)
class Entering:
    """What lies between a stream and a product and is linear: a norm's weights, or the choice of
    columns. It goes into the product's own weights.
    """

    weight: Array | None
    bias: Array | None
    selection: Array | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.weight is None and self.bias is None and self.selection is None

    def into(self, matrix: Matrix) -> Matrix:
        """(x * weight + bias) W + b = x (weight W) + (bias W + b); with a selection S, x S W."""
        weight, bias = matrix.weight, matrix.bias
        if self.bias is not None:
            shift = (self.bias.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
            bias = shift if bias is None else bias + shift
        if self.weight is not None:
            weight = weight * self.weight[:, None]
        if self.selection is not None:
            weight = self.selection @ weight
        return Matrix(weight, bias)


def under(state: State, prefix: str) -> State:
    """The entries of `state` below `prefix`."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
    }


def from_torch(weight: Array, bias: Array | None) -> Matrix:
    """A linear layer's parameters, whose weight torch keeps as (N, K)."""
    return Matrix(weight.T, bias)


def beside(matrices: list[Matrix]) -> Matrix:
    """One product instead of several of the same rows."""
    weight = np.concatenate([matrix.weight for matrix in matrices], axis=1)
    if all(matrix.bias is None for matrix in matrices):
        return Matrix(weight, None)
    biases = [
        np.zeros(matrix.weight.shape[1], np.float32) if matrix.bias is None else matrix.bias
        for matrix in matrices
    ]
    return Matrix(weight, np.concatenate(biases))


def heads_chosen(matrix: Matrix, chosen: tuple[int, ...], width: int) -> Matrix:
    """The columns of the heads named, each of `width`."""
    columns = np.concatenate([np.arange(head * width, (head + 1) * width) for head in chosen])
    return Matrix(matrix.weight[:, columns], None if matrix.bias is None else matrix.bias[columns])


def widen(matrix: Array, writes: tuple[int, ...], embed: int) -> Array:
    """The columns where they are written, zeros elsewhere."""
    wide = np.zeros((matrix.shape[0], embed), np.float32)
    wide[:, list(writes)] = matrix
    return wide
