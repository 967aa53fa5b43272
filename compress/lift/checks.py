"""Checks of a source before and after it is read: what it is, and what its tensors contain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ...core.errors import InputError, UnsupportedModel
from ..network.architecture import Architecture
from ..network.modules.model import CompactModel


def require_module(model: object) -> None:
    """Raise InputError, with what to give instead, if `model` is no module."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str | PathLike):
        found = f"the text {str(model)!r}" if isinstance(model, str) else f"the path {model}"
        way_out = (
            "load a saved folder with vitrim.load(...), or build the model (timm.create_model)"
        )
    elif isinstance(model, Mapping):
        found, way_out = "a table of tensors", "load it into a module first: load_state_dict(...)"
    elif isinstance(model, type):
        found, way_out = f"the class {model.__name__}", "create an instance of it"
    elif isinstance(model, torch.export.ExportedProgram):
        found, way_out = "an exported program", "give the module that it was exported from"
    else:
        found = "None" if model is None else f"a {type(model).__name__}"
        way_out = "give the model itself"
    raise InputError(f"model: {found} where a torch.nn.Module was expected; {way_out}")


def require_plain_tensors(model: nn.Module) -> None:
    """Raise if a parameter is not a dense tensor of real numbers, or a module is compiled."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"{path or 'model'}: a TorchScript module has no rule; "
                "give the module that it was compiled from"
            )
    for name, tensor in model.named_parameters():
        problem = _problem(tensor)
        if problem is not None:
            raise InputError(f"{name}: {problem}")


def _problem(tensor: Tensor) -> str | None:
    """Why a parameter cannot be read, and what to do; None if it can."""
    if isinstance(tensor, UninitializedParameter):
        return "it has no value yet; run the model once, then give it"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}; call to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor; call dequantize(), or give the model before quantization"
    if type(tensor.data) is not Tensor:
        kind = type(tensor.data).__name__
        return f"a {kind} has no rule; give the model with ordinary tensors"
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"numbers of type {kind} where floating-point numbers were expected; convert them"
    return None


def require_finite(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise InputError, with the name in the source, if a tensor has NaN or infinity."""
    for name, tensor in tensors.items():
        if _is_finite(tensor):
            continue
        sources: Any = chain(model.named_parameters(), model.named_buffers())
        path = next((path for path, source in sources if not _is_finite(source)), name)
        raise InputError(
            f"{path}: it contains NaN or infinity; training has diverged, or a conversion "
            "overflowed: take an earlier checkpoint"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch adds no numbers of eight bits
    # A sum is cheaper than a comparison of every element, but may overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def require_shapes(architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Raise if the tensors that were read are not those of the architecture, or not plain."""
    with torch.device("meta"):
        expected = CompactModel(architecture).state_dict()
    for name in expected.keys() | tensors.keys():
        wanted, found = expected.get(name), tensors.get(name)
        if wanted is None or found is None or wanted.shape != found.shape:
            raise UnsupportedModel(
                f"model: {_site(architecture, name)} has shape {_shape(found)} where its other "
                f"parts need {_shape(wanted)}; the model was edited inconsistently"
            )
        problem = _problem(found)
        if problem is not None:
            raise InputError(f"{_site(architecture, name)}: {problem}")


def _site(architecture: Architecture, name: str) -> str:
    """The name of a tensor, with that of its sub-layer in the source instead of its number."""
    if not name.startswith("steps."):
        return name
    _, step, position, leaf = name.split(".", 3)
    return f"{architecture.steps[int(step)][int(position)].name}: {leaf}"


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))
