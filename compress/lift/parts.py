"""Converters of small parts: norms, linear layers, activations and layer scale."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import NormSpec
from .registry import Piece, converts, find_converter, plain_type, type_name

_ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.ReLU6": "relu6",
    "torch.nn.modules.activation.Hardswish": "hardswish",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
}


def activation(module: nn.Module, path: str) -> str:
    """Return our name of an activation module, or raise UnsupportedModel."""
    name = _ACTIVATIONS.get(type_name(module))
    if name is None:
        raise UnsupportedModel(f"{path}: no rule for activation {type_name(module)}")
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


def absent(module: nn.Module | None) -> bool:
    """Whether a sub-module is missing or does nothing."""
    return module is None or isinstance(module, nn.Identity)


def norm(module: nn.Module | None, path: str) -> Piece[NormSpec] | None:
    """Convert a norm of any known type; None if there is none."""
    if module is None or absent(module):
        return None
    piece: Piece[NormSpec] = find_converter("norm", module, path)(module, path)
    return piece


@converts(
    "norm",
    "torch.nn.modules.normalization.LayerNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
)
def layer_norm(module: nn.LayerNorm, path: str) -> Piece[NormSpec]:
    """Convert a LayerNorm over the last dimension."""
    del path
    return _norm("layer", module, module.eps)


@converts(
    "norm",
    "timm.layers.norm.RmsNorm",
    "timm.layers.norm.RmsNormFp32",
    "torch.nn.modules.normalization.RMSNorm",
)
def rms_norm(module: nn.Module, path: str) -> Piece[NormSpec]:
    """Convert an RMSNorm over the last dimension."""
    eps = module.eps
    if eps is None:
        raise UnsupportedModel(f"{path}: RMSNorm without a stated eps depends on the input's type")
    return _norm("rms", module, float(cast("float", eps)))


def _norm(kind: str, module: nn.Module, eps: float) -> Piece[NormSpec]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = module.normalized_shape
    spec = NormSpec(
        kind=kind,
        width=shape[0],  # type: ignore[index]
        eps=eps,
        weight=weight is not None,
        bias=bias is not None,
    )
    return Piece(spec, not_none({"weight": weight, "bias": bias}))


def not_none(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the entries that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def linear(module: nn.Module, path: str) -> dict[str, Tensor]:
    """Return weight and bias of a plain Linear, or raise UnsupportedModel for another type."""
    if plain_type(module) is not nn.Linear:
        raise UnsupportedModel(f"{path}: {type_name(module)} where a Linear was expected")
    layer = cast("nn.Linear", module)
    return not_none({"weight": layer.weight, "bias": layer.bias})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with `prefix.` before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def softmax_scale(module: Any, path: str) -> float | None:
    """Return the factor of an attention's scores; None: 1 / sqrt(query columns of a head).

    timm's fused attention does not read `module.scale`.
    """
    scale = getattr(module, "scale", None)
    if scale is None or getattr(module, "fused_attn", False):
        return None
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError):
        raise UnsupportedModel(
            f"{path}.scale: one number has a rule, not {_described(scale)}"
        ) from None


def _described(value: object) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"


def layer_scale(module: nn.Module | None, path: str) -> Tensor | None:
    """Return γ of a LayerScale; None if there is none."""
    if module is None or absent(module):
        return None
    gamma = getattr(module, "gamma", None)
    if not isinstance(gamma, Tensor):
        raise UnsupportedModel(f"{path}: no rule for layer scale {type_name(module)}")
    return gamma
