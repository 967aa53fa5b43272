"""timm's `Attention` with fused qkv."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModel
from ..architecture import AttentionSpec
from .parts import linear, norm, under
from .registry import Piece, handles


@handles("attention", "timm.models.vision_transformer.Attention", "timm.layers.attention.Attention")
def attention(module: Any, path: str) -> Piece[AttentionSpec]:
    """Fused qkv: three equal thirds, each (heads, head_dim)."""
    if getattr(module, "gate", None) is not None:
        raise UnsupportedModel(f"{path}.gate: no rule for gated attention")
    q_norm, k_norm = norm(module.q_norm, f"{path}.q_norm"), norm(module.k_norm, f"{path}.k_norm")
    out_norm = norm(getattr(module, "norm", None), f"{path}.norm")
    return split_qkv(module.qkv, module.proj, module.num_heads, path, q_norm=q_norm, k_norm=k_norm, out_norm=out_norm)


def split_qkv(
    qkv: nn.Module,
    proj: nn.Module,
    heads: int,
    path: str,
    *,
    scale: float | None = None,
    q_norm: Any = None,
    k_norm: Any = None,
    out_norm: Any = None,
) -> Piece[AttentionSpec]:
    """An attention whose q, k and v come from one Linear, laid out (3, heads, head_dim)."""
    fused, out = linear(qkv, f"{path}.qkv"), linear(proj, f"{path}.proj")
    width = fused["weight"].shape[0] // 3 // heads
    if 3 * heads * width != fused["weight"].shape[0]:
        raise UnsupportedModel(f"{path}.qkv: {fused['weight'].shape[0]} outputs are not three equal parts of {heads} heads")
    tensors = under("out", out)
    for kind, tensor in fused.items():
        for name, part in zip("qkv", torch.chunk(tensor, 3), strict=True):
            tensors[f"{name}.{kind}"] = part
    biased = "bias" in fused
    for name, piece in (("q_norm", q_norm), ("k_norm", k_norm), ("out_norm", out_norm)):
        if piece is not None:
            tensors |= piece.under(name)
    spec = AttentionSpec(
        heads=heads,
        qk=width,
        v=width,
        scale=width**-0.5 if scale is None else scale,
        q_bias=biased,
        k_bias=biased,
        v_bias=biased,
        out_bias="bias" in out,
        q_norm=q_norm and q_norm.spec,
        k_norm=k_norm and k_norm.spec,
        out_norm=out_norm and out_norm.spec,
    )
    return Piece(spec, tensors)


