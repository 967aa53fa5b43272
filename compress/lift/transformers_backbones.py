"""Converters of DINOv3, and of the vision towers of CLIP and SigLIP, of transformers (version 5).

The output of a base model is that of its pooler. Without a pooler it is all tokens. The library is
not imported: modules are recognized by the name of their type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import (
    Architecture,
    AttentionSpec,
    FfnSpec,
    HeadSpec,
    PoolSpec,
    RopeGridSpec,
)
from .assembly import assemble, classifier, lift_blocks
from .parts import activation, linear, norm, prefixed
from .registry import Piece, RopeTable, TokenLayout, converts, find_converter, type_name
from .stem import conv_stem
from .timm_attention import attention_piece, no_rope
from .timm_block import Steps, attention_branch, ffn_branch
from .timm_mlp import ffn_piece
from .timm_rope import rope_piece
from .torchvision_vit import multihead_projections
from .transformers_vit import dinov2_layer, mlp, projections, swiglu

_CLIP, _DINO, _SIGLIP, _SIGLIP2 = (
    f"transformers.models.{name}.modeling_{name}"
    for name in ("clip", "dinov3_vit", "siglip", "siglip2")
)


@converts("model", f"{_CLIP}.CLIPVisionModel")
def clip(model: Any, path: str) -> Piece[Architecture]:
    """Convert a vision tower that returns the normalized class token."""
    return _clip(model, "", head=None)


@converts("model", f"{_CLIP}.CLIPVisionModelWithProjection")
def clip_with_projection(model: Any, path: str) -> Piece[Architecture]:
    """Convert a vision tower with a projection, which becomes the classifier."""
    head = classifier(model.visual_projection, "visual_projection")
    return _clip(model.vision_model, "vision_model.", head=head)


@converts("model", f"{_CLIP}.CLIPForImageClassification")
def clip_classification(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model with a classifier on the mean of the patches, without the final norm."""
    head = classifier(model.classifier, "classifier")
    return _clip(model.vision_model, "vision_model.", head=head, pool="mean")


@converts("model", f"{_SIGLIP}.SiglipVisionModel")
def siglip(model: Any, path: str) -> Piece[Architecture]:
    """Convert a vision tower with attention pooling; without it the output is all tokens."""
    pool: Piece[PoolSpec] = Piece(PoolSpec(kind="none"))
    if model.use_head:
        pool = find_converter("pool", model.head, "head")(model.head, "head")
    return _siglip(model, "", pool=pool, head=None)


@converts("model", f"{_SIGLIP}.SiglipForImageClassification")
def siglip_classification(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model with a classifier on the mean of the tokens."""
    head = classifier(model.classifier, "classifier")
    pool: Piece[PoolSpec] = Piece(PoolSpec(kind="mean"))
    return _siglip(model.vision_model, "vision_model.", pool=pool, head=head)


@converts("model", f"{_DINO}.DINOv3ViTModel")
def dinov3(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model that returns the normalized class token."""
    embeddings, config = model.embeddings, model.config
    stem = conv_stem(embeddings.patch_embeddings, "embeddings.patch_embeddings")
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    prefix = torch.cat([embeddings.cls_token[0], embeddings.register_tokens[0]])
    grid = stem.spec.sizes(height, width)[-1]
    rope = _rope(model.rope_embeddings, (config.num_channels, height, width))
    layers = model.model.layer
    return assemble(
        image=(config.num_channels, height, width),
        stem=stem,
        blocks=lift_blocks(
            layers, "model.layer", [TokenLayout(grid, len(prefix), rope)] * len(layers)
        ),
        prefix=prefix,
        norms={"norm": (model.norm, "norm")},
    )


def _rope(module: Any, image: tuple[int, int, int]) -> RopeTable:
    """Rotary tables of an image size; rows of patches are the first half of the frequencies."""
    frequencies = 2.0 * math.pi * module.inv_freq.float()
    cosines, sines = module(torch.zeros(1, *image, device=frequencies.device))
    zeros = torch.zeros_like(frequencies)
    both = [torch.cat([frequencies, zeros]), torch.cat([zeros, frequencies])]
    return RopeTable(
        torch.cat([sines, cosines], dim=-1)[None].float(),
        torch.stack(both)[None],
        RopeGridSpec(kind="centred"),
    )


def _clip(
    model: Any, path: str, *, head: Piece[HeadSpec] | None, pool: str = "token"
) -> Piece[Architecture]:
    embeddings = model.embeddings
    positions = _positions(embeddings, path)
    norms: dict[str, tuple[nn.Module | None, str]] = {
        "stem_norm": (model.pre_layrnorm, f"{path}pre_layrnorm")
    }
    if pool == "token":
        norms["norm"] = (model.post_layernorm, f"{path}post_layernorm")
    return _tower(
        model,
        path,
        prefix=embeddings.class_embedding[None] + positions[:1],
        position=positions[1:],
        norms=norms,
        pool=Piece(PoolSpec(kind=pool)),
        head=head,
    )


def _siglip(
    model: Any, path: str, *, pool: Piece[PoolSpec], head: Piece[HeadSpec] | None
) -> Piece[Architecture]:
    return _tower(
        model,
        path,
        position=_positions(model.embeddings, path),
        norms={"norm": (model.post_layernorm, f"{path}post_layernorm")},
        pool=pool,
        head=head,
    )


def _tower(
    model: Any,
    path: str,
    *,
    position: Tensor,
    prefix: Tensor | None = None,
    norms: dict[str, tuple[nn.Module | None, str]],
    pool: Piece[PoolSpec],
    head: Piece[HeadSpec] | None,
) -> Piece[Architecture]:
    embeddings, layers = model.embeddings, model.encoder.layers
    where = f"{path}embeddings.patch_embedding"
    stem = conv_stem(embeddings.patch_embedding, where)
    side = embeddings.image_size
    grid, count = stem.spec.sizes(side, side)[-1], 0 if prefix is None else len(prefix)
    if len(position) != math.prod(grid):
        raise UnsupportedModel(
            f"{path}embeddings.position_embedding: {len(position)} positions for {grid} patches"
        )
    return assemble(
        image=(embeddings.patch_embedding.in_channels, side, side),
        stem=stem,
        blocks=lift_blocks(
            layers, f"{path}encoder.layers", [TokenLayout(grid, count)] * len(layers)
        ),
        prefix=prefix,
        position=position,
        norms=norms,
        pool=pool,
        head=head,
    )


def _positions(embeddings: Any, path: str) -> Tensor:
    """The rows of an embedding that the model adds to its tokens, (tokens, embed)."""
    module = embeddings.position_embedding
    if type(module) is not nn.Embedding:
        raise UnsupportedModel(
            f"{path}embeddings.position_embedding: {type_name(module)} where an Embedding was "
            "expected"
        )
    return module.weight


@converts("block", f"{_CLIP}.CLIPEncoderLayer", f"{_SIGLIP}.SiglipEncoderLayer")
def encoder_layer(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert a pre-norm block."""
    first = (module.layer_norm1, f"{path}.layer_norm1")
    second = (module.layer_norm2, f"{path}.layer_norm2")
    branch = attention_branch(module.self_attn, f"{path}.self_attn", layout, before=first)
    return [[branch], [ffn_branch(module.mlp, f"{path}.mlp", before=second)]]


@converts("attention", f"{_CLIP}.CLIPAttention", f"{_SIGLIP}.SiglipAttention")
def attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert an attention with separate projections."""
    no_rope(layout, path)
    tensors = projections(module, path, out="out_proj")
    return attention_piece(tensors, module.num_heads, float(module.scale), path)


@converts("attention", f"{_DINO}.DINOv3ViTAttention")
def dinov3_attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert an attention with rope, whose pairs are columns i and i + half."""
    rope = rope_piece(layout, module.head_dim, path, half=True)
    tensors = projections(module, path, out="o_proj")
    return attention_piece(tensors, module.num_heads, float(module.scaling), path, rope=rope)


@converts("ffn", f"{_DINO}.DINOv3ViTMLP")
def dinov3_mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert up, activation, down."""
    tensors = prefixed("fc1", linear(module.up_proj, f"{path}.up_proj")) | prefixed(
        "fc2", linear(module.down_proj, f"{path}.down_proj")
    )
    return ffn_piece(tensors, activation(module.act_fn, f"{path}.act_fn"))


# These modules are those of ViT and DINOv2 under other names.
converts("block", f"{_DINO}.DINOv3ViTLayer")(dinov2_layer)
converts("ffn", f"{_CLIP}.CLIPMLP", f"{_SIGLIP}.SiglipMLP")(mlp)
converts("ffn", f"{_DINO}.DINOv3ViTGatedMLP")(swiglu)


@converts("pool", f"{_SIGLIP}.SiglipMultiheadAttentionPoolingHead")
def attention_pooling(module: Any, path: str) -> Piece[PoolSpec]:
    """Convert a learned probe that attends to all tokens, followed by an MLP with a residual.

    The query is the projection of the probe, which is constant.
    """
    source = module.attention
    projected = multihead_projections(source, f"{path}.attention")
    query = nn.functional.linear(
        module.probe[0], projected.pop("q.weight"), projected.pop("q.bias", None)
    )
    heads, width = source.num_heads, query.shape[-1] // source.num_heads
    inner = norm(module.layernorm, f"{path}.layernorm")
    ffn = find_converter("ffn", module.mlp, f"{path}.mlp")(module.mlp, f"{path}.mlp")
    tensors = {"query": query.flatten()} | projected | ffn.prefixed("ffn")
    tensors |= inner.prefixed("norm") if inner else {}
    spec = PoolSpec(
        kind="attention",
        attention=AttentionSpec(
            heads=heads,
            qk=width,
            v=width,
            scale=width**-0.5,
            q_bias=False,
            k_bias="k.bias" in tensors,
            v_bias="v.bias" in tensors,
            out_bias="out.bias" in tensors,
        ),
        norm=inner and inner.spec,
        ffn=ffn.spec,
        width=projected["out.weight"].shape[0],
    )
    return Piece(spec, {f"pool.{name}": tensor for name, tensor in tensors.items()})


@converts(
    "model",
    f"{_DINO}.DINOv3ViTBackbone",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Backbone",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersBackbone",
)
def feature_maps(model: Any, path: str) -> Piece[Architecture]:
    """Refuse a model that returns feature maps of several blocks."""
    kind = type(model).__name__
    raise UnsupportedModel(
        f"model: {kind} returns feature maps, which has no rule; load the weights as "
        f"{kind.replace('Backbone', 'Model')}, whose lifted form has forward_intermediates"
    )


@converts(
    "model",
    f"{_SIGLIP2}.Siglip2VisionModel",
    f"{_SIGLIP2}.Siglip2ForImageClassification",
)
def siglip2(model: Any, path: str) -> Piece[Architecture]:
    """Refuse the vision tower for images of any shape."""
    raise UnsupportedModel(
        f"model: {type(model).__name__} is for images of any shape, given as patches with masks, "
        "which has no rule; weights of SigLIP 2 with a fixed resolution load as SiglipVisionModel"
    )
