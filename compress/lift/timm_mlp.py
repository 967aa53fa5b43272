"""timm's feed-forward modules."""

from __future__ import annotations

from typing import Any

from ..architecture import FfnSpec
from .parts import activation, linear, norm, under
from .registry import Piece, handles


@handles("ffn", "timm.layers.mlp.Mlp")
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """fc1, activation, optional norm, fc2."""
    fc1, fc2 = linear(module.fc1, f"{path}.fc1"), linear(module.fc2, f"{path}.fc2")
    inner = norm(getattr(module, "norm", None), f"{path}.norm")
    spec = FfnSpec(
        hidden=fc1["weight"].shape[0],
        act=activation(module.act, f"{path}.act"),  # type: ignore[arg-type]
        in_bias="bias" in fc1,
        out_bias="bias" in fc2,
        norm=inner and inner.spec,
    )
    return Piece(spec, under("fc1", fc1) | under("fc2", fc2) | (inner.under("norm") if inner else {}))
