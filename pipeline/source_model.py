"""The dense model that a recipe names: built by timm, its weights from a file where one is
named.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..compress.data.embedded import WEIGHTS, embedded_card
from ..compress.data.named_datasets import default_preprocessing
from ..compress.data.preprocessing import Preprocessing
from ..compress.lift import lift
from ..compress.network.files import ARCHITECTURE, load, read_architecture
from ..compress.surgery.prune_masks import fold_prune_masks
from ..compress.train.positions import start_positions
from ..core.errors import InputError
from ..core.storage import sha256_file
from .recipe_sections import ModelSection

# Where trainers put the weights inside a checkpoint, the averaged ones first.
_NESTS = ("model_ema", "state_dict_ema", "state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


EMBEDDED = "embedded"


def resolved(section: ModelSection) -> ModelSection:
    """The section with `checkpoint = "embedded"` replaced by the model, overrides and weights of
    the package.

    Errors: InputError if the section names another model than the embedded one.
    """
    if section.checkpoint != EMBEDDED:
        return section
    card = embedded_card()
    named = {} if section.name == ModelSection().name else {"name": section.name}
    for key, given in {
        **named,
        **({"overrides": section.overrides} if section.overrides else {}),
    }.items():
        wanted = card["model" if key == "name" else key]
        if given != wanted:
            raise InputError(
                f"model.{key} = {given!r}: the embedded checkpoint is of {wanted!r}; leave {key} out, or name another checkpoint"
            )
    return section.model_copy(
        update={"name": card["model"], "overrides": card["overrides"], "checkpoint": str(WEIGHTS)}
    )


def source_model(section: ModelSection, classes: int) -> nn.Module:
    """The model of `[model]` with a head of `classes` classes, in eval mode.

    A checkpoint is a folder saved by vitrim, or a .safetensors or .pth file with timm's names (.pth
    is read with weights_only). Errors: InputError for an unknown model name, an override it does
    not take, a checkpoint that does not fit, another number of classes.
    """
    section = resolved(section)
    if section.checkpoint is not None and Path(section.checkpoint).is_dir():
        return _saved(Path(section.checkpoint), classes)
    overrides = dict(section.overrides)
    wanted = overrides.setdefault("num_classes", classes)
    if wanted != classes:
        raise InputError(
            f"model.overrides.num_classes = {wanted}, but the data set has {classes} classes; leave num_classes out"
        )
    model = build(section.name, overrides, pretrained=section.pretrained)
    if section.checkpoint is not None:
        load_weights(model, Path(section.checkpoint), section.name)
    elif not section.pretrained:
        start_positions(model)
    return model.eval()


def image_of(section: ModelSection) -> tuple[int, int, int]:
    """(channels, height, width) that the model reads, without making its weights. Errors: as
    `source_model`, and UnsupportedModel.
    """
    section = resolved(section)
    if section.checkpoint is not None and Path(section.checkpoint).is_dir():
        return read_architecture(Path(section.checkpoint) / ARCHITECTURE).image
    with torch.device("meta"):
        return lift(build(section.name, section.overrides)).architecture.image


def preprocessing_of(
    section: ModelSection, data: str, image: tuple[int, int, int]
) -> Preprocessing:
    """How pictures become inputs: as the embedded or published weights were trained, or else by the
    data set's own figures.
    """
    if section.checkpoint == EMBEDDED:
        return Preprocessing.model_validate(embedded_card()["preprocessing"])
    usual = default_preprocessing(data, image)
    if not section.pretrained:
        return usual
    config = timm.get_pretrained_cfg(section.name)
    if config is None or len(config.mean) != image[0]:
        return usual
    return usual.model_copy(
        update={
            "mean": tuple(config.mean),
            "std": tuple(config.std),
            "interpolation": config.interpolation,
        }
    )


def weights_digest(section: ModelSection) -> str:
    """SHA-256 over the files that `model.checkpoint` names, so that a changed checkpoint is another
    recipe; empty without one.
    """
    if section.checkpoint is None:
        return ""
    path = Path(str(resolved(section).checkpoint))
    if not path.exists():
        raise InputError(
            f"{path}: no such checkpoint; name a .safetensors or .pth file, or a folder that vitrim saved"
        )
    files = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    return " ".join(sha256_file(part) for part in files)


def classes_in(path: Path) -> int:
    """How many classes the checkpoint file was trained for. Errors: InputError if it has no
    classifier of timm's name.
    """
    head = read_weights(path).get("head.weight")
    if head is None:
        raise InputError(
            f"{path}: it has no head.weight, so the number of classes is not known; add --override num_classes=N"
        )
    return int(head.shape[0])


def build(name: str, overrides: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """`timm.create_model`, with its many errors told as one line each."""
    if not timm.is_model(name.split(".")[0]):
        raise InputError(
            f"model.name = {name!r}: timm {timm.__version__} has no such model{_near(name)}"
        )
    if pretrained and not timm.is_model_pretrained(name):
        raise InputError(
            f"model.pretrained: timm has no published weights for {name!r}; name a checkpoint, or set baseline.epochs"
        )
    try:
        return timm.create_model(
            name, pretrained=pretrained, **{key: _tuples(value) for key, value in overrides.items()}
        )
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"model.name = {name!r}: timm cannot build it with {dict(overrides)}: {_first_line(error)}"
        ) from error
    except OSError as error:
        raise InputError(
            f"model.pretrained: no weights for {name!r} could be had ({_first_line(error)}); name a checkpoint"
        ) from error


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Fill `model` from a checkpoint file. Errors: InputError naming the file and the first entry
    that does not fit.
    """
    state, wanted = read_weights(path), model.state_dict()
    way_out = "name the model that was saved (model.name, model.overrides)"
    for key in wanted:
        if key not in state:
            raise InputError(f"{path}: it has no entry {key!r}, which {name} needs; {way_out}")
        if state[key].shape != wanted[key].shape:
            found, shape = list(state[key].shape), list(wanted[key].shape)
            raise InputError(f"{path}: {key} has shape {found}, {name} needs {shape}; {way_out}")
    for key, tensor in state.items():
        if key not in wanted:
            raise InputError(f"{path}: its entry {key!r} is not part of {name}; {way_out}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {key} holds NaN or infinity")
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, nests and wrappers' prefixes taken off. Errors:
    InputError naming the file.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; name a .safetensors or .pth file, or a folder that vitrim saved"
        )
    try:
        found: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(f"{path}: not a whole checkpoint file ({_first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: it holds more than tensors and could run code, so it is not read; save its state_dict()"
        ) from error
    for nest in _NESTS:
        if isinstance(found, dict) and isinstance(found.get(nest), dict):
            found = found[nest]
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(value, Tensor) for value in found.values())
    ):
        raise InputError(f"{path}: no table of tensors in it; save the model's state_dict()")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    try:
        return fold_prune_masks(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _saved(folder: Path, classes: int) -> nn.Module:
    if not (folder / ARCHITECTURE).is_file():
        raise InputError(
            f"{folder}: no {ARCHITECTURE} in this folder; a model that vitrim saved has one"
        )
    model = load(folder)
    if model.architecture.classes != classes:
        raise InputError(
            f"{folder}: the model has {model.architecture.classes} classes, the data set has {classes}; choose one that fits"
        )
    return model


def _tuples(value: Any) -> Any:
    # TOML knows lists only; timm compares sizes as tuples.
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _near(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, timm.list_models(), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
