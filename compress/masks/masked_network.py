"""A full-size network that computes with masks or gates, by masked norms and parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..network.modules.layers import Norm
from ..network.modules.model import CompactModel
from ..network.modules.select import Choices
from .groups import ScaleRule
from .masked_parameters import Values, masked_features, masked_tensors


class MaskedNorm(nn.Module):
    """A norm with statistics over the kept channels only: y = mask * (x̂ γ + β) * gain.

    Outputs of other channels are zero. Shapes: x (..., width); `mask` and `gain` broadcast to x.

    References:
        L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (LayerNorm).
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
        # Clamped, so that a norm of which nothing is kept returns zeros.
        count = mask.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        x = x * mask
        if self.spec.kind == "layer":
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
    """A lifted network that computes with the mask given to each forward pass.

    The norms of `model` are replaced in place by `MaskedNorm`.
    """

    def __init__(self, model: CompactModel) -> None:
        super().__init__()
        self.architecture = model.architecture
        self.network = model
        for path, module in list(model.named_modules()):
            if isinstance(module, Norm):
                owner, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(owner), leaf, MaskedNorm(module))

    def forward(
        self,
        images: Tensor,
        values: Values,
        scale: ScaleRule = "kept",
        choices: Choices | None = None,
    ) -> Tensor:
        """Classify images with a mask.

        Args:
            images: (batch, channels, height, width).
            values: The factors of units, as for `masked_tensors`.
            scale: The softmax scale: "kept" or "original".
            choices: Records which patches the selections choose, or prescribes them.

        Returns:
            (batch, classes).
        """
        parameters = dict(self.network.named_parameters())
        changed = masked_tensors(self.architecture, parameters, values, scale)
        logits: Tensor = functional_call(self.network, changed, (images, choices))
        features = masked_features(self.architecture, values)
        return logits if features is None else logits * features
