"""Converters of timm's feed-forward modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..network.architecture import FfnSpec
from .parts import activation, linear, norm, prefixed
from .registry import Piece, converts


@converts("ffn", "timm.layers.mlp.Mlp")
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert fc1, activation, optional norm, fc2."""
    return _assemble(module, path, prefixed("fc1", linear(module.fc1, f"{path}.fc1")))


@converts("ffn", "timm.layers.mlp.GluMlp")
def glu(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert one Linear for gate and value; the gate is its first or its last half."""
    names = ("fc1", "gate") if module.gate_last else ("gate", "fc1")
    tensors = {
        f"{name}.{kind}": part
        for kind, tensor in linear(module.fc1, f"{path}.fc1").items()
        for name, part in zip(names, tensor.chunk(2), strict=True)
    }
    return _assemble(module, path, tensors)


@converts("ffn", "timm.layers.mlp.SwiGLU")
def swiglu(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert separate Linears for gate and value."""
    gate, value = linear(module.fc1_g, f"{path}.fc1_g"), linear(module.fc1_x, f"{path}.fc1_x")
    return _assemble(module, path, prefixed("gate", gate) | prefixed("fc1", value))


def _assemble(module: Any, path: str, tensors: dict[str, Tensor]) -> Piece[FfnSpec]:
    """Add what all of them have: the activation, a norm after it, fc2."""
    tensors = tensors | prefixed("fc2", linear(module.fc2, f"{path}.fc2"))
    inner = norm(getattr(module, "norm", None), f"{path}.norm")
    return ffn_piece(tensors, activation(module.act, f"{path}.act"), inner)


def ffn_piece(tensors: dict[str, Tensor], act: str, inner: Any = None) -> Piece[FfnSpec]:
    """Assemble an FFN from the projections `fc1`, `fc2` and perhaps `gate`, and the inner norm."""
    spec = FfnSpec(
        hidden=tensors["fc1.weight"].shape[0],
        act=act,
        gated="gate.weight" in tensors,
        in_bias="fc1.bias" in tensors,
        gate_bias="gate.bias" in tensors,
        out_bias="fc2.bias" in tensors,
        norm=inner and inner.spec,
    )
    return Piece(spec, tensors | (inner.prefixed("norm") if inner else {}))
