"""Lifting: read a Vision Transformer of another library into our one network, dense and equal in
output.

One handler a module kind, in a file of its own, registered by the exact type it handles.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..network import files
from ..network.architecture import Architecture
from ..network.modules.model import CompactModel, build
from . import (
    convention,
    timm_attention,
    timm_block,
    timm_mlp,
    timm_naflex,
    timm_parallel,
    timm_vit,
    torchvision_vit,
    transformers_vit,
)
from .registry import Piece, find


def lift(model: nn.Module) -> CompactModel:
    """The same network as a `CompactModel` with copied weights; a `CompactModel` is returned as it
    is.

    Errors: UnsupportedModel with the path and type of the first module that no rule covers.
    """
    if isinstance(model, CompactModel):
        return model
    piece = read(model)
    lifted = build(
        piece.spec,
        {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in piece.tensors.items()
        },
    )
    lifted.train(model.training)
    return lifted


def read(model: nn.Module) -> Piece[Architecture]:
    """The architecture of a network and its tensors, which are views of the model's own wherever
    they can be.

    Errors: UnsupportedModel with the path and type of the first module that no rule covers.
    """
    if isinstance(model, CompactModel):
        return Piece(model.architecture, model.state_dict())
    with torch.no_grad():
        piece: Piece[Architecture] = find("model", model, "")(model, "")
    return Piece(piece.spec, {name: tensor.detach() for name, tensor in piece.tensors.items()})


def save(model: nn.Module, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a model to a folder as `model.safetensors` and `architecture.json`, complete or not at
    all.

    Args:
        model: A `CompactModel`, or any supported Vision Transformer, which is lifted first.
        folder: Where to; created with its parents.
        overwrite: Replace a folder that holds a saved model.
    Returns:
        The folder.
    Raises:
        InputError: The folder is not empty, or the disk is full.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    return files.save(lift(model), folder, overwrite=overwrite)
