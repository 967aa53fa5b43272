"""Torch-Pruning's cuts for `benchmarks.accuracy.oneshot`, by the project's recipe for timm."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch_pruning as tp
import vitrim
from torch import Tensor, nn
from torch.nn import functional as F
from vitrim.compress.masks.groups import SHARED
from vitrim.compress.network.architecture import Architecture, AttentionSpec, FfnSpec
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery.plan import plan

from ..coverage.torch_pruning_recipe import attention_forward

if TYPE_CHECKING:
    from .oneshot_cases import Method

BISECTIONS = 10
BATCH = 64


class BrokenModel(Exception):
    """Torch-Pruning left an attention without heads."""


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

    Raises:
        BrokenModel: Every ratio that meets the share leaves an attention without heads.
    """
    gradients = _gradients(model, images, targets) if method.criterion == "taylor" else None
    low, high, best = 0.0, 0.95, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        try:
            pruned = _pruned(model, method, ratio, images[:1], gradients)
        except BrokenModel:
            high = ratio
            continue
        found = _macs(dense, pruned) / count_macs(dense)
        if found <= share:
            high, best = ratio, (pruned, found)
        else:
            low = ratio
    if best is None:
        raise BrokenModel
    return best


def timm_twin(model: CompactModel) -> nn.Module | None:
    """The timm Vision Transformer with the weights of a plain lifted network, for Torch-Pruning.

    Args:
        model: A network without masks: blocks of an attention and an FFN, no class token or one.

    Returns:
        A model with equal outputs, or None where timm's plain class has no such network.
    """
    architecture = model.architecture
    patch = architecture.stem.patch
    first = [branch.core for step in architecture.steps[:2] for branch in step]
    if len(first) != 2 or not isinstance(first[0], AttentionSpec):
        return None
    if not isinstance(first[1], FfnSpec) or patch is None or architecture.prefix > 1:
        return None
    classes = model.state_dict()["head.weight"].shape[0]
    twin = timm.models.VisionTransformer(
        img_size=architecture.image[1:],
        patch_size=patch[0],
        in_chans=architecture.image[0],
        num_classes=classes,
        embed_dim=architecture.embed,
        depth=len(architecture.steps) // 2,
        num_heads=first[0].heads,
        mlp_ratio=first[1].hidden / architecture.embed,
        class_token=architecture.prefix == 1,
        global_pool="token" if architecture.prefix else "avg",
    ).eval()
    try:
        twin.load_state_dict(_timm_state(model.state_dict(), len(architecture.steps) // 2))
    except (KeyError, RuntimeError):
        return None
    images = torch.randn(2, *architecture.image)
    with torch.no_grad():
        wanted, found = model(images), twin(images)
    return twin if torch.allclose(wanted, found, rtol=1e-4, atol=1e-4) else None


def _timm_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights of a lifted plain network under timm's names."""
    found = {
        "patch_embed.proj.weight": state["stem.weight"],
        "patch_embed.proj.bias": state["stem.bias"],
        "pos_embed": state["position"][None],
        "head.weight": state["head.weight"],
        "head.bias": state["head.bias"],
    }
    last = "norm" if "norm.weight" in state else "pool_norm"
    for kind in ("weight", "bias"):
        found["norm." + kind if last == "norm" else "fc_norm." + kind] = state[f"{last}.{kind}"]
    if "prefix" in state:
        found["cls_token"] = state["prefix"][None]
    for block in range(depth):
        attention, ffn = f"steps.{2 * block}.0.", f"steps.{2 * block + 1}.0."
        for kind in ("weight", "bias"):
            parts = [state[f"{attention}core.{name}.{kind}"] for name in "qkv"]
            names = {
                "norm1": attention + "norm",
                "attn.proj": attention + "core.out",
                "norm2": ffn + "norm",
                "mlp.fc1": ffn + "core.fc1",
                "mlp.fc2": ffn + "core.fc2",
            }
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, source in names.items():
                found[f"blocks.{block}.{name}.{kind}"] = state[f"{source}.{kind}"]
    return found


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
        if attention.num_heads == 0:
            raise BrokenModel
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
