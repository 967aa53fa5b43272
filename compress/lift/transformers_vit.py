"""The transformers library's ViT, DeiT and DINOv2 (version 5 of it), base models and classifiers.

A base model answers with its pooler's output, or without a pooler with the class token of its last
hidden state. Nothing of that library is imported: its modules are known by their type's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, AttentionSpec, FfnSpec, HeadSpec, PoolSpec
from .assembly import assemble, classifier, lift_blocks
from .parts import activation, linear, under
from .positions import Places
from .registry import Piece, handles
from .stem import conv_stem
from .timm_attention import assemble as assemble_attention
from .timm_attention import no_rope
from .timm_block import Steps, attention_branch, ffn_branch
from .timm_mlp import ffn

_VIT, _DEIT, _DINO = (
    f"transformers.models.{name}.modeling_{name}" for name in ("vit", "deit", "dinov2")
)


@handles("model", f"{_VIT}.ViTModel", f"{_DEIT}.DeiTModel")
def base(model: Any, path: str) -> Piece[Architecture]:
    """The base model; its pooler is a classifier in form: a Linear with an activation on the class
    token.
    """
    head = None
    if getattr(model, "pooler", None) is not None:
        tensors = under("head", linear(model.pooler.dense, "pooler.dense"))
        act = activation(model.pooler.activation, "pooler.activation")
        head = Piece(
            HeadSpec(classes=tensors["head.weight"].shape[0], bias="head.bias" in tensors, act=act),
            tensors,
        )
    return _network(model, "", head=head)


@handles("model", f"{_DINO}.Dinov2Model")
def dinov2(model: Any, path: str) -> Piece[Architecture]:
    """The class token of the last hidden state."""
    return _network(model, "")


@handles("model", f"{_VIT}.ViTForImageClassification", f"{_DEIT}.DeiTForImageClassification")
def classification(model: Any, path: str) -> Piece[Architecture]:
    """A Linear on the class token."""
    inner = "vit" if hasattr(model, "vit") else "deit"
    return _network(
        getattr(model, inner), f"{inner}.", head=classifier(model.classifier, "classifier")
    )


@handles("model", f"{_DEIT}.DeiTForImageClassificationWithTeacher")
def with_teacher(model: Any, path: str) -> Piece[Architecture]:
    """The mean of the two classifiers."""
    head = classifier(
        model.cls_classifier,
        "cls_classifier",
        (model.distillation_classifier, "distillation_classifier"),
    )
    return _network(model.deit, "deit.", head=head, pool="distilled")


@handles("model", f"{_DINO}.Dinov2ForImageClassification")
def dinov2_classification(model: Any, path: str) -> Piece[Architecture]:
    """A Linear on the class token and the mean of the patches, side by side."""
    return _network(
        model.dinov2, "dinov2.", head=classifier(model.classifier, "classifier"), pool="token_mean"
    )


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
        raise UnsupportedModel(
            f"{path or 'model'}: no rule for this layout of {type(model).__name__}; lifting knows version 5 of transformers"
        )
    stem = conv_stem(
        embeddings.patch_embeddings.projection, f"{path}embeddings.patch_embeddings.projection"
    )
    height, width = embeddings.patch_embeddings.image_size
    tokens = [
        token[0]
        for token in (embeddings.cls_token, getattr(embeddings, "distillation_token", None))
        if token is not None
    ]
    prefix: Tensor = torch.cat(tokens)
    positions = embeddings.position_embeddings[0]
    grid = stem.spec.sizes(height, width)[-1]
    if len(positions) != len(prefix) + grid[0] * grid[1]:
        raise UnsupportedModel(
            f"{path}embeddings.position_embeddings: {len(positions)} positions for {len(prefix)} + {grid} tokens"
        )
    return assemble(
        image=(embeddings.patch_embeddings.num_channels, height, width),
        stem=stem,
        blocks=lift_blocks(layers, f"{path}{where}", [Places(grid, len(prefix))] * len(layers)),
        prefix=prefix + positions[: len(prefix)],
        position=positions[len(prefix) :],
        norms={"norm": (model.layernorm, f"{path}layernorm")},
        pool=Piece(PoolSpec(kind=pool)),
        head=head,
    )


@handles("block", f"{_VIT}.ViTLayer", f"{_DEIT}.DeiTLayer")
def layer(module: Any, path: str, places: Places) -> Steps:
    """Pre-norm."""
    if not hasattr(module, "mlp"):
        raise UnsupportedModel(
            f"{path}: no rule for this layout of {type(module).__name__}; lifting knows version 5 of transformers"
        )
    return [
        [
            attention_branch(
                module.attention,
                f"{path}.attention",
                places,
                before=(module.layernorm_before, f"{path}.layernorm_before"),
            )
        ],
        [
            ffn_branch(
                module.mlp,
                f"{path}.mlp",
                before=(module.layernorm_after, f"{path}.layernorm_after"),
            )
        ],
    ]


@handles("block", f"{_DINO}.Dinov2Layer")
def dinov2_layer(module: Any, path: str, places: Places) -> Steps:
    """Pre-norm with layer scale."""
    one, two = module.layer_scale1.lambda1, module.layer_scale2.lambda1
    return [
        [
            attention_branch(
                module.attention,
                f"{path}.attention",
                places,
                before=(module.norm1, f"{path}.norm1"),
                gamma=one,
            )
        ],
        [ffn_branch(module.mlp, f"{path}.mlp", before=(module.norm2, f"{path}.norm2"), gamma=two)],
    ]


@handles("attention", f"{_VIT}.ViTAttention", f"{_DEIT}.DeiTAttention", f"{_DINO}.Dinov2Attention")
def attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Separate projections."""
    no_rope(places, path)
    if not hasattr(module, "o_proj"):
        raise UnsupportedModel(
            f"{path}: no rule for this layout of {type(module).__name__}; lifting knows version 5 of transformers"
        )
    if module.is_causal:
        raise UnsupportedModel(f"{path}.is_causal: causal attention has no rule")
    tensors: dict[str, Tensor] = {}
    for name, source in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        tensors |= under(name, linear(getattr(module, source), f"{path}.{source}"))
    return assemble_attention(tensors, module.num_attention_heads, float(module.scaling), path)


@handles("ffn", f"{_VIT}.ViTMLP", f"{_DEIT}.DeiTMLP", f"{_DINO}.Dinov2MLP")
def mlp(module: Any, path: str) -> Piece[FfnSpec]:
    """fc1, activation, fc2."""
    tensors = under("fc1", linear(module.fc1, f"{path}.fc1")) | under(
        "fc2", linear(module.fc2, f"{path}.fc2")
    )
    return ffn(tensors, activation(module.activation_fn, f"{path}.activation_fn"))


@handles("ffn", f"{_DINO}.Dinov2SwiGLUFFN")
def swiglu(module: Any, path: str) -> Piece[FfnSpec]:
    """Gate, value, output."""
    tensors: dict[str, Tensor] = {}
    for name, source in (("gate", "gate_proj"), ("fc1", "up_proj"), ("fc2", "down_proj")):
        tensors |= under(name, linear(getattr(module, source), f"{path}.{source}"))
    return ffn(tensors, activation(module.act_fn, f"{path}.act_fn"))
