"""timm's rotary position embeddings, evaluated once at the model's image size.

What is learned in the mixed form are frequencies; the lifted model holds the angles that they give, which no longer change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModel
from ..architecture import RopeSpec
from .positions import Places
from .registry import Piece, find, handles

_SINCOS = "timm.layers.pos_embed_sincos"


def rope_tables(rope: Any, path: str, grid: tuple[int, int], depth: int, *, dynamic: bool) -> list[Tensor | None]:
    """For each block, (heads or 1, patches, 2 * qk) sines and cosines, or None without rope.

    `dynamic`: the model asks for the table of the image it sees, not for the stored one.
    """
    if rope is None:
        return [None] * depth
    found: Tensor = find("rope", rope, path)(rope, grid, dynamic)
    if found.ndim == 2:
        return [found[None]] * depth
    if found.shape[0] != depth:
        raise UnsupportedModel(f"{path}: tables for {found.shape[0]} blocks, the model has {depth}")
    return list(found)


@handles("rope", f"{_SINCOS}.RotaryEmbeddingCat", f"{_SINCOS}.RotaryEmbeddingDinoV3", f"{_SINCOS}.RotaryEmbeddingMixed", f"{_SINCOS}.RotaryEmbeddingMRope")
def table(module: Any, grid: tuple[int, int], dynamic: bool) -> Tensor:
    """(patches, 2 * qk), or (blocks, heads, patches, 2 * qk) of the mixed form."""
    training = module.training
    module.training = False  # Coordinates are jittered in training only.
    try:
        found: Tensor = module.get_embed(shape=list(grid)) if dynamic or not hasattr(module, "feat_shape") else module.get_embed()
    finally:
        module.training = training
    return found


def rope_piece(places: Places, width: int, path: str, *, half: bool) -> Piece[RopeSpec] | None:
    """The rope of one attention of `width` query/key columns."""
    if places.rope is None:
        return None
    found = places.rope
    if found.shape[-1] != 2 * width:
        raise UnsupportedModel(f"{path}: rope for {found.shape[-1] // 2} columns, the heads have {width}")
    sines, cosines = found.float().chunk(2, dim=-1)
    # Both columns of a pair turn by the same angle, so one of them is kept.
    pick = slice(0, width // 2) if half else slice(0, width, 2)
    spec = RopeSpec(layout="half" if half else "interleaved", tokens=found.shape[-2], prefix=places.prefix, per_head=len(found) > 1)
    return Piece(spec, {"table": torch.stack([cosines[..., pick], sines[..., pick]], dim=1)})
