"""Lifting: read a Vision Transformer of another library into our one network, dense and equal in output.

One handler a module kind, in a file of its own, registered by the exact type it handles.
"""

from __future__ import annotations

import torch
from torch import nn

from ..vit.model import CompactModel
from . import timm_attention, timm_block, timm_mlp, timm_vit  # noqa: F401 - they register themselves
from .registry import find


def lift(model: nn.Module) -> CompactModel:
    """The same network as a `CompactModel` with copied weights; a `CompactModel` is returned as it is.

    Errors: UnsupportedModel with the path and type of the first module that no rule covers.
    """
    if isinstance(model, CompactModel):
        return model
    from ..compactor import build

    with torch.no_grad():
        piece = find("model", model, "")(model, "")
        state = {name: tensor.detach().clone() for name, tensor in piece.tensors.items()}
    lifted = build(piece.spec, state)
    lifted.train(model.training)
    return lifted
