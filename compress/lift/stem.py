"""Converters of patch embeddings: convolutions, into which batch norms are folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import ConvSpec, StemSpec
from .parts import activation, not_none, prefixed
from .registry import Piece, plain_type, type_name

Pair = tuple[int, int]


def conv_stem(module: nn.Module, path: str) -> Piece[StemSpec]:
    """Convert a convolution, or a Sequential that ends in one.

    The (nested) Sequential consists of convolutions, batch norms and activations. The tensors have
    their names in `CompactModel`: `stem.weight`, `before.0.conv.weight`...
    """
    return _read(_flatten(module, path), module, path)


def sequence_stem(module: nn.Module, path: str) -> list[Piece[StemSpec]]:
    """Return the possible readings of a stem whose parts are attributes, in their order.

    Activations are applied where they are defined. If there is only one, a second reading applies
    it after every convolution but the last, since one module may be called several times. A norm
    over tokens named `norm` is not part of the stem.
    """
    layers = [
        (f"{path}.{name}", child)
        for name, child in module.named_children()
        if isinstance(child, nn.Conv2d | nn.BatchNorm2d | nn.Sequential)
        or (name != "norm" and not any(True for _ in child.parameters()))
    ]
    flat = [
        item
        for where, child in layers
        for item in _flatten(child, where)
        if type(item[1]) is not nn.Dropout
    ]
    readings = [_read(flat, module, path)]
    acts = [item for item in flat if not isinstance(item[1], nn.Conv2d | nn.BatchNorm2d)]
    if len(acts) == 1:
        convs = [item for item in flat if item not in acts]
        repeated: list[tuple[str, nn.Module]] = []
        for where, layer in convs:
            if isinstance(layer, nn.Conv2d) and repeated:
                repeated.append(acts[0])
            repeated.append((where, layer))
        readings.append(_read(repeated, module, path))
    return readings


@dataclass
class _Group:
    """A convolution with the batch norm and the activation that follow it."""

    path: str
    conv: nn.Conv2d
    batch_norm: nn.BatchNorm2d | None = None
    act: str = "identity"


def _read(layers: list[tuple[str, nn.Module]], module: nn.Module, path: str) -> Piece[StemSpec]:
    groups = _groups(layers)
    if not groups or groups[-1].act != "identity":
        raise UnsupportedModel(
            f"{path}: a stem must end in a convolution, this one is {type_name(module)}"
        )
    before: list[ConvSpec] = []
    tensors: dict[str, Tensor] = {}
    for number, group in enumerate(groups[:-1]):
        weights, geometry = _conv(group)
        options = {"bias": "bias" in weights, "act": group.act}
        before.append(ConvSpec(channels=group.conv.out_channels, **geometry, **options))
        tensors |= prefixed(f"before.{number}.conv", weights)
    weights, geometry = _conv(groups[-1])
    spec = StemSpec(
        patch=geometry["kernel"],
        stride=None if geometry["stride"] == geometry["kernel"] else geometry["stride"],
        padding=geometry["padding"],
        bias="bias" in weights,
        before=tuple(before),
    )
    return Piece(spec, tensors | prefixed("stem", weights))


def _groups(layers: list[tuple[str, nn.Module]]) -> list[_Group]:
    groups: list[_Group] = []
    for where, layer in layers:
        if plain_type(layer) is nn.Conv2d:
            groups.append(_Group(where, cast("nn.Conv2d", layer)))
            continue
        if not groups or groups[-1].act != "identity":
            raise UnsupportedModel(f"{where}: no rule for {type_name(layer)} in a stem")
        if plain_type(layer) is nn.BatchNorm2d and groups[-1].batch_norm is None:
            groups[-1].batch_norm = cast("nn.BatchNorm2d", layer)
        else:
            groups[-1].act = activation(layer, where)
    return groups


def linear_stem(
    weight: Tensor, bias: Tensor | None, patch: Pair, channels: int, *, channels_last: bool
) -> Piece[StemSpec]:
    """Convert a Linear on flattened patches to a convolution whose stride is its kernel.

    Args:
        weight: (embed, height * width * channels of a patch).
        bias: (embed,), or None.
        patch: Height and width of a patch, in pixels.
        channels: Number of channels of the image.
        channels_last: Whether the channels of a pixel are adjacent in a flattened patch.

    Returns:
        The stem, with `stem.weight` of shape (embed, channels, height, width).
    """
    shape = (*patch, channels) if channels_last else (channels, *patch)
    kernel = torch.unflatten(weight, 1, shape)
    if channels_last:
        kernel = kernel.permute(0, 3, 1, 2)
    return Piece(
        StemSpec(patch=patch, bias=bias is not None),
        not_none({"stem.weight": kernel, "stem.bias": bias}),
    )


def _flatten(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    # torchvision's Conv2dNormActivation is a subclass of Sequential that only fills it.
    torchvision_sequential = "torchvision.ops.misc.Conv2dNormActivation"
    if plain_type(module) is nn.Sequential or type_name(module) == torchvision_sequential:
        found = []
        for name, child in module.named_children():
            found += _flatten(child, f"{path}.{name}")
        return found
    return [] if isinstance(module, nn.Identity) else [(path, module)]


def _conv(group: _Group) -> tuple[dict[str, Tensor], dict[str, Any]]:
    conv = group.conv
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    plain = (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and padding != "same"
    )
    if not plain:
        raise UnsupportedModel(
            f"{group.path}: only a plain convolution without groups or dilation, not {conv}"
        )
    weights = not_none({"weight": conv.weight, "bias": conv.bias})
    if group.batch_norm is not None:
        weights = _folded(weights, group.batch_norm, group.path)
    return weights, {"kernel": conv.kernel_size, "stride": conv.stride, "padding": padding}


def _folded(weights: dict[str, Tensor], norm: nn.BatchNorm2d, path: str) -> dict[str, Tensor]:
    """Fold a batch norm into a convolution: with running statistics it is affine per channel."""
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedModel(
            f"{path}: a batch norm without running statistics depends on the batch"
        )
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = (weights["bias"] if "bias" in weights else torch.zeros_like(factor)) - norm.running_mean
    bias = bias * factor
    if norm.bias is not None:
        bias = bias + norm.bias
    return {"weight": weights["weight"] * factor[:, None, None, None], "bias": bias}
