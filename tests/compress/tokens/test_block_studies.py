"""Measurements of single blocks return plain data that follows the definitions."""

from __future__ import annotations

import math

import pytest
import torch
import vitrim
from tiny_models import tiny_vit
from vitrim.compress.tokens.block_studies import patch_similarity, single_block_accuracy
from vitrim.core.errors import InputError


def test_the_similarity_of_patches_is_the_mean_over_pairs() -> None:
    model = vitrim.lift(tiny_vit(depth=2)).eval()
    images = torch.randn(3, 3, 16, 16)
    found = patch_similarity(model, images)
    assert list(found) == ["stem", "blocks.0", "blocks.1"]
    with torch.no_grad():
        patches = model.embed(images)[:, 1:]
    pairs = torch.nn.functional.cosine_similarity(patches[:, :, None], patches[:, None], dim=-1)
    wanted = (pairs.sum(dim=(1, 2)) - 4) / 12
    assert found["stem"] == pytest.approx(float(wanted.mean()), rel=1e-4)
    once = vitrim.compact(model, vitrim.choose_tokens(model, "random", [2, 1]))
    assert math.isnan(patch_similarity(once, images)["blocks.0"])


def test_one_block_alone_is_pruned_and_its_patches_return() -> None:
    model = vitrim.lift(tiny_vit(img_size=24, depth=3)).eval()
    torch.manual_seed(0)
    images = torch.randn(12, 3, 24, 24)
    rows = single_block_accuracy(model, images, shares=(1.0, 0.3), methods=("column-attention",))
    assert [(row.block, row.share, row.tokens) for row in rows] == [
        (f"blocks.{block}", share, tokens)
        for block in range(3)
        for share, tokens in ((1.0, 10), (0.3, 4))
    ]
    assert all(row.accuracy == 1.0 for row in rows if row.share == 1.0)
    # The head reads the class token, which the last block always computes.
    assert rows[-1].accuracy == 1.0
    with torch.no_grad():
        labels = (model(images).argmax(dim=-1) + 1) % 5
    rows = single_block_accuracy(
        model, images, labels, blocks=["blocks.1"], methods=("radial", "random"), shares=(1.0,)
    )
    assert [(row.method, row.accuracy) for row in rows] == [("radial", 0.0), ("random", 0.0)]


def test_unknown_blocks_methods_and_missing_heads_are_refused() -> None:
    model = vitrim.lift(tiny_vit()).eval()
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(InputError, match=r"block 'blocks.9': choose one of blocks.0, blocks.1"):
        single_block_accuracy(model, images, blocks=["blocks.9"])
    with pytest.raises(InputError, match="choose one of patch-slimming"):
        single_block_accuracy(model, images, methods=["magic"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="the model has no head"):
        single_block_accuracy(tiny_vit(num_classes=0), images)
