"""Torch-Pruning 1.6.1's own recipe for timm's Vision Transformers, for other names too.

It is examples/transformers/prune_timm_vit.py of that project: heads, FFN and embedding at half, the
classifier unchanged. The recipe replaces the forward of timm's attention, whose reshape assumes the
full width; this version also takes the keyword arguments that timm passes today, and replaces the
forward of every attention with `qkv` and `num_heads`.
"""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F


def attention_forward(self: Any, x: Tensor, *unused: Any, **ignored: Any) -> Tensor:
    """The recipe's forward of a timm attention."""
    batch, tokens, _ = x.shape
    qkv = (
        self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    )
    q, k, v = qkv.unbind(0)
    q, k = self.q_norm(q), self.k_norm(k)
    y = F.scaled_dot_product_attention(q, k, v)
    y = y.transpose(1, 2).reshape(batch, tokens, -1)
    out: Tensor = self.proj_drop(self.proj(y))
    return out


def prune_half(model: nn.Module, inputs: Tensor) -> None:
    """Prune in place; errors of the library are passed on."""
    heads: dict[nn.Module, int] = {}
    replaced: list[Any] = []
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            attention: Any = module
            if type(module).__name__ == "Attention" and hasattr(module, "q_norm"):
                attention.forward = attention_forward.__get__(attention)
            heads[attention.qkv] = attention.num_heads
            replaced.append(attention)
    pruner = tp.pruner.MetaPruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        global_pruning=False,
        pruning_ratio=0.5,
        ignored_layers=[
            classifier
            for name in ("head", "head_dist")
            if isinstance(classifier := getattr(model, name, None), nn.Linear)
        ],
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=0.5,
        prune_head_dims=False,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in replaced:
        module.num_heads = pruner.num_heads[module.qkv]
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        if hasattr(module, "attn_dim"):
            module.attn_dim = module.num_heads * module.head_dim
