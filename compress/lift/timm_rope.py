"""Converters of timm's rotary position embeddings, evaluated once at the model's image size.

The mixed form learns frequencies; a lifted model stores the table that they give, which is no
longer trained. The frequencies are kept for other image sizes if they reproduce the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import RopeGridSpec, RopeSpec
from ..network.modules.rope import rope_table
from .registry import Piece, RopeTable, TokenLayout, converts, find_converter, type_name

_SINCOS = "timm.layers.pos_embed_sincos"
_CAT, _DINO, _MIXED, _MROPE = (
    f"{_SINCOS}.RotaryEmbedding{kind}" for kind in ("Cat", "DinoV3", "Mixed", "MRope")
)
# Absolute, of a cosine or sine.
_TOLERANCE = 1e-5


def rope_tables(
    rope: Any, path: str, grid: tuple[int, int], depth: int, *, dynamic: bool
) -> list[RopeTable | None]:
    """Evaluate the rotary position embedding of each block.

    Args:
        rope: The embedding module. None: the model has no rope.
        path: Path in the source model, for error messages.
        grid: Rows and columns of patches.
        depth: Number of blocks.
        dynamic: Whether the model computes the table for the size of each image, instead of using
            the stored one.

    Returns:
        One table per block; None without rope.

    Raises:
        UnsupportedModel: The type has no rule, or its tables are for another number of blocks.
    """
    if rope is None:
        return [None] * depth
    found: Tensor = find_converter("rope", rope, path)(rope, grid, dynamic)
    at, frequencies = _origin(rope)
    if found.ndim == 2:
        return [RopeTable(found[None], frequencies, at)] * depth
    if found.shape[0] != depth:
        raise UnsupportedModel(f"{path}: tables for {found.shape[0]} blocks, the model has {depth}")
    each = [None] * depth if frequencies is None else list(frequencies)
    return [RopeTable(table, own, at) for table, own in zip(found, each, strict=True)]


@converts("rope", _CAT, _DINO, _MIXED, _MROPE)
def table(module: Any, grid: tuple[int, int], dynamic: bool) -> Tensor:
    """Return (patches, 2 * qk), or (blocks, heads, patches, 2 * qk) of the mixed form."""
    training = module.training
    module.training = False  # Coordinates are jittered in training only.
    try:
        compute = dynamic or not hasattr(module, "feat_shape")
        found: Tensor = module.get_embed(shape=list(grid)) if compute else module.get_embed()
    finally:
        module.training = training
    return found


def rope_piece(layout: TokenLayout, width: int, path: str, *, half: bool) -> Piece[RopeSpec] | None:
    """Convert the rope of one attention.

    Args:
        layout: The tokens that the attention sees, with the rope table.
        width: Number of query/key columns per head.
        path: Path in the source model, for error messages.
        half: Whether a pair is columns i and i + width / 2, instead of 2 i and 2 i + 1.

    Returns:
        The rope, with frequencies if they reproduce the table; None without rope.

    Raises:
        UnsupportedModel: The table is for another width.
    """
    if layout.rope is None:
        return None
    found, at, frequencies = layout.rope.table, layout.rope.at, layout.rope.frequencies
    if found.shape[-1] != 2 * width:
        raise UnsupportedModel(
            f"{path}: rope for {found.shape[-1] // 2} columns, the heads have {width}"
        )
    sines, cosines = found.float().chunk(2, dim=-1)
    # Both columns of a pair are rotated by the same angle, so one of them is kept.
    pick = slice(0, width // 2) if half else slice(0, width, 2)
    tensors = {"table": torch.stack([cosines[..., pick], sines[..., pick]], dim=1)}
    if at is None or frequencies is None:
        at = None
    elif _reproduces(at, frequencies, tensors["table"], layout.grid):
        tensors["frequencies"] = frequencies
    else:
        at = None
    return Piece(
        RopeSpec(
            layout="half" if half else "interleaved",
            tokens=found.shape[-2],
            prefix=layout.prefix,
            per_head=len(found) > 1,
            at=at,
        ),
        tensors,
    )


def _reproduces(
    at: RopeGridSpec, frequencies: Tensor, expected: Tensor, grid: tuple[int, int]
) -> bool:
    if frequencies.shape != (expected.shape[0], 2, expected.shape[-1]):
        return False
    found = rope_table(at, frequencies, grid)
    if found.device.type == "meta":
        return True
    return found.shape == expected.shape and bool(((found - expected).abs() <= _TOLERANCE).all())


def _origin(module: Any) -> tuple[RopeGridSpec | None, Tensor | None]:
    """The coordinates of the patches, and the frequencies that they are multiplied with.

    Frequencies are vertical and horizontal: (1, 2, pairs), or (blocks, heads, 2, pairs) of the
    mixed form. None if they are unknown.
    """
    kind = type_name(module)
    if kind == _MIXED:
        return RopeGridSpec(), torch.stack(_down_across(module, *module.freqs.float()), dim=-2)
    if kind == _MROPE:
        return RopeGridSpec(), torch.stack(
            [module.inv_freq.float() * (module.axis == axis) for axis in (1, 2)]
        )[None]
    if kind == _DINO:
        at = RopeGridSpec(kind="centred", offset=module.grid_offset, over=module.normalize_coords)
        return at, _axial(module, 2 * math.pi / module.periods.float())
    bands = getattr(module, "bands", None)
    if bands is None:
        return None, None
    named = getattr(module, "grid_type", "pixel" if module.in_pixels else "index")
    reference = None if module.ref_feat_shape is None else tuple(module.ref_feat_shape)
    at = RopeGridSpec(
        kind="centred" if named == "centered" else named,
        offset=module.grid_offset,
        over=getattr(module, "normalize_coords", "separate"),
        reference=reference,
    )
    return at, _axial(module, bands.float())


def _axial(module: Any, bands: Tensor) -> Tensor:
    """Frequencies of pairs of which the first half depends on one axis, the second on the other."""
    zeros = torch.zeros_like(bands)
    first, second = torch.cat([bands, zeros]), torch.cat([zeros, bands])
    return torch.stack(_down_across(module, first, second))[None]


def _down_across(module: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    return [second, first] if module.grid_indexing == "xy" else [first, second]
