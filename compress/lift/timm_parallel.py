"""Converters of timm's blocks with parallel attention and FFN, plain and differential.

Both follow one norm and one projection (Dehghani et al. 2023, "Scaling Vision Transformers to 22
Billion Parameters"). They become two branches of the same step, each with a copy of the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parts import activation, layer_scale, linear, norm, prefixed, softmax_scale
from .registry import TokenLayout, converts
from .timm_attention import attention_piece, differential, no_rope
from .timm_block import Steps, wrap
from .timm_mlp import ffn_piece


@converts("block", "timm.models.vision_transformer.ParallelScalingBlock")
def parallel_scaling(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert x += ls(attn(norm(x)) + mlp(norm(x)))."""
    return _split(module, path, layout)


@converts("block", "timm.models.vision_transformer.DiffParallelScalingBlock")
def diff_parallel_scaling(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert the same with differential attention."""
    return _split(
        module,
        path,
        layout,
        differential=differential(module),
        head_norm=norm(module.sub_norm, f"{path}.sub_norm"),
    )


def _split(
    module: Any, path: str, layout: TokenLayout, *, differential: Any = None, head_norm: Any = None
) -> Steps:
    no_rope(layout, path)
    attention: dict[str, Tensor] = {}
    mlp: dict[str, Tensor] = {}
    for kind, tensor in linear(module.in_proj, f"{path}.in_proj").items():
        mlp[f"fc1.{kind}"], *rows = torch.split(tensor, module.in_split)
        attention |= {f"{name}.{kind}": part for name, part in zip("qkv", rows, strict=True)}
    if module.mlp_bias is not None:
        fused_bias = mlp.get("fc1.bias")
        mlp["fc1.bias"] = module.mlp_bias if fused_bias is None else fused_bias + module.mlp_bias
    if module.out_proj is not None:
        fused = linear(module.out_proj, f"{path}.out_proj")
        columns = module.num_heads * (2 if differential is not None else 1) * module.head_dim
        attention["out.weight"] = fused["weight"][:, :columns]
        mlp["fc2.weight"] = fused["weight"][:, columns:]
        if "bias" in fused:
            attention["out.bias"] = fused["bias"]
    else:
        attention |= prefixed("out", linear(module.attn_out_proj, f"{path}.attn_out_proj"))
        mlp |= prefixed("fc2", linear(module.mlp_out_proj, f"{path}.mlp_out_proj"))
    norms = {
        "q_norm": norm(module.q_norm, f"{path}.q_norm"),
        "k_norm": norm(module.k_norm, f"{path}.k_norm"),
        "head_norm": head_norm,
    }
    core = attention_piece(
        attention,
        module.num_heads,
        softmax_scale(module, path),
        f"{path}.attn",
        norms=norms,
        differential=differential,
    )
    gamma, before = layer_scale(module.ls, f"{path}.ls"), (module.in_norm, f"{path}.in_norm")
    hidden = ffn_piece(mlp, activation(module.mlp_act, f"{path}.mlp_act"))
    branches = ((core, f"{path}.attn"), (hidden, f"{path}.ffn"))
    return [[wrap(piece, name, before=before, gamma=gamma) for piece, name in branches]]
