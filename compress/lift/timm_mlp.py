"""timm's feed-forward modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..network.architecture import FfnSpec
from .parts import activation, linear, norm, under
from .registry import Piece, handles


@handles("ffn", "timm.layers.mlp.Mlp")
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """fc1, activation, optional norm, fc2."""
    return assemble(module, path, under("fc1", linear(module.fc1, f"{path}.fc1")))


@handles("ffn", "timm.layers.mlp.GluMlp")
def glu(module: Any, path: str) -> Piece[FfnSpec]:
    """One Linear for both halves; the gate is the first of them, or the last."""
    names = ("fc1", "gate") if module.gate_last else ("gate", "fc1")
    tensors = {
        f"{name}.{kind}": part
        for kind, tensor in linear(module.fc1, f"{path}.fc1").items()
        for name, part in zip(names, tensor.chunk(2), strict=True)
    }
    return assemble(module, path, tensors)


@handles("ffn", "timm.layers.mlp.SwiGLU")
def swiglu(module: Any, path: str) -> Piece[FfnSpec]:
    """Separate Linears for gate and value."""
    gate, value = linear(module.fc1_g, f"{path}.fc1_g"), linear(module.fc1_x, f"{path}.fc1_x")
    return assemble(module, path, under("gate", gate) | under("fc1", value))


def assemble(module: Any, path: str, tensors: dict[str, Tensor]) -> Piece[FfnSpec]:
    """What all of them share: the activation, a norm behind it, fc2."""
    tensors = tensors | under("fc2", linear(module.fc2, f"{path}.fc2"))
    inner = norm(getattr(module, "norm", None), f"{path}.norm")
    return ffn(tensors, activation(module.act, f"{path}.act"), inner)


def ffn(tensors: dict[str, Tensor], act: str, inner: Any = None) -> Piece[FfnSpec]:
    """An FFN from its projections `fc1`, `fc2` and perhaps `gate`."""
    spec = FfnSpec(
        hidden=tensors["fc1.weight"].shape[0],
        act=act,
        gated="gate.weight" in tensors,
        in_bias="fc1.bias" in tensors,
        gate_bias="gate.bias" in tensors,
        out_bias="fc2.bias" in tensors,
        norm=inner and inner.spec,
    )
    return Piece(spec, tensors | (inner.under("norm") if inner else {}))
