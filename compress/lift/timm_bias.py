"""timm's relative position biases: tables, and MLPs on log coordinates, which at a fixed image size
are tables too.

An MLP's outputs for all offsets are computed once; the lifted model trains the table instead of the
MLP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import RelativeBiasSpec
from .parts import absent
from .positions import Places
from .registry import Piece, find, handles


def relative_bias(module: Any, path: str, places: Places) -> Piece[RelativeBiasSpec] | None:
    """The bias of one attention, or None where there is none."""
    if module is None:
        return None
    piece: Piece[RelativeBiasSpec] = find("relative bias", module, path)(module, path, places)
    return piece


@handles(
    "relative bias", "timm.layers.pos_embed_rel.RelPosBias", "timm.models.beit.RelativePositionBias"
)
def table(module: Any, path: str, places: Places) -> Piece[RelativeBiasSpec]:
    """One row an offset; three more for a class token."""
    return bias_table(module.relative_position_bias_table, tuple(module.window_size), path, places)


@handles("relative bias", "timm.layers.pos_embed_rel.RelPosMlp")
def mlp(module: Any, path: str, places: Places) -> Piece[RelativeBiasSpec]:
    """The MLP's value for each offset; prefix tokens have none."""
    inner = module.mlp
    if not absent(inner.norm):
        raise UnsupportedModel(
            f"{path}.mlp.norm: no rule for a norm in the MLP of relative positions"
        )
    # Without its dropout.
    values: Tensor = module.bias_act(
        inner.fc2(inner.act(inner.fc1(module.rel_coords_log))).view(-1, module.num_heads)
    )
    if module.bias_gain is not None:
        values = module.bias_gain * values
    if tuple(module.window_size) != places.grid:
        raise UnsupportedModel(
            f"{path}: relative bias for {module.window_size} patches, the image has {places.grid}"
        )
    # Offsets in units of the grid change their meaning with it.
    absolute = module.mode == "cr" or module.pretrained_window_size[0] > 0
    return Piece(
        RelativeBiasSpec(
            grid=places.grid, prefix=places.prefix, resize="crop" if absolute else None
        ),
        {"table": values},
    )


def bias_table(
    values: Tensor, window: tuple[int, ...], path: str, places: Places
) -> Piece[RelativeBiasSpec]:
    """A table of (offsets, heads)."""
    spec = RelativeBiasSpec(grid=places.grid, prefix=places.prefix, prefix_rows=places.prefix > 0)
    if window != places.grid or values.shape[0] != spec.rows:
        raise UnsupportedModel(
            f"{path}: a relative bias table of {values.shape[0]} rows for {window} patches, the image has {places.grid}"
        )
    return Piece(spec, {"table": values})


def add(
    one: Piece[RelativeBiasSpec] | None, other: Piece[RelativeBiasSpec] | None, path: str
) -> Piece[RelativeBiasSpec] | None:
    """Two biases on the same scores: their tables are added."""
    if one is None or other is None:
        return one or other
    if one.spec != other.spec:
        raise UnsupportedModel(f"{path}: its own relative bias and the shared one are not alike")
    return Piece(one.spec, {"table": one.tensors["table"] + other.tensors["table"]})
