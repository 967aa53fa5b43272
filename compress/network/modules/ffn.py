"""The feed-forward sub-layer, plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import FfnSpec
from .norm import Norm

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


class Ffn(nn.Module):
    """act(x W1 + b1) W2 + b2, or act(x Wg + bg) * (x W1 + b1) when gated: (batch, tokens, width_in)
    -> (batch, tokens, width_out).
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
