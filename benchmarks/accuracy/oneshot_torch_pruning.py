"""Torch-Pruning's cuts for `benchmarks.accuracy.oneshot`, by the project's recipe for timm."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
import vitrim
from torch import Tensor, nn
from torch.nn import functional as F
from vitrim.compress.masks.groups import SHARED
from vitrim.compress.network.architecture import Architecture, AttentionSpec, FfnSpec
from vitrim.compress.network.count import count_macs
from vitrim.compress.surgery.plan import plan

from ..coverage.torch_pruning_recipe import attention_forward

if TYPE_CHECKING:
    from .oneshot import Method

BISECTIONS = 10
BATCH = 64


def prune_to(
    model: nn.Module,
    method: Method,
    share: float,
    images: Tensor,
    targets: Tensor,
    dense: Architecture,
) -> tuple[nn.Module, float]:
    """Prune heads, FFN and embedding at one ratio, the largest network within a share of the MACs.

    Args:
        model: The timm model; it is copied.
        method: Criterion and scope.
        share: Share of the multiply-adds.
        images: For Taylor, (images, channels, height, width).
        targets: Their labels.
        dense: The architecture of the whole model.

    Returns:
        The pruned model and its share of the multiply-adds.
    """
    gradients = _gradients(model, images, targets) if method.criterion == "taylor" else None
    low, high, best = 0.0, 0.95, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        pruned = _pruned(model, method, ratio, images[:1], gradients)
        found = _macs(dense, pruned) / count_macs(dense)
        if found <= share:
            high, best = ratio, (pruned, found)
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"Torch-Pruning: no ratio meets {share} of the multiply-adds")
    return best


def _gradients(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The gradients of the loss on all images, which every ratio of Taylor ranks by."""
    source = copy.deepcopy(model).eval()
    for part, labels in zip(images.split(BATCH), targets.split(BATCH), strict=True):
        F.cross_entropy(source(part), labels, reduction="sum").backward()
    named = source.named_parameters()
    return {name: each.grad for name, each in named if each.grad is not None}


def _pruned(
    model: nn.Module,
    method: Method,
    ratio: float,
    example: Tensor,
    gradients: dict[str, Tensor] | None,
) -> nn.Module:
    result = copy.deepcopy(model).eval()
    heads: dict[nn.Module, int] = {}
    attentions: list[Any] = []
    for module in result.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            attention: Any = module
            attention.forward = attention_forward.__get__(attention)
            heads[attention.qkv] = attention.num_heads
            attentions.append(attention)
    importance: Any = tp.importance.GroupMagnitudeImportance(p=2)
    if gradients is not None:
        importance = tp.importance.GroupTaylorImportance()
        for name, parameter in result.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
    pruner = tp.pruner.BasePruner(
        result,
        example,
        importance=importance,
        global_pruning=method.scope != "layer",
        isomorphic=method.scope == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=[result.head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
    )
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
    result.zero_grad(set_to_none=True)
    return result


def _macs(dense: Architecture, model: Any) -> int:
    """Multiply-adds of a pruned model, as vitrim counts those of a network of the same widths."""
    heads = {f"blocks.{n}.attn": b.attn.num_heads for n, b in enumerate(model.blocks)}
    units = {f"blocks.{n}.ffn": b.mlp.fc1.out_features for n, b in enumerate(model.blocks)}
    embed = model.patch_embed.proj.out_channels
    kept: dict[str, dict[str, Tensor]] = {"embed": {SHARED: _first(embed, dense.embed)}}
    for branch in dense.branches:
        core = branch.core
        if isinstance(core, AttentionSpec):
            whole = _first(heads[branch.name], core.heads)
            kept.setdefault("head", {})[branch.name] = whole
        elif isinstance(core, FfnSpec):
            whole = _first(units[branch.name], core.hidden)
            kept.setdefault("ffn", {})[branch.name] = whole
    after = plan(dense, vitrim.StructuredMask(kept, scale="original")).architecture
    return count_macs(after.model_copy(update={"last_queries": True}))


def _first(kept: int, size: int) -> Tensor:
    return torch.arange(size) < kept
