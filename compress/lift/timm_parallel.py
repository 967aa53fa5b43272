"""timm's blocks with attention and FFN side by side behind one norm and one projection (ViT-22B),
plain and differential.

They are split into an attention and an FFN branch of the same step; the norm that they share is
copied to both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parts import activation, layer_scale, linear, norm, under
from .positions import Places
from .registry import handles
from .timm_attention import assemble, differential, no_rope
from .timm_block import Steps, wrap
from .timm_mlp import ffn


@handles("block", "timm.models.vision_transformer.ParallelScalingBlock")
def parallel_scaling(module: Any, path: str, places: Places) -> Steps:
    """x += ls(attn(norm(x)) + mlp(norm(x)))."""
    return _split(module, path, places)


@handles("block", "timm.models.vision_transformer.DiffParallelScalingBlock")
def diff_parallel_scaling(module: Any, path: str, places: Places) -> Steps:
    """The same with differential attention."""
    return _split(
        module,
        path,
        places,
        differential=differential(module),
        head_norm=norm(module.sub_norm, f"{path}.sub_norm"),
    )


def _split(
    module: Any, path: str, places: Places, *, differential: Any = None, head_norm: Any = None
) -> Steps:
    no_rope(places, path)
    attention: dict[str, Tensor] = {}
    mlp: dict[str, Tensor] = {}
    for kind, tensor in linear(module.in_proj, f"{path}.in_proj").items():
        mlp[f"fc1.{kind}"], *rows = torch.split(tensor, module.in_split)
        attention |= {f"{name}.{kind}": part for name, part in zip("qkv", rows, strict=True)}
    if module.mlp_bias is not None:
        mlp["fc1.bias"] = (
            mlp["fc1.bias"] + module.mlp_bias if "fc1.bias" in mlp else module.mlp_bias
        )
    if module.out_proj is not None:
        fused = linear(module.out_proj, f"{path}.out_proj")
        columns = module.num_heads * (2 if differential is not None else 1) * module.head_dim
        attention["out.weight"], mlp["fc2.weight"] = (
            fused["weight"][:, :columns],
            fused["weight"][:, columns:],
        )
        if "bias" in fused:
            attention["out.bias"] = fused["bias"]
    else:
        attention |= under("out", linear(module.attn_out_proj, f"{path}.attn_out_proj"))
        mlp |= under("fc2", linear(module.mlp_out_proj, f"{path}.mlp_out_proj"))
    norms = {
        "q_norm": norm(module.q_norm, f"{path}.q_norm"),
        "k_norm": norm(module.k_norm, f"{path}.k_norm"),
        "head_norm": head_norm,
    }
    core = assemble(
        attention,
        module.num_heads,
        float(module.scale),
        f"{path}.attn",
        norms=norms,
        differential=differential,
    )
    gamma, before = layer_scale(module.ls, f"{path}.ls"), (module.in_norm, f"{path}.in_norm")
    hidden = ffn(mlp, activation(module.mlp_act, f"{path}.mlp_act"))
    return [
        [
            wrap(core, f"{path}.attn", before=before, gamma=gamma),
            wrap(hidden, f"{path}.ffn", before=before, gamma=gamma),
        ]
    ]
