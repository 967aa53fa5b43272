"""timm's plain Vision Transformer and DeiT, with and without class, distillation and register tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ..architecture import Architecture, BranchSpec, HeadSpec, PoolSpec, StemSpec
from .parts import absent, linear, norm, present, under
from .registry import Piece, find, handles, type_name


@handles(
    "model", "timm.models.vision_transformer.VisionTransformer", "timm.models.deit.VisionTransformerDistilled"
)
def vision_transformer(model: Any, path: str) -> Piece[Architecture]:
    """The whole network."""
    distilled = type_name(model).endswith("Distilled")
    patch_embed = model.patch_embed
    stem = patch_stem(patch_embed, "patch_embed")
    prefix, position = tokens(model)
    pre, final, pooled = norm(model.norm_pre, "norm_pre"), norm(model.norm, "norm"), norm(model.fc_norm, "fc_norm")
    if model.attn_pool is not None:
        raise UnsupportedModel(f"attn_pool: no rule for pooling by {type_name(model.attn_pool)}")
    steps, tensors = blocks(model.blocks, "blocks")
    tensors |= stem.under("stem") | present({"prefix": prefix, "position": position})
    for name, piece in (("stem_norm", pre), ("norm", final), ("pool_norm", pooled)):
        if piece is not None:
            tensors |= piece.under(name)
    head = classifier(model.head, "head")
    tensors |= under("head", head)
    if distilled:
        tensors |= under("head_dist", classifier(model.head_dist, "head_dist"))
    height, width = patch_embed.img_size
    architecture = Architecture(
        image=(patch_embed.proj.in_channels, height, width),
        embed=model.embed_dim,
        stem=stem.spec,
        prefix=0 if prefix is None else prefix.shape[0],
        position=position is not None,
        stem_norm=pre and pre.spec,
        steps=steps,
        norm=final and final.spec,
        pool=PoolSpec(kind="distilled" if distilled else pooling(model)),  # type: ignore[arg-type]
        pool_norm=pooled and pooled.spec,
        head=HeadSpec(classes=head["weight"].shape[0], bias="bias" in head),
    )
    return Piece(architecture, tensors)


def patch_stem(patch_embed: Any, path: str) -> Piece[StemSpec]:
    """A patch-embedding convolution whose stride is its kernel."""
    if type_name(patch_embed) != "timm.layers.patch_embed.PatchEmbed":
        raise UnsupportedModel(f"{path}: no rule for {type_name(patch_embed)}")
    if not absent(patch_embed.norm):
        raise UnsupportedModel(f"{path}.norm: no rule for a norm inside the patch embedding")
    conv = patch_embed.proj
    if type(conv) is not nn.Conv2d or conv.stride != conv.kernel_size or conv.padding != (0, 0) or conv.groups != 1 or conv.dilation != (1, 1):
        raise UnsupportedModel(f"{path}.proj: only a plain convolution whose stride is its kernel, not {conv}")
    height, width = conv.kernel_size
    return Piece(StemSpec(patch=(height, width), bias=conv.bias is not None), present({"weight": conv.weight, "bias": conv.bias}))


def tokens(model: Any) -> tuple[Tensor | None, Tensor | None]:
    """Prefix tokens (prefix, embed) with their positions added, and patch positions (patches, embed)."""
    names = ("cls_token", "dist_token", "reg_token")
    found = [token[0] for token in (getattr(model, name, None) for name in names) if token is not None]
    prefix = torch.cat(found) if found else None
    position = None if model.pos_embed is None else model.pos_embed[0]
    if position is not None and prefix is not None and not model.no_embed_class:
        # One table for both: the prefix tokens' part is a constant added to a constant.
        prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
    return prefix, position


def blocks(modules: Any, path: str) -> tuple[tuple[tuple[BranchSpec, ...], ...], dict[str, Tensor]]:
    """All blocks as steps, and their tensors."""
    steps: list[tuple[BranchSpec, ...]] = []
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        where = f"{path}.{number}"
        for step in find("block", module, where)(module, where):
            for position, piece in enumerate(step):
                tensors |= piece.under(f"steps.{len(steps)}.{position}")
            steps.append(tuple(piece.spec for piece in step))
    return tuple(steps), tensors


def pooling(model: Any) -> str:
    """Our name of timm's `global_pool`. Errors: UnsupportedModel."""
    if model.global_pool == "token":
        return "token"
    if model.global_pool == "avg":
        return "mean_all" if getattr(model, "pool_include_prefix", False) else "mean"
    raise UnsupportedModel(f"global_pool = {model.global_pool!r}: no rule")


def classifier(module: nn.Module, path: str) -> dict[str, Tensor]:
    """Tensors of the classifier. Errors: UnsupportedModel when there is none."""
    if absent(module):
        raise UnsupportedModel(f"{path}: the model has no classifier; create it with num_classes")
    return linear(module, path)
