"""What the exporter reads from a torch module: outputs, image size, name and provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...compress.lift import read
from ...compress.lift.wrappers import innermost
from ...compress.network.count import count_macs
from ...compress.network.named_outputs import NamedOutputs
from ...core.errors import InputError, UnsupportedModel
from ..manifest import Provenance
from ..parity import side_by_side

Array = NDArray[Any]


def torch_outputs(model: nn.Module, images: Array) -> Array:
    """Return float32 logits (count, classes) of all images, or several outputs side by side.

    Modules inside that torch.compile has wrapped run as they are: compiled kernels would be built
    for these few images only, and are not what is exported.

    Raises:
        InputError: The module does not return logits.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for first in range(0, len(images), 64):
            logits = model(torch.from_numpy(images[first : first + 64]).to(device))
            if isinstance(model, NamedOutputs):
                found.append(side_by_side([output.float().cpu().numpy() for output in logits]))
                continue
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
                unpooled = getattr(model, "global_pool", None) == ""
                raise InputError(
                    f"{type(model).__name__} does not return logits (batch, classes); "
                    + (
                        "name its outputs: outputs=['patches']"
                        if unpooled
                        else "wrap it so that it does"
                    )
                )
            found.append(logits.float().cpu().numpy())
    return np.concatenate(found)


def image_shape(
    model: nn.Module, image: tuple[int, int, int] | None = None
) -> tuple[int, int, int]:
    """Return the (channels, height, width) of a model's input.

    Raises:
        InputError: Neither the model nor `image` states it.
    """
    if image is not None:
        if len(image) != 3 or any(not isinstance(size, int) or size < 1 for size in image):
            raise InputError(f"image {image}: give (channels, height, width), three sizes above 0")
        return image
    model = innermost(model)
    architecture = getattr(model, "architecture", None)
    if architecture is not None and hasattr(architecture, "image"):
        channels, height, width = architecture.image
        return int(channels), int(height), int(width)
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None and hasattr(getattr(embed, "proj", None), "in_channels"):
        return int(embed.proj.in_channels), int(size[0]), int(size[1])
    config: Any = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if config and config.get("input_size"):
        channels, height, width = config["input_size"]
        return int(channels), int(height), int(width)
    raise InputError(
        f"{type(model).__name__} does not state its image size; "
        "pass image=(channels, height, width)"
    )


def name_of(model: nn.Module) -> str:
    """Return the default name of an artifact."""
    config: Any = getattr(model, "default_cfg", None)
    return str((config or {}).get("architecture") or type(model).__name__)


def provenance_of(model: nn.Module, details: Mapping[str, str]) -> Provenance:
    """Return a module's class, the digest of its weights and its counts, with further entries."""
    try:
        macs: int | None = count_macs(read(model, proof=False).spec)
    except UnsupportedModel:
        macs = None
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return Provenance(
        source=kind,
        weights_sha256=weights_sha256(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        details={str(key): str(value) for key, value in details.items()},
    )


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of a module's state, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
