"""Converters of timm's relative position biases: tables, and MLPs on log coordinates.

At a fixed image size an MLP is a table too: its outputs for all offsets are computed once, and the
lifted model trains the table instead of the MLP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import RelativeBiasSpec
from .parts import absent
from .registry import Piece, TokenLayout, converts, find_converter


def relative_bias(module: Any, path: str, layout: TokenLayout) -> Piece[RelativeBiasSpec] | None:
    """Convert the bias of one attention; None if there is none."""
    if module is None:
        return None
    piece: Piece[RelativeBiasSpec] = find_converter("relative bias", module, path)(
        module, path, layout
    )
    return piece


@converts(
    "relative bias", "timm.layers.pos_embed_rel.RelPosBias", "timm.models.beit.RelativePositionBias"
)
def table(module: Any, path: str, layout: TokenLayout) -> Piece[RelativeBiasSpec]:
    """Convert a table with one row per offset, and three more for a class token."""
    return bias_table(module.relative_position_bias_table, tuple(module.window_size), path, layout)


@converts("relative bias", "timm.layers.pos_embed_rel.RelPosMlp")
def mlp(module: Any, path: str, layout: TokenLayout) -> Piece[RelativeBiasSpec]:
    """Convert an MLP to its values for all offsets; prefix tokens have no bias."""
    inner = module.mlp
    if not absent(inner.norm):
        raise UnsupportedModel(
            f"{path}.mlp.norm: no rule for a norm in the MLP of relative positions"
        )
    # Without its dropout.
    outputs = inner.fc2(inner.act(inner.fc1(module.rel_coords_log)))
    values: Tensor = module.bias_act(outputs.view(-1, module.num_heads))
    if module.bias_gain is not None:
        values = module.bias_gain * values
    if tuple(module.window_size) != layout.grid:
        raise UnsupportedModel(
            f"{path}: relative bias for {module.window_size} patches, the image has {layout.grid}"
        )
    # Offsets relative to the grid have another meaning on another grid.
    absolute = module.mode == "cr" or module.pretrained_window_size[0] > 0
    resize = "crop" if absolute else None
    spec = RelativeBiasSpec(grid=layout.grid, prefix=layout.prefix, resize=resize)
    return Piece(spec, {"table": values})


def bias_table(
    values: Tensor, window: tuple[int, ...], path: str, layout: TokenLayout
) -> Piece[RelativeBiasSpec]:
    """Convert a table.

    Args:
        values: (offsets, heads).
        window: Rows and columns of patches that the table is for.
        path: Path in the source model, for error messages.
        layout: The tokens of the model.

    Returns:
        The bias. It has rows for a class token if the model has prefix tokens.

    Raises:
        UnsupportedModel: The table is for another grid.
    """
    spec = RelativeBiasSpec(grid=layout.grid, prefix=layout.prefix, prefix_rows=layout.prefix > 0)
    if window != layout.grid or values.shape[0] != spec.rows:
        raise UnsupportedModel(
            f"{path}: a relative bias table of {values.shape[0]} rows for {window} patches, "
            f"the image has {layout.grid}"
        )
    return Piece(spec, {"table": values})


def add(
    one: Piece[RelativeBiasSpec] | None, other: Piece[RelativeBiasSpec] | None, path: str
) -> Piece[RelativeBiasSpec] | None:
    """Add the tables of two biases on the same scores."""
    if one is None or other is None:
        return one or other
    if one.spec != other.spec:
        raise UnsupportedModel(f"{path}: its own relative bias and the shared one differ in shape")
    return Piece(one.spec, {"table": one.tensors["table"] + other.tensors["table"]})
