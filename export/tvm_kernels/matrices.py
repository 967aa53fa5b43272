"""Weights as numpy matrices, and the values between kernels, while a program is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .lanes import RowLayout
from .packing import Array, padded_heads
from .program import Value
from .quantization import Quantizer, Range

State = dict[str, Array]
# (weight, bias) of a norm.
Affine = tuple[Array | None, Array | None]


@dataclass(frozen=True)
class Matrix:
    """A linear layer x W + b.

    Attributes:
        weight: Shape (K, N).
        bias: Shape (N,), or None.
    """

    weight: Array
    bias: Array | None

    def scaled(self, factor: Array | np.float32) -> Matrix:
        """The layer with its outputs times a number, or times one number a column."""
        return Matrix(self.weight * factor, None if self.bias is None else self.bias * factor)

    def with_padded_heads(self, heads: int, width: int) -> Matrix:
        """The layer with zero columns after those of each head, up to `width` a head."""
        bias = None if self.bias is None else padded_heads(self.bias[None], heads, width)[0]
        return Matrix(padded_heads(self.weight, heads, width), bias)

    def select_heads(self, heads: tuple[int, ...], width: int) -> Matrix:
        """The columns of the heads with these indices, each of `width` columns."""
        columns = np.concatenate([np.arange(head * width, (head + 1) * width) for head in heads])
        bias = None if self.bias is None else self.bias[columns]
        return Matrix(self.weight[:, columns], bias)

    def scatter_columns(self, columns: tuple[int, ...], width: int) -> Matrix:
        """The layer with its outputs at these columns of `width`, and zeros elsewhere."""
        bias = None if self.bias is None else scatter_columns(self.bias[None], columns, width)[0]
        return Matrix(scatter_columns(self.weight, columns, width), bias)


@dataclass(frozen=True)
class Positions:
    """Which tokens of the stem the rows of each image are.

    Attributes:
        value: int32 (images, rows), flat.
        rows: Rows of each image.
    """

    value: Value
    rows: int


@dataclass(frozen=True)
class Stream:
    """A value with rows of each image.

    Attributes:
        value: The value in the program.
        rows: Rows of each image, the first ones of those in memory.
        width: Elements of a row.
        used: Columns of a row that have a meaning, the first ones.
        quantizer: How the rows are quantized; None: fp32.
        range: The range of all rows, if it is static.
        stored_rows: Rows of each image in memory; None: as many as `rows`.
        positions: Of a residual stream which tokens of the stem its rows, or more, are; None: the
            first ones.
    """

    value: Value
    rows: int
    width: int
    used: int
    quantizer: Quantizer | None = None
    range: Range | None = None
    stored_rows: int | None = None
    positions: Positions | None = None

    @property
    def layout(self) -> RowLayout:
        """Where its rows are."""
        return RowLayout(self.stored_rows or self.rows, self.width)

    def first_rows(self, rows: int) -> Stream:
        """The first rows of each image: the same value, so that nothing is copied."""
        if rows == self.rows:
            return self
        return replace(self, rows=rows, stored_rows=self.layout.per_image)


@dataclass(frozen=True)
class InputTransform:
    """A linear map between a stream and a product, which the product's weights absorb.

    Attributes:
        weight: The weight of a norm.
        bias: The bias of a norm.
        selection: A matrix of zeros and ones that chooses columns.
    """

    weight: Array | None = None
    bias: Array | None = None
    selection: Array | None = None

    @staticmethod
    def select(columns: tuple[int, ...], width: int) -> InputTransform:
        """The choice of columns of a stream with `width` columns."""
        selection = np.zeros((width, len(columns)), np.float32)
        selection[list(columns), range(len(columns))] = 1
        return InputTransform(selection=selection)

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return self.weight is None and self.bias is None and self.selection is None

    def fold_into(self, matrix: Matrix) -> Matrix:
        """The product that includes the transform.

        (x * weight + bias) W + b = x (weight W) + (bias W + b); with a selection S, x S W.
        """
        weight, bias = matrix.weight, matrix.bias
        if self.bias is not None:
            shift = (self.bias.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
            bias = shift if bias is None else bias + shift
        if self.weight is not None:
            weight = weight * self.weight[:, None]
        if self.selection is not None:
            weight = self.selection @ weight
        return Matrix(weight, bias)


@dataclass(frozen=True)
class ProductInput:
    """A stream, the linear map that the products reading it absorb, and which tokens it has."""

    stream: Stream
    transform: InputTransform = InputTransform()
    positions: Positions | None = None


@dataclass(frozen=True)
class SublayerOutput:
    """How a sub-layer ends.

    Attributes:
        matrix: The last linear layer.
        rows: Rows of each image that are computed, the first ones.
        residual: The stream that the result is added to, or None.
    """

    matrix: Matrix
    rows: int
    residual: Stream | None


def sub_state(state: State, prefix: str) -> State:
    """The entries of `state` below `prefix`."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
    }


def linear(state: State, name: str) -> Matrix:
    """The linear layer of a name; torch stores its weight as (N, K)."""
    return Matrix(state[f"{name}.weight"].T, state.get(f"{name}.bias"))


def affine(state: State, name: str) -> Affine:
    """(weight, bias) of the norm of a name."""
    return state.get(f"{name}.weight"), state.get(f"{name}.bias")


def concatenate(matrices: list[Matrix]) -> Matrix:
    """One product instead of several with the same input."""
    weight = np.concatenate([matrix.weight for matrix in matrices], axis=1)
    if all(matrix.bias is None for matrix in matrices):
        return Matrix(weight, None)
    biases = [
        np.zeros(matrix.weight.shape[1], np.float32) if matrix.bias is None else matrix.bias
        for matrix in matrices
    ]
    return Matrix(weight, np.concatenate(biases))


def scatter_columns(matrix: Array, columns: tuple[int, ...], width: int) -> Array:
    """A matrix's columns at these columns of `width`, and zeros elsewhere."""
    wide = np.zeros((matrix.shape[0], width), np.float32)
    wide[:, list(columns)] = matrix
    return wide
