"""Tiny networks with random weights everywhere, so that no norm, bias or scale hides behind its
initial value.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def tiny_vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **overrides: Any) -> nn.Module:
    """A timm model of two blocks, 24 wide, on 16 x 16 images, in eval mode."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    } | overrides
    model: nn.Module = timm.create_model(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest wanted magnitude."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
