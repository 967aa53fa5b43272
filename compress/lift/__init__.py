"""Lifting: convert a Vision Transformer of another library into a dense, equal `CompactModel`.

Each kind of module has one converter, registered for the exact types that it handles.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from ...core.errors import InputError, warn_of_model
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
    transformers_backbones,
    transformers_vit,
)
from .checks import require_finite, require_module, require_plain_tensors, require_shapes
from .compact_model import float32_copy, is_plain, types_of
from .data_config import data_of
from .hooks import folded_reparametrizations
from .proof import prove
from .registry import Piece, find_converter, has_converter, recorded_modules
from .source_state import prepared
from .wrappers import innermost, unwrapped


def lift(model: nn.Module, *, proof: bool = True) -> CompactModel:
    """Convert a Vision Transformer to a `CompactModel` with the same outputs.

    The source is run beside the conversion on noise images, once, and restored. Reparametrized
    tensors (`torch.nn.utils.prune`, `weight_norm`, `spectral_norm`, `parametrize`) are folded.
    Other types than float32 are converted, with a warning.

    Args:
        model: A Vision Transformer of timm, torchvision or transformers, or a module that follows
            timm's naming convention. A `CompactModel` without hooks is returned unchanged, in
            float16 and bfloat16 converted. Wrappers that compute nothing of their own are removed:
            data parallelism, `torch.compile`, averages.
        proof: Whether to compare outputs. False: hooks and replaced methods of `model` are ignored.

    Returns:
        A dense model with copied weights and the same training mode. Shapes: (batch, channels,
        height, width) -> (batch, classes), or features if the model has no classifier.

    Raises:
        InputError: `model` is no module, or a tensor has NaN, infinity, or a type that is not
            floating-point; the message names it.
        UnsupportedModel: A module has no rule, or computes something else than its weights and
            type describe; the message names its path.
    """
    require_module(model)
    model = unwrapped(model)
    if isinstance(model, CompactModel) and is_plain(model):
        _check(model)
        _warn_of_conversion(model, [torch.float32, torch.float64])
        return float32_copy(model)
    piece = read(model, proof=proof)
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in piece.tensors.items()
    }
    return build(piece.spec, state).train(model.training)


def read(model: nn.Module, *, proof: bool = True) -> Piece[Architecture]:
    """Return the architecture of a model and its tensors, views of the model's own where possible.

    Args:
        model: As for `lift`.
        proof: As for `lift`.

    Returns:
        Architecture and tensors; in float32, unless `model` is a `CompactModel` without hooks.

    Raises:
        InputError: As for `lift`.
        UnsupportedModel: As for `lift`.
    """
    require_module(model)
    model = unwrapped(model)
    if isinstance(model, CompactModel) and is_plain(model):
        _check(model)
        return Piece(model.architecture, model.state_dict())
    # The proof compares with what is around it, too.
    source = innermost(model)
    require_plain_tensors(model)
    convert = find_converter("model", source, "")
    note = None
    with prepared(model), recorded_modules() as modules:
        with folded_reparametrizations(model):
            found: Piece[Architecture] = convert(source, "")
        spec = found.spec
        if spec.data is None:
            spec = spec.model_copy(update={"data": data_of(source, spec.image[0])})
        piece = Piece(spec, {name: each.detach() for name, each in found.tensors.items()})
        require_shapes(piece.spec, piece.tensors)
        require_finite(piece.tensors, model)
        without_weights = any(each.device.type == "meta" for each in piece.tensors.values())
        if proof and not without_weights:
            note = prove(model, piece, list(modules.values()))
    _warn_of_conversion(model, [torch.float32])
    if note is not None:
        warn_of_model(note)
    return piece


def _check(model: CompactModel) -> None:
    require_plain_tensors(model)
    require_finite(dict(model.state_dict()), model)


def _warn_of_conversion(model: nn.Module, computed: list[torch.dtype]) -> None:
    found = types_of(model)
    if len(found) == 1 and found <= set(computed):
        return
    names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in found))
    warn_of_model(f"the model is in {names}; it is computed in float32")


def save(
    model: nn.Module, folder: Path | str, *, overwrite: bool = False, proof: bool = True
) -> Path:
    """Save a model as `model.safetensors` and `architecture.json`, completely or not at all.

    Args:
        model: A `CompactModel`, or any supported Vision Transformer, which is lifted first. A
            `CompactModel` is saved in its own floating-point type if all parameters share it.
        folder: The folder to write; created with its parents.
        overwrite: Whether to replace a folder that contains a saved model.
        proof: As for `lift`.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, the disk is full, or a tensor has NaN or infinity.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    require_module(model)
    model = unwrapped(model)
    if isinstance(model, CompactModel) and is_plain(model) and files.is_storable(types_of(model)):
        _check(model)
        return files.save(model, folder, overwrite=overwrite)
    return files.save(lift(model, proof=proof), folder, overwrite=overwrite)


def in_float32(model: nn.Module) -> nn.Module:
    """Return a module that computes in float32: the module inside of wrappers, or a converted copy.

    Any module is allowed, also one that `lift` does not support.

    Raises:
        InputError: `model` is no module, or a parameter has NaN or infinity, or of a model that
            `lift` supports a type that is not floating-point; the message names it.
    """
    require_module(model)
    model = unwrapped(model)
    if has_converter("model", model):
        require_plain_tensors(model)
    require_finite(dict(model.named_parameters()), model)
    if types_of(model) <= {torch.float32}:
        return model
    _warn_of_conversion(model, [torch.float32])
    try:
        return copy.deepcopy(model).float()
    except RuntimeError as error:  # torch copies no tensor that a hook has computed
        raise InputError(
            f"model: it cannot be converted to float32 ({str(error).splitlines()[0]}); "
            "call .float() on it first"
        ) from error
