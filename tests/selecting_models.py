"""Small networks whose selections choose other patches for each image, and their buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import tiny_vit
from torch import Tensor
from vitrim import BucketedModel, Buckets, bucketed, lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.bucket_rules import Divergence, Rule, features
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


def divided(
    model: CompactModel, counts: Sequence[int], pictures: Tensor, rule: Rule = "coverage"
) -> BucketedModel:
    """Buckets that divide the pictures: by coverage, or by a drawn prediction of a divergence."""
    if rule == "coverage":
        mean = counts[0] + 0.4375 * (counts[-1] - counts[0])
        return bucketed(model, counts, images=pictures, mean_patches=mean, rule=rule).eval()
    network = bucketed(model, counts, coverage=1.0).eval()
    with torch.no_grad():
        found = features(network._scored(pictures)[0].x, network.architecture.prefix)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(counts) - 1, found.shape[1], generator=generator)
    # A third of the pictures in each bucket.
    bias = torch.stack([(found @ row).quantile(1 / 3) for row in weights])
    learned = Divergence(
        weights=tuple(map(tuple, weights.tolist())), bias=tuple((-bias).tolist()), threshold=0.0
    )
    return BucketedModel(network.network, Buckets(counts=tuple(counts), divergence=learned)).eval()


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
