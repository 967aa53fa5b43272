"""A small network whose selections choose other patches for each image."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_vit
from torch import Tensor
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.select import SelectMethod, select_tokens


def sharp_selection(method: SelectMethod = "class-attention", **options: Any) -> CompactModel:
    """Three blocks on 16 patches and a class token; attentions and scores differ by image."""
    torch.manual_seed(1)
    dense = tiny_vit(img_size=32, depth=3)
    for name, parameter in dense.named_parameters():
        if name.endswith("qkv.weight"):
            parameter.data *= 8
    model = select_tokens(dense, method, **{"stages": [1], "ratio": 0.6, **options})
    for parameter in model.selects.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def noise_images(count: int, seed: int = 3) -> Tensor:
    """Images of that network: (count, 3, 32, 32)."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
