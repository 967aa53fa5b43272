"""A model in a folder of transformers: `config.json`, safetensors and `preprocessor_config.json`.

The package is imported only for such a folder. Nothing is downloaded and no code of the folder is
run: the class is one of transformers', and weights are read from safetensors files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..compress.lift import lift
from ..compress.network.modules.model import CompactModel, build
from ..compress.network.stem_and_head_specs import DataSpec
from ..core import strict_json
from ..core.errors import InputError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# Pillow's numbers of filters, which `resample` states.
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder has a config.json of transformers."""
    path = folder / CONFIG
    return path.is_file() and isinstance(_json(path).get("model_type"), str)


def transformers_model(folder: Path) -> CompactModel:
    """Load the Vision Transformer of a folder that `save_pretrained` wrote.

    Args:
        folder: With safetensors weights. Of a model with a text tower, the vision tower is loaded.

    Returns:
        The lifted network in eval mode, in float32. Its data config is that of
        `preprocessor_config.json`; without one, that of the published weights of the family.

    Raises:
        InputError: transformers is not installed, or cannot load the folder.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{folder}: a model of transformers, which is not installed; "
            "pip install 'transformers>=5'"
        ) from None
    model = _loaded(transformers, folder)
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        model = model.vision_model
    found = lift(model.eval())
    data = _data(folder / PREPROCESSOR, found)
    if data is not None:
        architecture = found.architecture.model_copy(update={"data": data})
        found = build(architecture, found.state_dict())
    return found.eval()


def _loaded(transformers: Any, folder: Path) -> Any:
    import torch

    names = _json(folder / CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names else "AutoModel"
    kind: Any = getattr(transformers, str(name), None)
    if not hasattr(kind, "from_pretrained"):
        raise InputError(f"{folder / CONFIG}: transformers has no model {name!r}")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder}: transformers cannot load it: {reason}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{folder}: the weights have no {missing[0]!r}, which {name} needs; save the whole "
            "model with save_pretrained"
        )
    return model


def _data(path: Path, model: CompactModel) -> DataSpec | None:
    """The data config of a preprocessor file; None if there is none, or it does not fit."""
    if not path.is_file():
        return None
    found = _json(path)
    crop, size = _side(found.get("crop_size")), _side(found.get("size"))
    share = crop / size if found.get("do_center_crop") and crop and size else None
    resample: Any = found.get("resample")
    known = isinstance(resample, int) and 0 <= resample < len(_FILTERS)
    try:
        data = DataSpec(
            mean=found["image_mean"],
            std=found["image_std"],
            interpolation=_FILTERS[resample] if known else "bicubic",
            crop_mode="squash" if share is None else "center",
            crop_pct=1.0 if share is None else min(1.0, share),
        )
    except (KeyError, ValueError):
        raise InputError(
            f"{path}: no mean and std of the channels (image_mean, image_std); repair the file, or "
            "remove it to use those of the published weights"
        ) from None
    return data if len(data.mean) == model.architecture.image[0] else None


def _side(size: Any) -> int | None:
    """The height in pixels of a size, as a number or a dictionary."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = strict_json.parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from None
    return found if isinstance(found, dict) else {}
