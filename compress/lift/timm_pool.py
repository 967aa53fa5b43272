"""Converters of timm's attention pooling."""

from __future__ import annotations

from typing import Any

import torch

from ...core.errors import UnsupportedModel
from ..network.architecture import AttentionSpec, PoolSpec, RefineSpec
from .parts import absent, linear, norm, prefixed, softmax_scale
from .registry import Piece, converts, find_converter
from .timm_mlp import mlp


def attention_pool(module: Any, path: str, *, prefix: bool) -> Piece[PoolSpec]:
    """Convert a known attention pooling; `prefix`: whether it reads the prefix tokens."""
    piece: Piece[PoolSpec] = find_converter("pool", module, path)(module, path, prefix)
    return piece


@converts("pool", "timm.layers.attention_pool.AttentionPoolLatent")
def latent(module: Any, path: str, prefix: bool) -> Piece[PoolSpec]:
    """Convert a learned latent that attends to all tokens, followed by an MLP with a residual.

    The query is the projection of the latent, which is constant.
    """
    if module.pos_embed is not None:
        raise UnsupportedModel(f"{path}.pos_embed: no rule for positions inside attention pooling")
    if module.latent_len != 1 and module.pool != "token":
        raise UnsupportedModel(
            f"{path}: {module.latent_len} latents pooled by {module.pool!r}, "
            "only one latent or the first of them has a rule"
        )
    if module.mlp is None or not isinstance(module.proj, torch.nn.Linear):
        raise UnsupportedModel(
            f"{path}: attention pooling without an output projection has no rule"
        )
    heads, width = module.num_heads, module.head_dim
    query = module.q(module.latent[0, :1]).unflatten(-1, (heads, width))
    query = module.q_norm(query.transpose(0, 1)).flatten()
    scale = softmax_scale(module, path)
    tensors = {"query": query}
    for kind, tensor in linear(module.kv, f"{path}.kv").items():
        tensors[f"k.{kind}"], tensors[f"v.{kind}"] = tensor.chunk(2)
    k_norm, inner = norm(module.k_norm, f"{path}.k_norm"), norm(module.norm, f"{path}.norm")
    ffn = mlp(module.mlp, f"{path}.mlp")
    tensors |= prefixed("out", linear(module.proj, f"{path}.proj")) | ffn.prefixed("ffn")
    tensors |= k_norm.prefixed("k_norm") if k_norm else {}
    tensors |= inner.prefixed("norm") if inner else {}
    attention = AttentionSpec(
        heads=heads,
        qk=width,
        v=width,
        scale=width**-0.5 if scale is None else scale,
        q_bias=False,
        k_bias="k.bias" in tensors,
        v_bias="v.bias" in tensors,
        out_bias="out.bias" in tensors,
        k_norm=k_norm and k_norm.spec,
    )
    spec = PoolSpec(
        kind="attention",
        attention=attention,
        norm=inner and inner.spec,
        ffn=ffn.spec,
        width=module.out_features,
        prefix=prefix,
    )
    return Piece(spec, {f"pool.{name}": tensor for name, tensor in tensors.items()})


@converts("pool", "timm.layers.attention_pool.AttentionPoolPrr")
def prr(module: Any, path: str, prefix: bool) -> Piece[PoolSpec]:
    """Convert self-attention without parameters, followed by class token or mean pooling."""
    if not absent(module.pre_norm) or not absent(module.post_norm):
        raise UnsupportedModel(f"{path}: no rule for norms inside the refining attention pool")
    if not prefix:
        raise UnsupportedModel(
            f"{path}: the refining attention pool has a rule only with the prefix tokens"
        )
    width, scale = module.head_dim, softmax_scale(module, path)
    refine = RefineSpec(
        channels=(width,) * module.num_heads, scale=width**-0.5 if scale is None else scale
    )
    return Piece(PoolSpec(kind="token" if module.pool == "token" else "mean_all", refine=refine))
