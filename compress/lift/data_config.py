"""How the images of a source model are prepared, as far as the model states it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import nn

from ..network.architecture import DataSpec
from .registry import type_name

# timm's default where a configuration has none.
_CROP_PCT = 0.875
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_SQUASH = {"crop_mode": "squash", "crop_pct": 1.0}
# By package, for libraries whose models do not state it: what the published weights were made with.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "transformers.models.vit": _HALF | _SQUASH | {"interpolation": "bilinear"},
    "transformers.models.deit": _IMAGENET | {"crop_pct": _CROP_PCT},
    "transformers.models.dinov2": _IMAGENET | {"crop_pct": _CROP_PCT},
    "transformers.models.dinov2_with_registers": _IMAGENET | {"crop_pct": _CROP_PCT},
    "transformers.models.dinov3_vit": _IMAGENET | _SQUASH | {"interpolation": "bilinear"},
    "transformers.models.siglip": _HALF | _SQUASH,
    "transformers.models.clip": _CLIP,
    "torchvision.models": _IMAGENET | {"crop_pct": _CROP_PCT, "interpolation": "bilinear"},
}


def data_of(model: nn.Module, channels: int) -> DataSpec | None:
    """Return the data config of a source model; None if it is unknown.

    Args:
        model: A model without wrappers. timm's models state it in `pretrained_cfg`; for others it
            is that of the published weights of their family.
        channels: Number of channels of an image.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("mean"):
        config = _PUBLISHED.get(type_name(model).rpartition(".")[0].rpartition(".")[0])
    if config is None:
        return None
    known = {name: config.get(name) for name in DataSpec.model_fields}
    known["crop_pct"] = known["crop_pct"] or (
        _CROP_PCT if config is getattr(model, "pretrained_cfg", None) else 1.0
    )
    try:
        found = DataSpec.model_validate({name: value for name, value in known.items() if value})
    except ValidationError:
        return None
    return found if len(found.mean) == channels else None
