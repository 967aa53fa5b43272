"""Converters of torchvision's VisionTransformer, with torch's nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture, AttentionSpec, FfnSpec, HeadSpec
from .assembly import assemble, lift_blocks
from .parts import activation, linear, not_none, prefixed
from .registry import Piece, TokenLayout, converts, plain_type, type_name
from .stem import conv_stem
from .timm_attention import attention_piece, no_rope
from .timm_block import Steps, attention_branch, ffn_branch
from .timm_mlp import ffn_piece

_MODULE = "torchvision.models.vision_transformer"


@converts("model", f"{_MODULE}.VisionTransformer")
def vision_transformer(model: Any, path: str) -> Piece[Architecture]:
    """Convert a VisionTransformer; the head may have a hidden layer with tanh."""
    stem = conv_stem(model.conv_proj, "conv_proj")
    channels = model.conv_proj.in_channels if isinstance(model.conv_proj, nn.Conv2d) else 3
    image = (channels, model.image_size, model.image_size)
    encoder = model.encoder
    if type_name(encoder) != f"{_MODULE}.Encoder":
        raise UnsupportedModel(f"encoder: no rule for {type_name(encoder)}")
    positions = encoder.pos_embedding[0]
    layout = TokenLayout(stem.spec.sizes(*image[1:])[-1], 1)
    return assemble(
        image=image,
        stem=stem,
        blocks=lift_blocks(encoder.layers, "encoder.layers", [layout] * len(encoder.layers)),
        prefix=model.class_token[0] + positions[:1],
        position=positions[1:],
        norms={"norm": (encoder.ln, "encoder.ln")},
        head=_head(model.heads, "heads"),
    )


def _head(heads: Any, path: str) -> Piece[HeadSpec] | None:
    children = dict(heads.named_children())
    if isinstance(heads, nn.Identity) or all(
        isinstance(child, nn.Identity) for child in children.values()
    ):
        return None
    if plain_type(heads) is not nn.Sequential or list(children) not in (
        ["head"],
        ["pre_logits", "act", "head"],
    ):
        raise UnsupportedModel(
            f"{path}: no rule for a head made of {list(children) or type_name(heads)}"
        )
    tensors = prefixed("head", linear(children["head"], f"{path}.head"))
    spec = HeadSpec(classes=tensors["head.weight"].shape[0], bias="head.bias" in tensors)
    if "pre_logits" in children:
        inner = linear(children["pre_logits"], f"{path}.pre_logits")
        if "bias" not in inner:
            raise UnsupportedModel(
                f"{path}.pre_logits: a hidden layer of the head without a bias has no rule"
            )
        tensors |= prefixed("pre_head", inner)
        act = activation(children["act"], f"{path}.act")
        spec = spec.model_copy(update={"hidden": inner["weight"].shape[0], "hidden_act": act})
    return Piece(spec, tensors)


@converts("block", f"{_MODULE}.EncoderBlock")
def block(module: Any, path: str, layout: TokenLayout) -> Steps:
    """Convert x += self_attention(ln_1(x)); x += mlp(ln_2(x))."""
    ln_1, ln_2 = (module.ln_1, f"{path}.ln_1"), (module.ln_2, f"{path}.ln_2")
    name = f"{path}.self_attention"
    attention = attention_branch(module.self_attention, name, layout, before=ln_1)
    return [[attention], [ffn_branch(module.mlp, f"{path}.mlp", before=ln_2)]]


@converts("attention", "torch.nn.modules.activation.MultiheadAttention")
def multihead(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert one stacked weight or three, used as self-attention."""
    no_rope(layout, path)
    return attention_piece(multihead_projections(module, path), module.num_heads, None, path)


def multihead_projections(module: Any, path: str) -> dict[str, Tensor]:
    """Return the tensors of q, k, v and out of an nn.MultiheadAttention.

    Raises:
        UnsupportedModel: It adds keys, or has the batch in another place.
    """
    if type_name(module) != "torch.nn.modules.activation.MultiheadAttention":
        raise UnsupportedModel(
            f"{path}: {type_name(module)} where an nn.MultiheadAttention was expected"
        )
    for flag, found in (
        ("bias_k", module.bias_k is not None),
        ("bias_v", module.bias_v is not None),
        ("add_zero_attn", module.add_zero_attn),
    ):
        if found:
            raise UnsupportedModel(
                f"{path}: nn.MultiheadAttention with {flag} adds a token to the keys, "
                "which has no rule"
            )
    if not module.batch_first:
        raise UnsupportedModel(f"{path}: nn.MultiheadAttention without batch_first has no rule")
    tensors: dict[str, Tensor] = {}
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = separate if module.in_proj_weight is None else module.in_proj_weight.chunk(3)
    tensors |= {f"{name}.weight": weight for name, weight in zip("qkv", weights, strict=True)}
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.chunk(3)
        tensors |= {f"{name}.bias": bias for name, bias in zip("qkv", biases, strict=True)}
    tensors |= not_none({"out.weight": module.out_proj.weight, "out.bias": module.out_proj.bias})
    return tensors


@converts("ffn", f"{_MODULE}.MLPBlock")
def mlp_block(module: Any, path: str) -> Piece[FfnSpec]:
    """Convert a Sequential of Linear, activation, dropout, Linear, dropout."""
    layers = [
        (name, child)
        for name, child in module.named_children()
        if not isinstance(child, nn.Dropout)
    ]
    if [isinstance(child, nn.Linear) for _, child in layers] != [True, False, True]:
        raise UnsupportedModel(
            f"{path}: no rule for an MLP of {[type(child).__name__ for _, child in layers]}"
        )
    (first, fc1), (between, act), (last, fc2) = layers
    tensors = prefixed("fc1", linear(fc1, f"{path}.{first}")) | prefixed(
        "fc2", linear(fc2, f"{path}.{last}")
    )
    return ffn_piece(tensors, activation(act, f"{path}.{between}"))
