"""Converter of timm's NaFlexVit, at one image size.

Its position table is resampled once, and its Linear patch embedding becomes a convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, StemSpec
from .assembly import assemble, classifier, lift_blocks
from .parts import linear
from .registry import Piece, TokenLayout, converts, type_name
from .stem import conv_stem, linear_stem
from .timm_rope import rope_tables
from .timm_vit import pooling


@converts("model", "timm.models.naflexvit.NaFlexVit")
def naflex(model: Any, path: str) -> Piece[Architecture]:
    """Convert a NaFlexVit, at the image size of its configuration or else of its positions."""
    embeds = model.embeds
    if type_name(embeds) != "timm.models.naflexvit.NaFlexEmbeds":
        raise UnsupportedModel(f"embeds: no rule for {type_name(embeds)}")
    stem = _stem(embeds)
    image = _image(model, embeds)
    grid = stem.spec.sizes(*image[1:])[-1]
    tables = rope_tables(model.rope, "rope", grid, len(model.blocks), dynamic=True)
    layouts = [TokenLayout(grid, model.num_prefix_tokens, rope=table) for table in tables]
    found = [token[0] for token in (embeds.cls_token, embeds.reg_token) if token is not None]
    return assemble(
        image=image,
        stem=stem,
        blocks=lift_blocks(model.blocks, "blocks", layouts),
        prefix=torch.cat(found) if found else None,
        position=_positions(embeds, grid),
        position_resize=_resampling(embeds, grid),
        norms={
            "patch_norm": (embeds.norm, "embeds.norm"),
            "stem_norm": (model.norm_pre, "norm_pre"),
            "norm": (model.norm, "norm"),
            "pool_norm": (model.fc_norm, "fc_norm"),
        },
        pool=pooling(model),
        head=classifier(model.head, "head"),
    )


def _stem(embeds: Any) -> Piece[StemSpec]:
    if embeds.norm_input is not None:
        raise UnsupportedModel("embeds.norm_input: no rule for a norm on the pixels of a patch")
    if not embeds.is_linear:
        return conv_stem(embeds.proj, "embeds.proj")
    tensors = linear(embeds.proj, "embeds.proj")
    return linear_stem(
        tensors["weight"],
        tensors.get("bias"),
        embeds.patch_size,
        embeds.in_chans,
        channels_last=embeds.channels_last,
    )


def _image(model: Any, embeds: Any) -> tuple[int, int, int]:
    patch = embeds.patch_size
    size = (
        getattr(embeds, "default_img_size", None)
        or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, 0, 0))[-2:]
    )
    if not all(size) or any(side % step for side, step in zip(size, patch, strict=True)):
        if embeds.pos_embed_grid_size is None:
            raise UnsupportedModel(
                "embeds: the model has no image size, and a compact model needs one; "
                "create the model with img_size"
            )
        size = tuple(
            side * step for side, step in zip(embeds.pos_embed_grid_size, patch, strict=True)
        )
    return (embeds.in_chans, *size)


def _resampling(embeds: Any, grid: tuple[int, int]) -> str | None:
    """How the model resamples the result of `_positions` for another image size.

    None if it starts from a table that is not kept, or resamples in another way than ours.
    """
    if embeds.pos_embed_type == "none":
        return "bicubic"
    if embeds.pos_embed_ar_preserving or tuple(embeds.pos_embed_grid_size or ()) != grid:
        return None
    if embeds.pos_embed_type == "factorized":
        # Rows and columns are resampled linearly, then added: equal to resampling their sum.
        return "bilinear"
    usual = (
        embeds.pos_embed_interp_mode,
        embeds.pos_embed_antialias,
        embeds.pos_embed_align_corners or False,
    ) == ("bicubic", True, False)
    return "bicubic" if usual else None


def _positions(embeds: Any, grid: tuple[int, int]) -> Tensor | None:
    """Positions (patches, embed) as the model itself resamples them for this grid."""
    if embeds.pos_embed_type == "none":
        return None
    apply = {
        "learned": embeds._apply_learned_pos_embed,
        "factorized": embeds._apply_factorized_pos_embed,
    }[embeds.pos_embed_type]
    reference = next(embeds.proj.parameters())
    zeros: Tensor = torch.zeros(
        1, math.prod(grid), embeds.embed_dim, dtype=reference.dtype, device=reference.device
    )
    apply(zeros, grid_size=grid)
    return zeros[0]
