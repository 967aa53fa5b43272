"""The layers before the patch projection: convolutions, and soft splits with their attention."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import SoftSplitSpec, StemSpec
from .layers import ConvAct, Ffn, Norm


class SoftSplit(nn.Module):
    """Overlapping windows as tokens, attention and a feed-forward layer.

    (batch, channels, height, width) -> (batch, spec.channels, height', width').

    The random features of a linear attention are fixed: a buffer (features, spec.channels).

    References:
        Yuan et al. 2021, "Tokens-to-Token ViT", section 3.1.
        Choromanski et al. 2021, "Rethinking Attention with Performers", lemma 1.
    """

    features: Tensor | None

    def __init__(self, spec: SoftSplitSpec) -> None:
        super().__init__()
        self.spec = spec
        window, width = spec.norm.width, spec.channels
        self.norm = Norm(spec.norm)
        # One product for all three: nothing inside of the stem is pruned.
        self.qkv = nn.Linear(window, 3 * width, bias=spec.qkv_bias)
        features = torch.zeros(spec.features, width) if spec.features else None
        self.register_buffer("features", features)
        self.out = nn.Linear(width, width, bias=spec.out_bias)
        self.ffn_norm = Norm(spec.ffn_norm)
        self.ffn = Ffn(spec.ffn, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, spec.channels, height', width')."""
        spec = self.spec
        down, across = spec.output_size((x.shape[-2], x.shape[-1]))
        windows = F.unfold(x, spec.kernel, padding=spec.padding, stride=spec.stride)
        q, k, v = self.qkv(self.norm(windows.transpose(1, 2))).chunk(3, dim=-1)
        y = v + self.out(self.attend(q, k, v))
        y = y + self.ffn(self.ffn_norm(y))
        return torch.unflatten(y.transpose(1, 2), 2, (down, across))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one head: three (batch, tokens, width) -> (batch, tokens, width)."""
        if self.features is None:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            return F.scaled_dot_product_attention(q, k, v, scale=self.spec.scale).squeeze(1)
        # The features span many orders of magnitude, which half precision does not hold.
        kind = torch.promote_types(v.dtype, torch.float32)
        device = v.device.type
        mixed = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            y = self._linear_attention(q.to(kind), k.to(kind), v.to(kind), self.features.to(kind))
        return y.to(v.dtype)

    def _linear_attention(self, q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> Tensor:
        q, k = random_features(q, directions), random_features(k, directions)
        eps = self.spec.features_eps
        # Scaled so that 1 is added to the divisor: torch's ONNX exporter drops sums with 1e-8.
        k = k / eps if eps else k
        divisor = q @ k.sum(dim=1).unsqueeze(-1) + (1.0 if eps else 0.0)
        found: Tensor = q @ (k.transpose(1, 2) @ v) / divisor
        return found


def random_features(x: Tensor, directions: Tensor) -> Tensor:
    """exp(w x - |x|² / 2) / sqrt(m) for m rows w: (batch, tokens, width) -> (batch, tokens, m).

    The product of such features of q and k estimates exp(q k) without bias.
    """
    exponents = F.linear(x, directions) - x.square().sum(dim=-1, keepdim=True) / 2
    found: Tensor = exponents.exp() * len(directions) ** -0.5
    return found


def stem_layers(stem: StemSpec, channels: int) -> nn.Sequential | None:
    """The layers before the patch projection, for images of `channels`; None if there are none."""
    layers = [
        SoftSplit(layer) if isinstance(layer, SoftSplitSpec) else ConvAct(layer, inputs)
        for layer, inputs in zip(stem.before, stem.inputs(channels), strict=False)
    ]
    return nn.Sequential(*layers) if layers else None
