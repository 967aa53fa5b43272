"""Convolutions that come before the patch projection."""

from __future__ import annotations

from torch import Tensor, nn

from ..architecture import ConvSpec
from .ffn import ACTIVATIONS


class ConvAct(nn.Module):
    """A convolution and its activation: (batch, channels, height, width) -> (batch, spec.channels,
    height', width').
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
