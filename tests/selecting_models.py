"""Small networks whose selections choose other patches for each image."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_vit
from torch import Tensor
from vitrim import lift
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


# Timm's models whose scores depend on the places of patches, and what is particular to each.
POSITIONED: dict[str, tuple[str, dict[str, Any]]] = {
    "rope": ("eva02_tiny_patch14_224", {"global_pool": "token"}),
    "rope behind registers": ("vit_small_patch16_dinov3", {}),
    "rope of each head": ("vit_small_patch16_rope_mixed_224", {"global_pool": "token"}),
    "relative bias": ("beit_base_patch16_224", {"global_pool": "token"}),
    "relative bias of patches alone": ("vit_relpos_base_patch16_clsgap_224", {}),
    "relative bias without learned tokens": ("vit_relpos_small_patch16_224", {}),
}


def positioned(kind: str, sharpness: float = 3) -> CompactModel:
    """Three blocks on 16 patches, whose attentions read positions and depend on the image."""
    name, options = POSITIONED[kind]
    dense = tiny_vit(name, img_size=32, depth=3, num_heads=2, embed_dim=32, **options)
    model = lift(dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(sharpness)
            if name.endswith("bias.table"):
                parameter.add_(torch.randn_like(parameter))
    return model


def positioned_selection(
    kind: str,
    method: SelectMethod = "column-attention",
    *,
    sharpness: float = 3,
    **options: Any,
) -> CompactModel:
    """That network with selections in the first two blocks."""
    dense = positioned(kind, sharpness)
    model = select_tokens(dense, method, **{"stages": [0, 1], "ratio": 0.6, **options})
    for parameter in model.selects.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()
