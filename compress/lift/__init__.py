"""Lifting: convert a Vision Transformer of another library into a dense, equal `CompactModel`.

Each kind of module has one converter, registered for the exact types that it handles.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..network import files
from ..network.architecture import Architecture
from ..network.modules.model import CompactModel, build

# Importing these modules registers their converters.
from . import (  # noqa: F401
    timm_attention,
    timm_block,
    timm_convention,
    timm_mlp,
    timm_naflex,
    timm_parallel,
    timm_vit,
    torchvision_vit,
    transformers_vit,
)
from .registry import Piece, find_converter


def lift(model: nn.Module) -> CompactModel:
    """Convert a Vision Transformer to a `CompactModel` with the same outputs.

    Args:
        model: A Vision Transformer of timm, torchvision or transformers, or a module that follows
            timm's naming convention. A `CompactModel` is returned unchanged.

    Returns:
        A dense model with copied weights and the same training mode. Shapes: (batch, channels,
        height, width) -> (batch, classes), or features if the model has no classifier.

    Raises:
        UnsupportedModel: A module has no rule; the message names its path and type.
    """
    if isinstance(model, CompactModel):
        return model
    piece = read(model)
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in piece.tensors.items()
    }
    return build(piece.spec, state).train(model.training)


def read(model: nn.Module) -> Piece[Architecture]:
    """Return the architecture of a model and its tensors, views of the model's own where possible.

    Raises:
        UnsupportedModel: A module has no rule; the message names its path and type.
    """
    if isinstance(model, CompactModel):
        return Piece(model.architecture, model.state_dict())
    with torch.no_grad():
        piece: Piece[Architecture] = find_converter("model", model, "")(model, "")
    return Piece(piece.spec, {name: tensor.detach() for name, tensor in piece.tensors.items()})


def save(model: nn.Module, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Save a model as `model.safetensors` and `architecture.json`, completely or not at all.

    Args:
        model: A `CompactModel`, or any supported Vision Transformer, which is lifted first.
        folder: The folder to write; created with its parents.
        overwrite: Whether to replace a folder that contains a saved model.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, or the disk is full.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    return files.save(lift(model), folder, overwrite=overwrite)
