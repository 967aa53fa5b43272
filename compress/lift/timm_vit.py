"""timm's Vision Transformers: VisionTransformer, DeiT, EVA, BEiT and the relative-position
family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, PoolSpec, StemSpec
from .assembly import assemble, classifier, lift_blocks
from .parts import absent
from .positions import Places
from .registry import Piece, handles, type_name
from .stem import conv_stem
from .timm_bias import relative_bias
from .timm_pool import attention_pool
from .timm_rope import rope_tables


@handles("model", "timm.models.vision_transformer.VisionTransformer")
def vision_transformer(model: Any, path: str) -> Piece[Architecture]:
    """The plain one, with any of its options."""
    return _network(
        model, places=_places(model), pool=pooling(model), head=classifier(model.head, "head")
    )


@handles("model", "timm.models.deit.VisionTransformerDistilled")
def distilled(model: Any, path: str) -> Piece[Architecture]:
    """A class and a distillation token, each with a classifier; the answer is their mean."""
    if model.distilled_training and model.training:
        raise UnsupportedModel(
            "distilled_training: two answers at once have no rule; call set_distilled_training(False)"
        )
    head = classifier(
        model.head, "head", None if absent(model.head_dist) else (model.head_dist, "head_dist")
    )
    return _network(
        model,
        places=_places(model),
        pool=Piece(PoolSpec(kind="distilled")),
        head=head,
        pool_norm=False,
    )


@handles("model", "timm.models.eva.Eva")
def eva(model: Any, path: str) -> Piece[Architecture]:
    """EVA: rope at the model level."""
    places = _places(model)[0]
    tables = rope_tables(
        model.rope, "rope", places.grid, len(model.blocks), dynamic=model.dynamic_img_size
    )
    each = [Places(places.grid, places.prefix, rope=table) for table in tables]
    return _network(
        model, places=each, pool=pooling(model, prefix=True), head=classifier(model.head, "head")
    )


@handles("model", "timm.models.beit.Beit")
def beit(model: Any, path: str) -> Piece[Architecture]:
    """BEiT: relative biases a block, or one that all share."""
    places = _places(model)[0]
    shared = relative_bias(model.rel_pos_bias, "rel_pos_bias", places)
    each = [Places(places.grid, places.prefix, bias=shared)] * len(model.blocks)
    return _network(model, places=each, pool=pooling(model), head=classifier(model.head, "head"))


@handles("model", "timm.models.vision_transformer_relpos.VisionTransformerRelPos")
def relpos(model: Any, path: str) -> Piece[Architecture]:
    """Relative biases instead of positions added to tokens."""
    places = _places(model)[0]
    shared = relative_bias(model.shared_rel_pos, "shared_rel_pos", places)
    each = [Places(places.grid, places.prefix, bias=shared)] * len(model.blocks)
    return _network(model, places=each, pool=pooling(model), head=classifier(model.head, "head"))


def _network(
    model: Any, *, places: list[Places], pool: Piece[PoolSpec], head: Any, pool_norm: bool = True
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
        blocks=lift_blocks(model.blocks, "blocks", places),
        prefix=prefix,
        position=position,
        norms=norms,
        pool=pool,
        head=head,
    )


def _places(model: Any) -> list[Places]:
    """The grid and the prefix, without rope or shared bias, for each block."""
    if type_name(model.patch_embed) != "timm.layers.patch_embed.PatchEmbed":
        raise UnsupportedModel(f"patch_embed: no rule for {type_name(model.patch_embed)}")
    if model.patch_embed.img_size is None:
        raise UnsupportedModel(
            "patch_embed: the model has no image size; create it with img_size, for a compact model has a fixed one"
        )
    return [Places(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)] * len(model.blocks)


def patch_stem(patch_embed: Any, path: str) -> Piece[StemSpec]:
    """timm's PatchEmbed."""
    if patch_embed.dynamic_img_pad and any(
        side % patch
        for side, patch in zip(patch_embed.img_size, patch_embed.patch_size, strict=True)
    ):
        raise UnsupportedModel(
            f"{path}: dynamic_img_pad pads {patch_embed.img_size} to whole patches; create the model with an image size that needs none"
        )
    return conv_stem(patch_embed.proj, f"{path}.proj")


def tokens(model: Any) -> tuple[Tensor | None, Tensor | None]:
    """Prefix tokens (prefix, embed) with their positions added, and patch positions (patches,
    embed).
    """
    names = ("cls_token", "dist_token", "reg_token")
    found = [
        token[0] for token in (getattr(model, name, None) for name in names) if token is not None
    ]
    prefix = torch.cat(found) if found else None
    pos_embed = getattr(model, "pos_embed", None)
    position = None if pos_embed is None else pos_embed[0]
    if position is not None and prefix is not None and not getattr(model, "no_embed_class", False):
        # One table for both: the prefix tokens' part is a constant added to a constant.
        prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
    return prefix, position


def pooling(model: Any, *, prefix: bool | None = None) -> Piece[PoolSpec]:
    """Our form of timm's `global_pool`. `prefix`: whether attention pooling sees prefix tokens,
    where the model class decides. Errors: UnsupportedModel.
    """
    include = bool(getattr(model, "pool_include_prefix", False))
    attention = getattr(model, "attn_pool", None)
    if attention is not None:
        return attention_pool(attention, "attn_pool", prefix=include if prefix is None else prefix)
    kind = {"token": "token", "avg": "mean", "max": "max", "avgmax": "avgmax"}.get(
        model.global_pool
    )
    if kind is None:
        raise UnsupportedModel(
            f"global_pool = {model.global_pool!r}: no rule for a model that does not pool its tokens; create it with 'avg' or 'token'"
        )
    return Piece(PoolSpec(kind=kind + "_all" if include and kind != "token" else kind))
