"""Writes the golden model of the first file format: `python tests/golden_model.py FOLDER`.

The stored files are never regenerated, so that they test that old files still load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from vitrim import StructuredMask, compact, save
from vitrim.compress.network.modules.model import CompactModel


def golden_images(model: CompactModel) -> Tensor:
    """Images (2, channels, height, width) without a random generator, which may change."""
    shape = (2, *model.architecture.image)
    return (
        torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.37)
        .float()
        .view(shape)
    )


def main(folder: Path) -> None:
    """Write a pruned model with query/key norms, layer scales, index lists and pruned heads."""
    import timm

    torch.manual_seed(0)
    source = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=3,
        num_classes=3,
        qk_norm=True,
        init_values=0.5,
    ).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = compact(source, StructuredMask.random(source, 0.5, sharing="unshared", seed=0))
    save(model, folder, overwrite=True)
    with torch.no_grad():
        (folder / "logits.json").write_text(json.dumps(model(golden_images(model)).tolist()) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
