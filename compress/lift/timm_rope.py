"""timm's rotary position embeddings, evaluated once at the model's image size.

What is learned in the mixed form are frequencies; the lifted model holds the angles that they give,
which no longer change. The frequencies are kept beside them where they provably give the same
angles, for another image size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import RopeGridSpec, RopeSpec
from ..network.modules.rope import rope_table
from .positions import Places, Turns
from .registry import Piece, find, handles, type_name

_SINCOS = "timm.layers.pos_embed_sincos"
_CAT, _DINO, _MIXED, _MROPE = (
    f"{_SINCOS}.RotaryEmbedding{kind}" for kind in ("Cat", "DinoV3", "Mixed", "MRope")
)
# Of a cosine or sine.
_SAME = 1e-5


def rope_tables(
    rope: Any, path: str, grid: tuple[int, int], depth: int, *, dynamic: bool
) -> list[Turns | None]:
    """What each block turns by, or None without rope. `dynamic`: the model asks for the table of
    the image it sees, not for the stored one.
    """
    if rope is None:
        return [None] * depth
    found: Tensor = find("rope", rope, path)(rope, grid, dynamic)
    at, frequencies = _origin(rope)
    if found.ndim == 2:
        return [Turns(found[None], frequencies, at)] * depth
    if found.shape[0] != depth:
        raise UnsupportedModel(f"{path}: tables for {found.shape[0]} blocks, the model has {depth}")
    each = [None] * depth if frequencies is None else list(frequencies)
    return [Turns(table, own, at) for table, own in zip(found, each, strict=True)]


@handles("rope", _CAT, _DINO, _MIXED, _MROPE)
def table(module: Any, grid: tuple[int, int], dynamic: bool) -> Tensor:
    """(patches, 2 * qk), or (blocks, heads, patches, 2 * qk) of the mixed form."""
    training = module.training
    module.training = False  # Coordinates are jittered in training only.
    try:
        found: Tensor = (
            module.get_embed(shape=list(grid))
            if dynamic or not hasattr(module, "feat_shape")
            else module.get_embed()
        )
    finally:
        module.training = training
    return found


def rope_piece(places: Places, width: int, path: str, *, half: bool) -> Piece[RopeSpec] | None:
    """The rope of one attention of `width` query/key columns."""
    if places.rope is None:
        return None
    found, at, frequencies = places.rope.table, places.rope.at, places.rope.frequencies
    if found.shape[-1] != 2 * width:
        raise UnsupportedModel(
            f"{path}: rope for {found.shape[-1] // 2} columns, the heads have {width}"
        )
    sines, cosines = found.float().chunk(2, dim=-1)
    # Both columns of a pair turn by the same angle, so one of them is kept.
    pick = slice(0, width // 2) if half else slice(0, width, 2)
    tensors = {"table": torch.stack([cosines[..., pick], sines[..., pick]], dim=1)}
    if (
        at is not None
        and frequencies is not None
        and _gives(at, frequencies, tensors["table"], places.grid)
    ):
        tensors["frequencies"] = frequencies
    else:
        at = None
    layout = "half" if half else "interleaved"
    return Piece(
        RopeSpec(
            layout=layout,
            tokens=found.shape[-2],
            prefix=places.prefix,
            per_head=len(found) > 1,
            at=at,
        ),
        tensors,
    )


def _gives(at: RopeGridSpec, frequencies: Tensor, wanted: Tensor, grid: tuple[int, int]) -> bool:
    if frequencies.shape != (wanted.shape[0], 2, wanted.shape[-1]):
        return False
    made = rope_table(at, frequencies, grid)
    return made.device.type == "meta" or (
        made.shape == wanted.shape and bool(((made - wanted).abs() <= _SAME).all())
    )


def _origin(module: Any) -> tuple[RopeGridSpec | None, Tensor | None]:
    """Frequencies (1, 2, pairs), or (blocks, heads, 2, pairs) of the mixed form, down and across,
    and the grid that they are meant for.
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
    """The first half of the pairs turns along one axis, the second along the other."""
    still = torch.zeros_like(bands)
    return torch.stack(_down_across(module, torch.cat([bands, still]), torch.cat([still, bands])))[
        None
    ]


def _down_across(module: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    return [second, first] if module.grid_indexing == "xy" else [first, second]
