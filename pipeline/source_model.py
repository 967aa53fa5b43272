"""The dense model of a recipe, built by timm, with the weights of a checkpoint if one is named."""

from __future__ import annotations

import difflib
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
from ..compress.surgery.dead_weight import fold_prune_masks
from ..compress.train.dense import init_position_embedding
from ..core.errors import InputError
from ..core.storage import sha256_file
from .recipe_sections import ModelSection

EMBEDDED = "embedded"
# Where training scripts nest the weights in a checkpoint, averaged weights first.
_NESTED_KEYS = ("model_ema", "state_dict_ema", "state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_BROKEN_FILE = (
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
)
_BUILD_ERRORS = (TypeError, ValueError, AssertionError, KeyError, RuntimeError, AttributeError)


def resolved(section: ModelSection) -> ModelSection:
    """Replace `checkpoint = "embedded"` by the model, overrides and weights in the package.

    Raises:
        InputError: The section names another model than the embedded one.
    """
    if section.checkpoint != EMBEDDED:
        return section
    card = embedded_card()
    given: dict[str, Any] = {}
    if section.name != ModelSection().name:
        given["name"] = section.name
    if section.overrides:
        given["overrides"] = section.overrides
    embedded = {"name": card["model"], "overrides": card["overrides"]}
    for key, value in given.items():
        if value != embedded[key]:
            raise InputError(
                f"model.{key} = {value!r}: the embedded checkpoint is of {embedded[key]!r}; "
                f"leave {key} out, or name another checkpoint"
            )
    return section.model_copy(update={**embedded, "checkpoint": str(WEIGHTS)})


def source_model(section: ModelSection, classes: int) -> nn.Module:
    """Build the model of `[model]` with a head of `classes` classes, in eval mode.

    A checkpoint is a folder that vitrim saved, or a .safetensors or .pth file with timm's names; a
    .pth file is read with `weights_only`.

    Raises:
        InputError: timm does not have the model or rejects an override, or the checkpoint or the
            number of classes does not fit.
    """
    section = resolved(section)
    if section.checkpoint is not None and Path(section.checkpoint).is_dir():
        return _saved(Path(section.checkpoint), classes)
    overrides = dict(section.overrides)
    requested = overrides.setdefault("num_classes", classes)
    if requested != classes:
        raise InputError(
            f"model.overrides.num_classes = {requested}, but the data set has {classes} classes; "
            "leave num_classes out"
        )
    model = build(section.name, overrides, pretrained=section.pretrained)
    if section.checkpoint is not None:
        load_weights(model, Path(section.checkpoint), section.name)
    elif not section.pretrained:
        init_position_embedding(model)
    return model.eval()


def image_of(section: ModelSection) -> tuple[int, int, int]:
    """(channels, height, width) of the model's input; its weights are not created.

    Raises:
        InputError: As for `source_model`.
        UnsupportedModel: vitrim does not support a module of the model.
    """
    section = resolved(section)
    if section.checkpoint is not None and Path(section.checkpoint).is_dir():
        return read_architecture(Path(section.checkpoint) / ARCHITECTURE).image
    with torch.device("meta"):
        return lift(build(section.name, section.overrides)).architecture.image


def preprocessing_of(
    section: ModelSection, data: str, image: tuple[int, int, int]
) -> Preprocessing:
    """The preprocessing of images that the model's weights expect.

    It is that of the embedded or published weights; for other weights, the usual one of the data
    set.
    """
    if section.checkpoint == EMBEDDED:
        return Preprocessing.model_validate(embedded_card()["preprocessing"])
    usual = default_preprocessing(data, image)
    if not section.pretrained:
        return usual
    config = timm.get_pretrained_cfg(section.name)
    if config is None or len(config.mean) != image[0]:
        return usual
    published = {
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "interpolation": config.interpolation,
    }
    return usual.model_copy(update=published)


def weights_digest(section: ModelSection) -> str:
    """SHA-256 of the files of `model.checkpoint`, or "" without a checkpoint.

    It is part of the fingerprint, so that a changed checkpoint repeats the run.
    """
    if section.checkpoint is None:
        return ""
    path = Path(str(resolved(section).checkpoint))
    if not path.exists():
        raise InputError(
            f"{path}: no such checkpoint; name a .safetensors or .pth file, or a folder that "
            "vitrim saved"
        )
    files = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    return " ".join(sha256_file(part) for part in files)


def classes_in(path: Path) -> int:
    """The number of classes of a checkpoint file.

    Raises:
        InputError: The file has no classifier under timm's name.
    """
    head = read_weights(path).get("head.weight")
    if head is None:
        raise InputError(
            f"{path}: it has no head.weight, so the number of classes is unknown; "
            "add --override num_classes=N"
        )
    return int(head.shape[0])


def build(name: str, overrides: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Call `timm.create_model`, with each of its errors as one line.

    Raises:
        InputError: timm does not have the model or its weights, or rejects an override.
    """
    if not timm.is_model(name.split(".")[0]):
        raise InputError(
            f"model.name = {name!r}: timm {timm.__version__} has no such model{_nearest(name)}"
        )
    if pretrained and not timm.is_model_pretrained(name):
        raise InputError(
            f"model.pretrained: timm has no published weights for {name!r}; "
            "name a checkpoint, or set baseline.epochs"
        )
    arguments = {key: _tuples(value) for key, value in overrides.items()}
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except _BUILD_ERRORS as error:
        raise InputError(
            f"model.name = {name!r}: timm cannot build it with {dict(overrides)}: "
            f"{_first_line(error)}"
        ) from error
    except OSError as error:
        raise InputError(
            f"model.pretrained: the weights of {name!r} cannot be downloaded "
            f"({_first_line(error)}); name a checkpoint"
        ) from error


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a checkpoint file into `model`.

    Raises:
        InputError: An entry is missing, unknown, of another shape or not finite; the message names
            the file and the entry.
    """
    state, expected = read_weights(path), model.state_dict()
    way_out = "name the model that was saved (model.name, model.overrides)"
    for key in expected:
        if key not in state:
            raise InputError(f"{path}: it has no entry {key!r}, which {name} needs; {way_out}")
        if state[key].shape != expected[key].shape:
            found, shape = list(state[key].shape), list(expected[key].shape)
            raise InputError(f"{path}: {key} has shape {found}, {name} needs {shape}; {way_out}")
    for key, tensor in state.items():
        if key not in expected:
            raise InputError(f"{path}: its entry {key!r} is not part of {name}; {way_out}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {key} contains NaN or infinity")
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file, without nesting and wrapper prefixes.

    Raises:
        InputError: The file is missing, damaged, not a table of tensors, or could run code.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; name a .safetensors or .pth file, or a folder that "
            "vitrim saved"
        )
    found = _unpack(path)
    for key in _NESTED_KEYS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not _is_state_dict(found):
        raise InputError(f"{path}: it contains no table of tensors; save the model's state_dict()")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    try:
        return fold_prune_masks(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _unpack(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN_FILE as error:
        raise InputError(f"{path}: not a complete checkpoint ({_first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: it contains more than tensors and could run code, so it is not read; "
            "save its state_dict()"
        ) from error


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(tensor, Tensor) for tensor in value.values())


def _saved(folder: Path, classes: int) -> nn.Module:
    if not (folder / ARCHITECTURE).is_file():
        raise InputError(f"{folder}: no {ARCHITECTURE} in this folder; name one that vitrim saved")
    model = load(folder)
    if model.architecture.classes != classes:
        raise InputError(
            f"{folder}: the model has {model.architecture.classes} classes, the data set has "
            f"{classes}; choose a matching one"
        )
    return model


def _tuples(value: Any) -> Any:
    # TOML has lists only; timm compares sizes as tuples.
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
