"""Converters of timm's models: VisionTransformer, DeiT, EVA, BEiT and relative positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, PoolSpec, StemSpec
from .assembly import assemble, classifier, lift_blocks
from .parts import absent
from .registry import Piece, TokenLayout, converts, type_name
from .stem import conv_stem
from .timm_bias import relative_bias
from .timm_pool import attention_pool
from .timm_rope import rope_tables


@converts("model", "timm.models.vision_transformer.VisionTransformer")
def vision_transformer(model: Any, path: str) -> Piece[Architecture]:
    """Convert a VisionTransformer with any of its options."""
    return _network(
        model,
        layouts=[_layout(model)] * len(model.blocks),
        pool=pooling(model),
        head=classifier(model.head, "head"),
    )


@converts("model", "timm.models.deit.VisionTransformerDistilled")
def distilled(model: Any, path: str) -> Piece[Architecture]:
    """Convert a DeiT with class and distillation token, whose two logits are averaged."""
    if model.distilled_training and model.training:
        raise UnsupportedModel(
            "distilled_training: a model with two outputs has no rule; "
            "call set_distilled_training(False)"
        )
    second = None if absent(model.head_dist) else (model.head_dist, "head_dist")
    head = classifier(model.head, "head", second)
    return _network(
        model,
        layouts=[_layout(model)] * len(model.blocks),
        pool=Piece(PoolSpec(kind="distilled")),
        head=head,
        pool_norm=False,
    )


@converts("model", "timm.models.eva.Eva")
def eva(model: Any, path: str) -> Piece[Architecture]:
    """Convert an EVA, whose rope belongs to the model."""
    layout = _layout(model)
    tables = rope_tables(
        model.rope, "rope", layout.grid, len(model.blocks), dynamic=model.dynamic_img_size
    )
    return _network(
        model,
        layouts=[replace(layout, rope=table) for table in tables],
        pool=pooling(model, prefix=True),
        head=classifier(model.head, "head"),
    )


@converts("model", "timm.models.beit.Beit")
def beit(model: Any, path: str) -> Piece[Architecture]:
    """Convert a BEiT, with a relative bias per block, or one that all blocks share."""
    layout = _layout(model)
    shared = relative_bias(model.rel_pos_bias, "rel_pos_bias", layout)
    return _network(
        model,
        layouts=[replace(layout, bias=shared)] * len(model.blocks),
        pool=pooling(model),
        head=classifier(model.head, "head"),
    )


@converts("model", "timm.models.vision_transformer_relpos.VisionTransformerRelPos")
def relpos(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model with relative biases instead of positions that are added to tokens."""
    layout = _layout(model)
    shared = relative_bias(model.shared_rel_pos, "shared_rel_pos", layout)
    return _network(
        model,
        layouts=[replace(layout, bias=shared)] * len(model.blocks),
        pool=pooling(model),
        head=classifier(model.head, "head"),
    )


def _network(
    model: Any,
    *,
    layouts: list[TokenLayout],
    pool: Piece[PoolSpec],
    head: Any,
    pool_norm: bool = True,
) -> Piece[Architecture]:
    patch_embed = model.patch_embed
    prefix, position = tokens(model)
    norms: dict[str, tuple[nn.Module | None, str]] = {
        "patch_norm": (patch_embed.norm, "patch_embed.norm"),
        "stem_norm": (getattr(model, "norm_pre", None), "norm_pre"),
        "norm": (model.norm, "norm"),
    }
    if pool_norm:
        norms["pool_norm"] = (model.fc_norm, "fc_norm")
    return assemble(
        image=(patch_embed.proj.in_channels, *patch_embed.img_size),
        stem=patch_stem(patch_embed, "patch_embed"),
        blocks=lift_blocks(model.blocks, "blocks", layouts),
        prefix=prefix,
        position=position,
        norms=norms,
        pool=pool,
        head=head,
    )


def _layout(model: Any) -> TokenLayout:
    """The grid and the prefix, without rope and shared bias."""
    if type_name(model.patch_embed) != "timm.layers.patch_embed.PatchEmbed":
        raise UnsupportedModel(f"patch_embed: no rule for {type_name(model.patch_embed)}")
    if model.patch_embed.img_size is None:
        raise UnsupportedModel(
            "patch_embed: the model has no image size, and a compact model needs one; "
            "create the model with img_size"
        )
    return TokenLayout(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)


def patch_stem(patch_embed: Any, path: str) -> Piece[StemSpec]:
    """Convert a PatchEmbed."""
    if patch_embed.dynamic_img_pad and any(
        side % patch
        for side, patch in zip(patch_embed.img_size, patch_embed.patch_size, strict=True)
    ):
        raise UnsupportedModel(
            f"{path}: dynamic_img_pad pads {patch_embed.img_size} to whole patches; "
            "create the model with an image size that needs no padding"
        )
    return conv_stem(patch_embed.proj, f"{path}.proj")


def tokens(model: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return prefix tokens with positions added (prefix, embed), and positions (patches, embed)."""
    names = ("cls_token", "dist_token", "reg_token")
    found = {name: getattr(model, name, None) for name in names}
    present = [token for token in found.values() if token is not None]
    if sum(token.shape[1] for token in present) != model.num_prefix_tokens:
        listed = ", ".join(name for name, token in found.items() if token is not None) or "none"
        raise UnsupportedModel(
            f"cls_token: num_prefix_tokens is {model.num_prefix_tokens}, the tokens of the model "
            f"are {listed}; create the model with class_token=False and reg_tokens=0 instead of "
            "removing tokens"
        )
    prefix = torch.cat([token[0] for token in present]) if present else None
    pos_embed = getattr(model, "pos_embed", None)
    position = None if pos_embed is None else pos_embed[0]
    if position is not None and prefix is not None and not getattr(model, "no_embed_class", False):
        # One table for both. Prefix tokens are constants, so their positions are folded into them.
        prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
    return prefix, position


def pooling(model: Any, *, prefix: bool | None = None) -> Piece[PoolSpec]:
    """Convert `global_pool`, or raise UnsupportedModel for a classifier on every token.

    `prefix`: whether attention pooling reads the prefix tokens. None: the model's option decides.
    """
    include = bool(getattr(model, "pool_include_prefix", False))
    attention = getattr(model, "attn_pool", None)
    if attention is not None:
        return attention_pool(attention, "attn_pool", prefix=include if prefix is None else prefix)
    if not model.global_pool:
        if not absent(model.head):
            raise UnsupportedModel(
                f"global_pool = {model.global_pool!r}: no rule for a classifier on every token; "
                "create the model with num_classes=0, or with 'avg' or 'token'"
            )
        return Piece(PoolSpec(kind="none"))
    kinds = {"token": "token", "avg": "mean", "max": "max", "avgmax": "avgmax"}
    kind = kinds.get(model.global_pool)
    if kind is None:
        raise UnsupportedModel(
            f"global_pool = {model.global_pool!r}: no rule for this pooling; create the model with "
            "'avg' or 'token'"
        )
    return Piece(PoolSpec(kind=kind + "_all" if include and kind != "token" else kind))
