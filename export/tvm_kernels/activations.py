"""Activation functions as vector arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.tirx.script import builder as T

from .lanes import Expr, Lanes, bind

# erf(x) = x P(x²) / Q(x²) on [-4, 4], error below 1e-6: the coefficients of Eigen's
# generic_fast_erf_float.
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
# 2^f on [-1/2, 1/2]: the Taylor series up to f^7; the next term is below 6e-9.
_EXP2 = tuple(math.log(2) ** n / math.factorial(n) for n in range(7, -1, -1))


def polynomial(lanes: Lanes, x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Horner's scheme; coefficients from the highest power down."""
    value = lanes.splat(coefficients[0])
    for coefficient in coefficients[1:]:
        value = lanes.fma(value, x, lanes.splat(coefficient))
    return value


def exp2(lanes: Lanes, x: Expr) -> Expr:
    """Compute 2^x for x <= 127; below -126 the result is 2^-126, practically zero."""
    x = bind(T.max(x, lanes.splat(-126.0)))
    whole = bind(lanes.round(x))
    fraction = bind(x - whole)
    power = lanes.bits_as_float((lanes.to_int(whole) + lanes.splat_int(127)) << lanes.splat_int(23))
    return polynomial(lanes, fraction, _EXP2) * power


def exp(lanes: Lanes, x: Expr) -> Expr:
    """Compute e^x for x <= 88."""
    return exp2(lanes, x * lanes.splat(math.log2(math.e)))


def erf(lanes: Lanes, x: Expr) -> Expr:
    """Compute the error function, with an error below 1e-6."""
    x = bind(T.max(T.min(x, lanes.splat(4.0)), lanes.splat(-4.0)))
    square = bind(x * x)
    return x * polynomial(lanes, square, _ERF_P) / polynomial(lanes, square, _ERF_Q)


def gelu(lanes: Lanes, x: Expr) -> Expr:
    """Compute x Φ(x), Φ the normal distribution function."""
    half = bind(x * lanes.splat(0.5))
    return lanes.fma(half, erf(lanes, x * lanes.splat(math.sqrt(0.5))), half)


def sigmoid(lanes: Lanes, x: Expr) -> Expr:
    """Compute 1 / (1 + e^-x)."""
    one = lanes.splat(1.0)
    # Clamped where the result is 0 or 1 in fp32, so that e^-x stays finite.
    return one / (one + exp(lanes, _clamped(lanes, lanes.splat(0.0) - x, -80.0, 80.0)))


def tanh(lanes: Lanes, x: Expr) -> Expr:
    """Compute 2 sigmoid(2x) - 1."""
    return lanes.splat(2.0) * sigmoid(lanes, x * lanes.splat(2.0)) - lanes.splat(1.0)


def gelu_tanh(lanes: Lanes, x: Expr) -> Expr:
    """Compute x sigmoid(2 √(2/π) (x + 0.044715 x³)), which equals GELU's tanh form."""
    factor = 2 * math.sqrt(2 / math.pi)
    inner = x * polynomial(lanes, bind(x * x), (factor * 0.044715, factor))
    return x * sigmoid(lanes, inner)


def _clamped(lanes: Lanes, x: Expr, low: float, high: float) -> Expr:
    return T.max(T.min(x, lanes.splat(high)), lanes.splat(low))


ACTIVATIONS: dict[str, Callable[[Lanes, Expr], Expr]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda lanes, x: x * sigmoid(lanes, x * lanes.splat(1.702)),
    "silu": lambda lanes, x: x * sigmoid(lanes, x),
    "relu": lambda lanes, x: T.max(x, lanes.splat(0.0)),
    "relu6": lambda lanes, x: _clamped(lanes, x, 0.0, 6.0),
    "hardswish": lambda lanes, x: (
        x * _clamped(lanes, x + lanes.splat(3.0), 0.0, 6.0) * lanes.splat(1 / 6)
    ),
    "tanh": tanh,
    "sigmoid": sigmoid,
    "identity": lambda lanes, x: x,
}
