"""A full-size network that computes with masks or gates: masked norms, masked parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..network.modules.layers import Norm
from ..network.modules.model import CompactModel
from .groups import ScaleRule
from .masked_parameters import Values, masked_features, masked_tensors


class MaskedNorm(nn.Module):
    """A norm whose statistics run over the kept channels only, and whose other outputs are zero: y
    = mask * (x̂ γ + β) * gain.

    Shapes: x (..., width); `mask` and `gain` broadcast against x.
    """

    mask: Tensor
    gain: Tensor

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.spec, self.heads = norm.spec, norm.heads
        self.weight, self.bias = norm.weight, norm.bias
        reference = next(iter(norm.parameters()), torch.empty(0))
        self.register_buffer(
            "mask", torch.ones(norm.spec.width, device=reference.device), persistent=False
        )
        self.register_buffer("gain", torch.ones(1, device=reference.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        mask = self.mask
        # Where nothing is kept nothing is divided, and the output is zero.
        count = mask.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        x = x * mask
        if self.spec.kind == "layer":
            # The kept channels' mean, taken off the kept channels alone.
            x = (x - x.sum(dim=-1, keepdim=True) / count) * mask
        variance = x.square().sum(dim=-1, keepdim=True) / count
        weight, bias = mask * self.gain, None
        if self.weight is not None:
            weight = weight * (self.weight.unsqueeze(-2) if self.heads else self.weight)
        if self.bias is not None:
            bias = mask * self.gain * (self.bias.unsqueeze(-2) if self.heads else self.bias)
        x = x * torch.rsqrt(variance + self.spec.eps)
        return x * weight if bias is None else torch.addcmul(bias, x, weight)


class MaskedNetwork(nn.Module):
    """A lifted network whose norms can be masked; `forward(images, values)` computes with the mask
    that `values` gives.
    """

    def __init__(self, model: CompactModel) -> None:
        super().__init__()
        self.architecture = model.architecture
        self.network = model
        for path, module in list(model.named_modules()):
            if isinstance(module, Norm):
                owner, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(owner), leaf, MaskedNorm(module))

    def forward(self, images: Tensor, values: Values, scale: ScaleRule = "kept") -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        parameters = dict(self.network.named_parameters())
        changed = masked_tensors(self.architecture, parameters, values, scale)
        logits: Tensor = functional_call(self.network, changed, (images,))
        features = masked_features(self.architecture, values)
        return logits if features is None else logits * features
