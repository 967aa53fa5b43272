"""Every plain Vision Transformer of timm, built small, with random numbers in every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn

MODULES = ("vision_transformer", "deit", "eva", "beit", "naflexvit", "vision_transformer_relpos")
DEPTH, WIDTH, HEADS, GRID = 2, 96, 3, 4


def names() -> list[str]:
    """All model names of those timm modules."""
    return [name for name in timm.list_models() if is_model_in_modules(name, MODULES)]


def small(name: str, seed: int = 0) -> nn.Module:
    """A model in eval mode: two blocks, 96 wide, three heads, on 4 x 4 patches.

    Where the constructor does not take these sizes, the nearest that it takes.
    """
    torch.manual_seed(seed)
    model: nn.Module | None = None
    problems = []
    for overrides in _overrides(name):
        try:
            model = timm.create_model(name, **overrides)
            break
        except (TypeError, AssertionError, ValueError) as error:
            problems.append(f"{overrides}: {error}")
    if model is None:
        raise RuntimeError(f"{name} cannot be built small: {problems}")
    perturb(model)
    return model.eval()


def perturb(model: nn.Module, amount: float = 0.1) -> None:
    """Change every parameter, so that no bias, norm or layer scale has no effect at 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def source_images(model: Any, batch: int = 1) -> torch.Tensor:
    """Random images of the size that a timm model takes: (batch, channels, height, width)."""
    embed = getattr(model, "patch_embed", None)
    size = (
        embed.img_size if embed is not None else [side * GRID for side in model.embeds.patch_size]
    )
    return torch.randn(batch, 3, *size)


def _overrides(name: str) -> Iterator[dict[str, Any]]:
    with torch.device("meta"):
        full: Any = timm.create_model(name)
    embed = getattr(full, "patch_embed", None) or full.embeds
    size = tuple(GRID * side for side in embed.patch_size)
    found: dict[str, Any] = {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "num_heads": HEADS,
        "img_size": size,
    }
    if hasattr(full, "embeds"):
        # A position table of another shape than the image's grid, so that it has to be resampled.
        found |= {
            "pos_embed_grid_size": (GRID + 1, GRID),
            "pretrained_cfg_overlay": {"input_size": (3, *size)},
        }
    yield found
    # Grouped queries in one block, none in the other, for constructors that take the number of
    # key/value heads of every block.
    yield found | {"num_kv_heads": (HEADS, 1)}
    yield {key: value for key, value in found.items() if key != "num_heads"}
    yield {"depth": DEPTH, "img_size": size}
    yield {"depth": DEPTH}
    yield {}
