"""The dense model of a recipe, built by timm, with the weights of a checkpoint if one is named."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data.constants import DEFAULT_CROP_PCT
from torch import nn

from ..compress.data.embedded import WEIGHTS, embedded_card
from ..compress.data.named_datasets import default_preprocessing
from ..compress.data.preprocessing import Preprocessing
from ..compress.lift import lift
from ..compress.network.files import ARCHITECTURE, load, read_architecture
from ..compress.network.modules.model import CompactModel
from ..compress.network.modules.model import build as build_compact
from ..compress.network.stem_and_head_specs import DataSpec, HeadSpec
from ..compress.train.dense import init_position_embedding
from ..core.errors import InputError
from ..core.storage import sha256_file
from .checkpoint_file import Entry, folder_kind, is_flax, read_entries, shards_of
from .checkpoint_names import NEW_HEAD, Expected, beginnings, fitted_state, head_classes
from .recipe_sections import ModelSection
from .transformers_folder import is_transformers_folder, transformers_model

EMBEDDED = "embedded"
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

    A checkpoint is a folder that vitrim or transformers saved, or a file with timm's names
    (.safetensors, .pth with `weights_only`, .npz), with any prefixes of wrappers. With `new_head`
    its classifier is replaced by a new one.

    Raises:
        InputError: timm does not have the model or rejects an override, or the checkpoint or the
            number of classes does not fit.
    """
    section = resolved(section)
    if section.checkpoint is not None and Path(section.checkpoint).is_dir():
        return _saved(Path(section.checkpoint), classes, new_head=section.new_head)
    overrides = dict(section.overrides)
    requested = overrides.setdefault("num_classes", classes)
    if requested != classes:
        raise InputError(
            f"model.overrides.num_classes = {requested}, but the data set has {classes} classes; "
            "leave num_classes out"
        )
    model = build(section.name, overrides, pretrained=section.pretrained)
    if section.checkpoint is not None:
        load_weights(model, Path(section.checkpoint), section.name, new_head=section.new_head)
    elif not section.pretrained:
        init_position_embedding(model)
    elif section.new_head:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model.eval()


def require_trained_head(section: ModelSection, epochs: int) -> None:
    """Raise InputError if `new_head` has nothing to start from, or the new head is not trained.

    Args:
        section: The section `[model]`.
        epochs: `baseline.epochs`.
    """
    if not section.new_head:
        return
    if section.checkpoint is None and not section.pretrained:
        raise InputError(
            "model.new_head: without model.checkpoint or model.pretrained the whole model is new; "
            "leave it out"
        )
    if not epochs:
        raise InputError("model.new_head: a new head has to be trained; set baseline.epochs")


def image_of(section: ModelSection) -> tuple[int, int, int]:
    """(channels, height, width) of the model's input; its weights are not created.

    Raises:
        InputError: As for `source_model`.
        UnsupportedModel: vitrim does not support a module of the model.
    """
    section = resolved(section)
    if section.checkpoint is not None and Path(section.checkpoint).is_dir():
        path = Path(section.checkpoint)
        if is_transformers_folder(path):
            return load_folder(path).architecture.image
        return read_architecture(path / ARCHITECTURE).image
    with torch.device("meta"):
        return lift(build(section.name, section.overrides)).architecture.image


def preprocessing_of(
    section: ModelSection,
    data: str,
    image: tuple[int, int, int],
    resize: Literal["squash", "center-crop"] = "squash",
) -> Preprocessing:
    """The preprocessing of images that the model's weights expect.

    It is that of the embedded or published weights; for other weights, the usual one of the data
    set.

    Args:
        section: The section `[model]`.
        data: The name of the data set.
        image: (channels, height, width) of the model's input.
        resize: "center-crop" scales the shorter side to size / crop_pct of the model's data config
            in timm (0.875 where it has none), as timm's evaluation does.

    Returns:
        The preprocessing of evaluation and export.
    """
    if section.checkpoint == EMBEDDED:
        return Preprocessing.model_validate(embedded_card()["preprocessing"])
    usual = default_preprocessing(data, image)
    if resize == "center-crop":
        config = timm.get_pretrained_cfg(section.name) if timm.is_model(section.name) else None
        ratio = DEFAULT_CROP_PCT if config is None else config.crop_pct
        usual = usual.model_copy(update={"resize": resize, "crop_ratio": ratio})
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


def with_preprocessing(model: CompactModel, preprocessing: Preprocessing) -> CompactModel:
    """The same network whose data config states how the images of a run are prepared."""
    squash = preprocessing.resize == "squash"
    data = DataSpec(
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        crop_mode="squash" if squash else "center",
        crop_pct=1.0 if squash else preprocessing.crop_ratio,
    )
    architecture = model.architecture.model_copy(update={"data": data})
    return build_compact(architecture, model.state_dict()).train(model.training)


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
    if path.is_dir():
        files = sorted(part for part in path.rglob("*") if part.is_file())
    else:
        files = shards_of(path)
    return " ".join(sha256_file(part) for part in files)


def classes_in(section: ModelSection) -> int:
    """The number of classes of the checkpoint file of a section.

    Raises:
        InputError: The file has no classifier under timm's name.
    """
    path = Path(str(section.checkpoint))
    entries = read_entries(path)
    if is_flax(entries):
        return _flax_classes(entries, path)
    overrides = {**section.overrides}
    if not overrides.get("num_classes"):
        overrides.pop("num_classes", None)
    with torch.device("meta"):
        expected = Expected.of(build(section.name, overrides), section.name)
    classes = head_classes(entries, expected, path)
    if classes is None:
        raise _without_head(path, f"{expected.classifiers[0]}.weight", entries)
    return classes


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


def load_weights(model: nn.Module, path: Path, name: str, *, new_head: bool = False) -> None:
    """Load a checkpoint file into `model`.

    Args:
        model: A timm model.
        path: The checkpoint.
        name: The name of the model, for messages.
        new_head: Keep the classifier of `model`.

    Raises:
        InputError: An entry is missing, unknown, of another shape or type, or not finite; the
            message names the file and the entry.
    """
    entries = read_entries(path)
    expected = Expected.of(model, name)
    if is_flax(entries):
        if not new_head:
            _require_flax_classes(entries, expected, path)
        entries = _from_flax(model, expected, path)
    model.load_state_dict(fitted_state(entries, expected, path, new_head=new_head))


def _require_flax_classes(entries: list[Entry], expected: Expected, path: Path) -> None:
    needed = [each.shape[0] for key, each in expected.state.items() if expected.is_head(key)]
    if needed and (classes := _flax_classes(entries, path)) != needed[0]:
        raise InputError(
            f"{path}: its head has {classes} classes, and {needed[0]} are needed; {NEW_HEAD}"
        )


def _from_flax(model: nn.Module, expected: Expected, path: Path) -> list[Entry]:
    """Convert a checkpoint of Google's Vision Transformers, with timm's own rules."""
    head = {key: each.clone() for key, each in expected.state.items() if expected.is_head(key)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # What the rules do not set is found by it.
    try:
        model.load_pretrained(str(path))  # type: ignore[operator]
    except _BUILD_ERRORS as error:
        raise InputError(
            f"{path}: timm cannot convert it to {expected.name} ({_first_line(error)}); "
            "name the model that was saved (model.name, model.overrides)"
        ) from error
    found = [
        Entry((), key, tensor.detach().clone())
        for key, tensor in model.state_dict().items()
        if not (tensor.is_floating_point() and bool(tensor.isnan().any()))
    ]
    model.load_state_dict(head, strict=False)
    return found


def _flax_classes(entries: list[Entry], path: Path) -> int:
    for entry in entries:
        if entry.name.endswith("head/kernel"):
            return int(entry.tensor.shape[-1])
    raise _without_head(path, "head/kernel", entries)


def _without_head(path: Path, name: str, entries: list[Entry]) -> InputError:
    return InputError(
        f"{path}: it has no {name}, so the number of classes is unknown; its entries begin with "
        f"{beginnings(entries)}; add --override num_classes=N"
    )


def require_saved(folder: Path) -> None:
    """Raise InputError, with what to name instead, if `load_folder` cannot load this folder."""
    if (folder / ARCHITECTURE).is_file() or is_transformers_folder(folder):
        return
    if kind := folder_kind(folder):
        raise InputError(f"{folder}: {kind}")


def load_folder(folder: Path) -> CompactModel:
    """Load a network that vitrim saved, or a Vision Transformer that transformers saved.

    Raises:
        InputError: The folder is neither, or damaged.
        UnsupportedModel: A module of transformers has no rule; the message names its path.
    """
    saved = (folder / ARCHITECTURE).is_file()
    return (
        load(folder) if saved or not is_transformers_folder(folder) else transformers_model(folder)
    )


def _saved(folder: Path, classes: int, *, new_head: bool) -> nn.Module:
    require_saved(folder)
    model = load_folder(folder)
    if new_head:
        return with_new_head(model, classes)
    if model.architecture.classes != classes:
        raise InputError(
            f"{folder}: the model has {model.architecture.classes} classes, the data set has "
            f"{classes}; choose a matching one; {NEW_HEAD}"
        )
    return model


def with_new_head(model: CompactModel, classes: int) -> CompactModel:
    """The same network with a new linear classifier."""
    head = model.architecture.head or HeadSpec(classes=classes)
    changes = {"head": head.model_copy(update={"classes": classes})}
    architecture = model.architecture.model_copy(update=changes)
    fresh = CompactModel(architecture)
    state = model.state_dict()
    for name in ("head", "head_dist"):
        layer = getattr(fresh, name)
        if layer is not None:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            state |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    return build_compact(architecture, state)


def _tuples(value: Any) -> Any:
    # TOML has lists only; timm compares sizes as tuples.
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def with_last_queries(model: CompactModel) -> CompactModel:
    """The same network with `last_queries`: the last block computes only what the head reads.

    This is exact, and every artifact does it, so that multiply-adds are comparable.
    """
    last_queries = model.architecture.pooled_prefix > 0
    architecture = model.architecture.model_copy(update={"last_queries": last_queries})
    return build_compact(architecture, model.state_dict())
