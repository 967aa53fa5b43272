"""Reading a `CompactModel`: unchanged if it is plain, and as another library's model otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..network.architecture import Architecture
from ..network.modules.model import CompactModel, build
from .hooks import is_changed, is_reparametrized
from .registry import Piece, converts, record

# The types that a `CompactModel` computes in: float64 is exact enough to compare others with.
_COMPUTED = ({torch.float32}, {torch.float64})


def is_plain(model: nn.Module) -> bool:
    """Whether a model is a `CompactModel` that its architecture and weights describe."""
    return type(model) is CompactModel and not is_changed(model) and not is_reparametrized(model)


@converts("model", f"{CompactModel.__module__}.CompactModel")
def compact_model(model: Any, path: str) -> Piece[Architecture]:
    """Convert a `CompactModel` with hooks or with reparametrized tensors."""
    del path
    architecture: Architecture = model.architecture
    with torch.device("meta"):
        names = list(CompactModel(architecture).state_dict())
    tensors = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        tensors[name] = getattr(model.get_submodule(owner), leaf)
    for step in model.steps:
        for branch in step:
            record("attention", branch.core, branch.spec.name)
    return Piece(architecture, tensors)


def types_of(model: nn.Module) -> set[torch.dtype]:
    """The floating-point types of a model's parameters."""
    return {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}


def float32_copy(model: CompactModel) -> CompactModel:
    """A plain `CompactModel` in float32, or the model itself if its type is computed in."""
    if types_of(model) in _COMPUTED:
        return model
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    return build(model.architecture, state).train(model.training)
