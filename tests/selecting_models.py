"""A small network whose selections choose other patches for each image, and its buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import tiny_vit
from torch import Tensor
from vitrim import BucketedModel, Buckets, bucketed
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
        found = features(network._scored(pictures)[0], network.architecture.prefix)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(counts) - 1, found.shape[1], generator=generator)
    # A third of the pictures in each bucket.
    bias = torch.stack([(found @ row).quantile(1 / 3) for row in weights])
    learned = Divergence(
        weights=tuple(map(tuple, weights.tolist())), bias=tuple((-bias).tolist()), threshold=0.0
    )
    return BucketedModel(network.network, Buckets(counts=tuple(counts), divergence=learned)).eval()
