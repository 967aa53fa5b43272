"""Converters of ViT, DeiT and DINOv2 of transformers (version 5): base models and classifiers.

DINOv2 also with register tokens.

The output of a base model is that of its pooler, or without a pooler the class token of its last
hidden state. The library is not imported: modules are recognized by the name of their type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, AttentionSpec, FfnSpec, HeadSpec, PoolSpec
from .assembly import assemble, classifier, lift_blocks
from .parts import activation, linear, prefixed
from .registry import Piece, TokenLayout, converts
from .stem import conv_stem
from .timm_attention import attention_piece, no_rope
from .timm_block import Steps, attention_branch, ffn_branch
from .timm_mlp import ffn_piece

_VIT, _DEIT, _DINO, _REGISTERS = (
    f"transformers.models.{name}.modeling_{name}"
    for name in ("vit", "deit", "dinov2", "dinov2_with_registers")
)


@converts("model", f"{_VIT}.ViTModel", f"{_DEIT}.DeiTModel")
def base(model: Any, path: str) -> Piece[Architecture]:
    """Convert a base model; its pooler becomes the classifier, a Linear with an activation."""
    head = None
    if getattr(model, "pooler", None) is not None:
        tensors = prefixed("head", linear(model.pooler.dense, "pooler.dense"))
        act = activation(model.pooler.activation, "pooler.activation")
        head = Piece(
            HeadSpec(classes=tensors["head.weight"].shape[0], bias="head.bias" in tensors, act=act),
            tensors,
        )
    return _network(model, "", head=head)


@converts("model", f"{_DINO}.Dinov2Model", f"{_REGISTERS}.Dinov2WithRegistersModel")
def dinov2(model: Any, path: str) -> Piece[Architecture]:
    """Convert a base model that returns the class token of its last hidden state."""
    return _network(model, "")


@converts("model", f"{_VIT}.ViTForImageClassification", f"{_DEIT}.DeiTForImageClassification")
def classification(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model with a Linear classifier on the class token."""
    inner = "vit" if hasattr(model, "vit") else "deit"
    return _network(
        getattr(model, inner), f"{inner}.", head=classifier(model.classifier, "classifier")
    )


@converts("model", f"{_DEIT}.DeiTForImageClassificationWithTeacher")
def with_teacher(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model that averages the logits of two classifiers."""
    head = classifier(
        model.cls_classifier,
        "cls_classifier",
        (model.distillation_classifier, "distillation_classifier"),
    )
    return _network(model.deit, "deit.", head=head, pool="distilled")


@converts(
    "model",
    f"{_DINO}.Dinov2ForImageClassification",
    f"{_REGISTERS}.Dinov2WithRegistersForImageClassification",
)
def dinov2_classification(model: Any, path: str) -> Piece[Architecture]:
    """Convert a model with a classifier on class token and mean of the patches, concatenated."""
    inner = "dinov2" if hasattr(model, "dinov2") else "dinov2_with_registers"
    head = classifier(model.classifier, "classifier")
    return _network(getattr(model, inner), f"{inner}.", head=head, pool="token_mean")


def _network(
    model: Any, path: str, *, head: Piece[HeadSpec] | None = None, pool: str = "token"
) -> Piece[Architecture]:
    embeddings = model.embeddings
    layers, where = (
        (model.layers, "layers")
        if hasattr(model, "layers")
        else (getattr(getattr(model, "encoder", None), "layer", None), "encoder.layer")
    )
    if layers is None or not hasattr(embeddings.patch_embeddings, "projection"):
        raise _other_version(model, path or "model")
    patches = embeddings.patch_embeddings
    stem = conv_stem(patches.projection, f"{path}embeddings.patch_embeddings.projection")
    height, width = patches.image_size
    tokens = (embeddings.cls_token, getattr(embeddings, "distillation_token", None))
    prefix: Tensor = torch.cat([token[0] for token in tokens if token is not None])
    positions = embeddings.position_embeddings[0]
    grid = stem.spec.sizes(height, width)[-1]
    # They follow the class token, and have no positions.
    registers = getattr(embeddings, "register_tokens", prefix[None, :0])[0]
    if len(positions) != len(prefix) + grid[0] * grid[1]:
        raise UnsupportedModel(
            f"{path}embeddings.position_embeddings: {len(positions)} positions "
            f"for {len(prefix)} + {grid} tokens"
        )
    return assemble(
        image=(patches.num_channels, height, width),
        stem=stem,
        blocks=lift_blocks(
            layers,
            f"{path}{where}",
            [TokenLayout(grid, len(prefix) + len(registers))] * len(layers),
        ),
        prefix=torch.cat([prefix + positions[: len(prefix)], registers]),
        position=positions[len(prefix) :],
        norms={"norm": (model.layernorm, f"{path}layernorm")},
        pool=Piece(PoolSpec(kind=pool)),
        head=head,
    )


@converts("block", f"{_VIT}.ViTLayer", f"{_DEIT}.DeiTLayer")
def layer(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert a pre-norm block."""
    if not hasattr(module, "mlp"):
        raise _other_version(module, path)
    first = (module.layernorm_before, f"{path}.layernorm_before")
    second = (module.layernorm_after, f"{path}.layernorm_after")
    branch = attention_branch(module.attention, f"{path}.attention", layout, before=first)
    return [[branch], [ffn_branch(module.mlp, f"{path}.mlp", before=second)]]


@converts("block", f"{_DINO}.Dinov2Layer", f"{_REGISTERS}.Dinov2WithRegistersLayer")
def dinov2_layer(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert a pre-norm block with layer scale."""
    one, two = module.layer_scale1.lambda1, module.layer_scale2.lambda1
    norm1, norm2 = (module.norm1, f"{path}.norm1"), (module.norm2, f"{path}.norm2")
    name = f"{path}.attention"
    branch = attention_branch(module.attention, name, layout, before=norm1, gamma=one)
    return [[branch], [ffn_branch(module.mlp, f"{path}.mlp", before=norm2, gamma=two)]]


@converts(
    "attention",
    f"{_VIT}.ViTAttention",
    f"{_DEIT}.DeiTAttention",
    f"{_DINO}.Dinov2Attention",
    f"{_REGISTERS}.Dinov2WithRegistersAttention",
)
def attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert an attention with separate projections."""
    no_rope(layout, path)
    if not hasattr(module, "o_proj"):
        raise _other_version(module, path)
    tensors = projections(module, path, out="o_proj")
    return attention_piece(tensors, module.num_attention_heads, float(module.scaling), path)


def projections(module: Any, path: str, *, out: str) -> dict[str, Tensor]:
    """Return the tensors of q, k, v and out of a bidirectional attention.

    Raises:
        UnsupportedModel: The attention is causal, or a projection is no Linear.
    """
    if module.is_causal:
        raise UnsupportedModel(f"{path}.is_causal: causal attention has no rule")
    tensors: dict[str, Tensor] = {}
    for name, source in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", out)):
        tensors |= prefixed(name, linear(getattr(module, source), f"{path}.{source}"))
    return tensors


@converts(
    "ffn",
    f"{_VIT}.ViTMLP",
    f"{_DEIT}.DeiTMLP",
    f"{_DINO}.Dinov2MLP",
    f"{_REGISTERS}.Dinov2WithRegistersMLP",
)
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert fc1, activation, fc2."""
    tensors = prefixed("fc1", linear(module.fc1, f"{path}.fc1")) | prefixed(
        "fc2", linear(module.fc2, f"{path}.fc2")
    )
    return ffn_piece(tensors, activation(module.activation_fn, f"{path}.activation_fn"))


@converts("ffn", f"{_DINO}.Dinov2SwiGLUFFN", f"{_REGISTERS}.Dinov2WithRegistersSwiGLUFFN")
def swiglu(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert gate, value and output projections."""
    tensors: dict[str, Tensor] = {}
    for name, source in (("gate", "gate_proj"), ("fc1", "up_proj"), ("fc2", "down_proj")):
        tensors |= prefixed(name, linear(getattr(module, source), f"{path}.{source}"))
    return ffn_piece(tensors, activation(module.act_fn, f"{path}.act_fn"))


def _other_version(module: Any, path: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path}: no rule for this layout of {type(module).__name__}; "
        "version 5 of transformers is supported"
    )
