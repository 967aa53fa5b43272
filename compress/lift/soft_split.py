"""Converter of T2T-ViT's stem: soft splits with small transformer layers, and a projection.

The parts are found by their names in the published code: soft_split0, attention1, soft_split1,
attention2, ..., project. What the module computes is checked by the caller, which runs it.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import FfnSpec, SoftSplitSpec, StemSpec
from .parts import activation, linear, norm, prefixed, softmax_scale
from .registry import Piece, plain_type, type_name
from .timm_mlp import ffn_piece

Pair = tuple[int, int]


def has_soft_splits(module: nn.Module) -> bool:
    """Whether a stem cuts windows with Unfold modules of the published names."""
    return isinstance(getattr(module, "soft_split0", None), nn.Unfold)


def soft_split_stem(module: nn.Module, path: str) -> Piece[StemSpec]:
    """Convert T2T-ViT's tokens-to-token module.

    The last soft split and the projection are one convolution with the windows as its kernels.
    The tensors have their names in `CompactModel`: `before.0.qkv.weight`, ..., `stem.weight`.

    Raises:
        UnsupportedModel: A part has no rule; the message names its path.
    """
    splits = _soft_splits(module, path)
    layers: list[SoftSplitSpec] = []
    tensors: dict[str, Tensor] = {}
    for number, geometry in enumerate(splits[:-1]):
        name = f"attention{number + 1}"
        part = getattr(module, name, None)
        if not isinstance(part, nn.Module):
            raise UnsupportedModel(f"{path}: no {name} after soft_split{number}")
        piece = _layer(part, f"{path}.{name}", geometry)
        layers.append(piece.spec)
        tensors |= piece.prefixed(f"before.{number}")
    project = getattr(module, "project", None)
    if not isinstance(project, nn.Module):
        raise UnsupportedModel(f"{path}: no project, the Linear after the last soft split")
    weights, geometry = linear(project, f"{path}.project"), splits[-1]
    kernel = geometry["kernel"]
    weight = weights["weight"]
    if weight.shape[1] % math.prod(kernel):
        raise UnsupportedModel(
            f"{path}.project: {weight.shape[1]} inputs, no multiple of {math.prod(kernel)} pixels"
        )
    weights["weight"] = torch.unflatten(weight, 1, (-1, *kernel))
    spec = StemSpec(
        patch=kernel,
        stride=None if geometry["stride"] == kernel else geometry["stride"],
        padding=geometry["padding"],
        bias="bias" in weights,
        before=tuple(layers),
    )
    return Piece(spec, tensors | prefixed("stem", weights))


def _soft_splits(module: nn.Module, path: str) -> list[dict[str, Pair]]:
    """Kernel, stride and padding of soft_split0, soft_split1, ... in order."""
    found: list[dict[str, Pair]] = []
    while (split := getattr(module, f"soft_split{len(found)}", None)) is not None:
        where = f"{path}.soft_split{len(found)}"
        if plain_type(split) is not nn.Unfold:
            raise UnsupportedModel(f"{where}: {type_name(split)} where an Unfold was expected")
        if _pair(split.dilation) != (1, 1):
            raise UnsupportedModel(f"{where}: a window with dilation {split.dilation} has no rule")
        names = {"kernel": "kernel_size", "stride": "stride", "padding": "padding"}
        found.append({ours: _pair(getattr(split, theirs)) for ours, theirs in names.items()})
    return found


def _layer(module: Any, path: str, geometry: dict[str, Pair]) -> Piece[SoftSplitSpec]:
    """One soft split and its transformer layer: softmax attention, or a performer's."""
    options: dict[str, Any] = {}
    if isinstance(getattr(module, "kqv", None), nn.Linear):
        attention, tensors = module, _performer(module, path)
        options["features"] = len(tensors["features"])
        options["features_eps"] = float(getattr(module, "epsilon", 0.0))
        where = path
    else:
        attention, where = getattr(module, "attn", None), f"{path}.attn"
        if not isinstance(getattr(attention, "qkv", None), nn.Linear):
            raise UnsupportedModel(
                f"{path}: no rule for {type_name(module)} after a soft split (it has no kqv, "
                "and no attn.qkv)"
            )
        tensors, options["scale"] = _softmax(attention, where)
    tensors |= prefixed("out", linear(attention.proj, f"{where}.proj"))
    ffn = _ffn(module.mlp, f"{path}.mlp")
    tensors |= ffn.prefixed("ffn")
    specs: dict[str, Any] = {}
    for ours, theirs in (("norm", "norm1"), ("ffn_norm", "norm2")):
        piece = norm(getattr(module, theirs, None), f"{path}.{theirs}")
        if piece is None:
            raise UnsupportedModel(f"{path}: no {theirs}")
        specs[ours] = piece.spec
        tensors |= piece.prefixed(ours)
    spec = SoftSplitSpec(
        channels=tensors["out.weight"].shape[0],
        **cast("dict[str, Any]", geometry),
        **specs,
        qkv_bias="qkv.bias" in tensors,
        out_bias="out.bias" in tensors,
        ffn=ffn.spec,
        **options,
    )
    return Piece(spec, tensors)


def _performer(module: Any, path: str) -> dict[str, Tensor]:
    """Weights of a linear attention, whose keys come before its queries."""
    features = getattr(module, "w", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UnsupportedModel(f"{path}: no matrix w of random features beside kqv")
    weights = linear(module.kqv, f"{path}.kqv")
    if weights["weight"].shape[0] != 3 * features.shape[1]:
        raise UnsupportedModel(
            f"{path}.kqv: {weights['weight'].shape[0]} outputs where three times "
            f"{features.shape[1]} were expected"
        )
    ordered = {}
    for name, tensor in weights.items():
        k, q, v = tensor.chunk(3)
        ordered[name] = torch.cat([q, k, v])
    return {"features": features, **prefixed("qkv", ordered)}


def _softmax(module: Any, path: str) -> tuple[dict[str, Tensor], float]:
    """Weights and scale of a softmax attention of one head."""
    heads = getattr(module, "num_heads", 1)
    if heads != 1:
        raise UnsupportedModel(f"{path}: {heads} heads after a soft split; one has a rule")
    weights = linear(module.qkv, f"{path}.qkv")
    scale = softmax_scale(module, path)
    if scale is None:
        scale = (weights["weight"].shape[0] // 3) ** -0.5
    return prefixed("qkv", weights), scale


def _ffn(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert fc2(act(fc1(x))) with these names, or a Sequential of Linear, activation, Linear."""
    if plain_type(module) is nn.Sequential:
        layers = [
            (f"{path}.{name}", layer)
            for name, layer in module.named_children()
            if type(layer) is not nn.Dropout
        ]
    else:
        names = ("fc1", "act", "fc2")
        layers = [(f"{path}.{name}", getattr(module, name, None)) for name in names]
    if len(layers) != 3 or not all(isinstance(layer, nn.Module) for _, layer in layers):
        raise UnsupportedModel(
            f"{path}: {type_name(module)} where Linear, activation, Linear was expected"
        )
    (one, first), (two, act), (three, last) = cast("list[tuple[str, nn.Module]]", layers)
    tensors = prefixed("fc1", linear(first, one)) | prefixed("fc2", linear(last, three))
    return ffn_piece(tensors, activation(act, two))


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
