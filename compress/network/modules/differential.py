"""The λ of differential attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture import DifferentialSpec


class Differential(nn.Module):
    """Weight of the second attention map: () -> scalar. Ye et al. 2024 (Differential Transformer),
    eq. 2.

    `vectors`: (4, width), the rows q1, k1, q2, k2; or (2,) exponents when `dual`.
    """

    def __init__(self, spec: DifferentialSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vectors = nn.Parameter(torch.zeros(2) if spec.dual else torch.zeros(4, spec.width))

    def forward(self) -> Tensor:
        """() -> scalar."""
        vectors = self.vectors
        exponents = vectors if self.spec.dual else (vectors[0::2] * vectors[1::2]).sum(dim=-1)
        first, second = exponents.exp().unbind()
        return first - second + self.spec.start

    @property
    def gain(self) -> float:
        """What the heads' values are multiplied with after their norm."""
        return 1.0 - self.spec.start

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        """q and k (batch, heads * 2, tokens, qk), v (batch, heads, tokens, v) -> (batch, heads,
        queries, v).
        """
        scores = q @ k.transpose(-2, -1) * scale
        if bias is not None:
            scores = scores + bias.repeat_interleave(2, dim=0)
        maps = torch.unflatten(scores.softmax(dim=-1), 1, (-1, 2))
        out: Tensor = (maps[:, :, 0] - self() * maps[:, :, 1]) @ v
        return out
