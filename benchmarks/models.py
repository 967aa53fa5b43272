"""Models of random weights that several benchmarks measure: only their shapes matter for time."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
import vitrim
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel

# The shapes of the model that `make demo` trims.
DEMO: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}


def lifted(name: str) -> CompactModel:
    """The model `demo`, or one of timm's by its name, lifted and in eval mode."""
    torch.manual_seed(0)
    if name == "demo":
        return vitrim.lift(timm.create_model("vit_tiny_patch16_224", **DEMO).eval())
    return vitrim.lift(timm.create_model(name).eval())


def randomly_cut(model: CompactModel, keep_ratio: dict[str, float]) -> CompactModel:
    """The model, with the given share of each dimension kept at random."""
    mask = vitrim.StructuredMask.random(model, keep_ratio=keep_ratio)
    return vitrim.compact(model, mask).eval()


def computed_macs(model: CompactModel) -> int:
    """Multiply-adds as the graph forms compute them.

    The queries of the last block are computed only for the tokens that the head reads.
    """
    return count_macs(model.architecture.model_copy(update={"last_queries": True}))


def noise(model: CompactModel, count: int = 1) -> np.ndarray[Any, Any]:
    """Images for timing: (count, channels, height, width)."""
    return np.random.default_rng(0).standard_normal(
        (count, *model.architecture.image), dtype=np.float32
    )


def calibration_noise(model: CompactModel, count: int) -> np.ndarray[Any, Any]:
    """Images for the calibration of int8: (count, channels, height, width)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *model.architecture.image, generator=generator).numpy()
