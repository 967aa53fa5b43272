"""Activation functions as vector arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.tirx.script import builder as T

from .lanes import ROUNDING, Expr, Lanes, bind

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


def _substituted(coefficients: tuple[float, ...], scale: float, factor: float) -> tuple[float, ...]:
    """The coefficients of factor * polynomial(scale * x), from the highest power down."""
    last = len(coefficients) - 1
    return tuple(
        factor * coefficient * scale ** (last - place)
        for place, coefficient in enumerate(coefficients)
    )


# Φ(x) - 1/2 = erf(x / √2) / 2 as x P(x²) / Q(x²), where the highest coefficient of Q is 1.
_CLAMPED = 4 * math.sqrt(2)
_SCALE = 2 ** (len(_ERF_Q) - 1) / _ERF_Q[0]
_PHI_P = _substituted(_ERF_P, 0.5, _SCALE * math.sqrt(1 / 8))
_PHI_Q = _substituted(_ERF_Q, 0.5, _SCALE)[1:]
# 2^f on [-1/2, 1/2]: the Taylor series up to f^7; the next term is below 6e-9.
_EXP2 = tuple(math.log(2) ** n / math.factorial(n) for n in range(7, -1, -1))


def polynomial(
    lanes: Lanes, x: Expr, coefficients: tuple[float, ...], value: Expr | None = None
) -> Expr:
    """Horner's scheme.

    Args:
        lanes: The vectors.
        x: The variable.
        coefficients: From the highest power down.
        value: What the powers above evaluate to; by default there are none.

    Returns:
        value * x^n + coefficients[0] * x^(n-1) + ... + coefficients[n-1].
    """
    rest = coefficients
    if value is None:
        value, rest = lanes.splat(coefficients[0]), coefficients[1:]
    for coefficient in rest:
        value = lanes.fma(value, x, lanes.splat(coefficient))
    return value


def exp2(lanes: Lanes, x: Expr) -> Expr:
    """Compute 2^x for x <= 127; below -126 the result is 2^-126, practically zero."""
    x = bind(T.max(x, lanes.splat(-126.0)))
    # The exponent of 2^n is stored as n + 127.
    bits = bind(lanes.bits(x + lanes.splat(ROUNDING + 127)))
    # Read back from the bits: TVM would cancel the addition and the subtraction.
    whole = lanes.bits_as_float(bits) - lanes.splat(ROUNDING + 127)
    fraction = bind(x - whole)
    power = lanes.bits_as_float(bits << lanes.splat_int(23))
    return polynomial(lanes, fraction, _EXP2) * power


def exp(lanes: Lanes, x: Expr) -> Expr:
    """Compute e^x for x <= 88."""
    return exp2(lanes, x * lanes.splat(math.log2(math.e)))


def gelu(lanes: Lanes, x: Expr) -> Expr:
    """Compute x Φ(x), Φ the normal distribution function."""
    near = bind(_clamped(lanes, x, -_CLAMPED, _CLAMPED))
    square = bind(near * near)
    # The first step of Horner's scheme is an addition.
    below = polynomial(lanes, square, _PHI_Q[1:], square + lanes.splat(_PHI_Q[0]))
    share = near * polynomial(lanes, square, _PHI_P) / below
    return x * (share + lanes.splat(0.5))


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
