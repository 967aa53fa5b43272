"""The layers that the blocks and the stem consist of: norm, feed-forward layer, convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import ConvSpec, FfnSpec, NormSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension: (..., width) -> (..., width).

    With `heads` > 0 each head has its own weight, and inputs are (..., heads, tokens, width).
    """

    def __init__(self, spec: NormSpec, heads: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.heads = heads
        shape = (heads, spec.width) if heads else (spec.width,)
        self.weight = nn.Parameter(torch.ones(shape)) if spec.weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        width = (self.spec.width,)
        if self.heads:
            return affine(normalize(x, self.spec), self.weight, self.bias, per_head=True)
        if self.spec.kind == "rms":
            return affine(F.rms_norm(x, width, self.weight, self.spec.eps), None, self.bias)
        if self.weight is None and self.bias is not None and x.dtype != self.bias.dtype:
            # torch's backward pass wants a bias of the inputs' type where there is no weight:
            # F.layer_norm(torch.ones(2, 4).bfloat16().requires_grad_(), (4,), None, torch.ones(4))
            return normalize(x, self.spec) + self.bias
        return F.layer_norm(x, width, self.weight, self.bias, self.spec.eps)


def normalize(x: Tensor, spec: NormSpec) -> Tensor:
    """Unit scale, and for LayerNorm zero mean, over the last dimension."""
    width = (spec.width,)
    if spec.kind == "rms":
        return F.rms_norm(x, width, None, spec.eps)
    return F.layer_norm(x, width, None, None, spec.eps)


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, per_head: bool = False
) -> Tensor:
    """Return x * weight + bias.

    Args:
        x: (..., width), or (..., heads, tokens, width) with `per_head`.
        weight: (width,), or (heads, width) with `per_head`. None: 1.
        bias: The same shape as `weight`. None: 0.
        per_head: Whether each head has its own weight and bias.

    Returns:
        The same shape as `x`.
    """
    if weight is not None:
        x = x * (weight.unsqueeze(-2) if per_head else weight)
    if bias is not None:
        x = x + (bias.unsqueeze(-2) if per_head else bias)
    return x


class Ffn(nn.Module):
    """Feed-forward layer: (batch, tokens, width_in) -> (batch, tokens, width_out).

    act(x W1 + b1) W2 + b2, or (act(x Wg + bg) * (x W1 + b1)) W2 + b2 when gated.
    """

    def __init__(self, spec: FfnSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(width_in, spec.hidden, bias=spec.gate_bias) if spec.gated else None
        self.fc1 = nn.Linear(width_in, spec.hidden, bias=spec.in_bias)
        self.norm = Norm(spec.norm) if spec.norm else None
        self.fc2 = nn.Linear(spec.hidden, width_out, bias=spec.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width_in) -> (batch, tokens, width_out)."""
        act = ACTIVATIONS[self.spec.act]
        hidden = act(self.fc1(x)) if self.gate is None else act(self.gate(x)) * self.fc1(x)
        if self.norm is not None:
            hidden = self.norm(hidden)
        out: Tensor = self.fc2(hidden)
        return out


class ConvAct(nn.Module):
    """A convolution and its activation.

    (batch, channels, height, width) -> (batch, spec.channels, height', width').
    """

    def __init__(self, spec: ConvSpec, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.conv = nn.Conv2d(
            channels,
            spec.channels,
            spec.kernel,
            stride=spec.stride,
            padding=spec.padding,
            bias=spec.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, spec.channels, height', width')."""
        return ACTIVATIONS[self.spec.act](self.conv(x))


def spread(x: Tensor, places: Tensor | None, width: int) -> Tensor:
    """Place channels among others, which are zero: (..., channels) -> (..., width).

    `places`: the position of each channel; None returns `x`.
    """
    if places is None:
        return x
    return x.new_zeros(*x.shape[:-1], width).index_copy(-1, places, x)
