"""Converters of timm's attentions.

They have fused or separate q, k, v projections, and may have rope, relative position bias, grouped
keys and values, and gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import AttentionSpec, DifferentialSpec
from .parts import linear, norm, not_none, prefixed, softmax_scale
from .registry import Piece, TokenLayout, converts
from .timm_bias import add, bias_table, relative_bias
from .timm_rope import rope_piece


@converts(
    "attention", "timm.models.vision_transformer.Attention", "timm.layers.attention.Attention"
)
def attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert an attention with fused qkv: three equal thirds, each (heads, head_dim)."""
    no_rope(layout, path)
    return _assemble(module, path, split_qkv(module.qkv, f"{path}.qkv"), heads=module.num_heads)


@converts("attention", "timm.layers.attention.AttentionRope")
def attention_rope(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert an attention with rope, fused or separate q, k, v, and perhaps grouped queries."""
    fused = module.qkv is not None
    projections = split_qkv(module.qkv, f"{path}.qkv") if fused else separate_qkv(module, path)
    rope = rope_piece(layout, module.head_dim, path, half=module.rotate_half)
    kv_of = None
    if module.num_kv_groups > 1:
        kv_of = tuple(head // module.num_kv_groups for head in range(module.num_heads))
    return _assemble(module, path, projections, heads=module.num_heads, kv_of=kv_of, rope=rope)


@converts("attention", "timm.models.eva.EvaAttention")
def eva_attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert a fused weight with separate biases of q and v; or separate projections."""
    rope = rope_piece(layout, module.head_dim, path, half=module.rotate_half)
    fused = module.qkv is not None
    projections = split_qkv_with_biases(module, path) if fused else separate_qkv(module, path)
    return _assemble(module, path, projections, heads=module.num_heads, rope=rope)


@converts("attention", "timm.models.beit.Attention")
def beit_attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert fused qkv without a k bias, with its own relative bias, a shared one, or both."""
    no_rope(layout, path)
    own = None
    if module.relative_position_bias_table is not None:
        values, window = module.relative_position_bias_table, tuple(module.window_size)
        own = bias_table(values, window, path, layout)
    bias = add(own, layout.bias, path)
    projections = split_qkv_with_biases(module, path)
    return _assemble(module, path, projections, heads=module.num_heads, bias=bias)


@converts("attention", "timm.models.vision_transformer_relpos.RelPosAttention")
def relpos_attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert fused qkv with a relative bias: its own, or else the shared one."""
    no_rope(layout, path)
    own = relative_bias(module.rel_pos, f"{path}.rel_pos", layout)
    bias = layout.bias if own is None else own
    projections = split_qkv(module.qkv, f"{path}.qkv")
    return _assemble(module, path, projections, heads=module.num_heads, bias=bias)


@converts("attention", "timm.layers.diff_attention.DiffAttention")
def diff_attention(module: Any, path: str, layout: TokenLayout) -> Piece[AttentionSpec]:
    """Convert differential attention: two queries and two keys per head."""
    no_rope(layout, path)
    return _assemble(
        module,
        path,
        split_qkv(module.qkv, f"{path}.qkv"),
        heads=module.num_heads,
        differential=differential(module),
        head_norm=module.sub_norm,
    )


def differential(module: Any) -> Piece[DifferentialSpec]:
    """Convert λ of a differential attention."""
    if module.lambda_a is not None:
        vectors, dual = torch.stack([module.lambda_a, module.lambda_b]), True
    else:
        rows = [module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2]
        vectors, dual = torch.stack(rows), False
    spec = DifferentialSpec(start=module.lambda_init, width=module.head_dim, dual=dual)
    return Piece(spec, {"vectors": vectors})


def no_rope(layout: TokenLayout, path: str) -> None:
    """Raise UnsupportedModel if the model has rope; for an attention without it."""
    if layout.rope is not None:
        raise UnsupportedModel(f"{path}: the model has rope, this attention does not apply it")


def split_qkv(qkv: nn.Module, path: str) -> dict[str, Tensor]:
    """Return the tensors of q, k and v from one Linear with outputs (3, heads, head_dim)."""
    tensors: dict[str, Tensor] = {}
    for kind, tensor in linear(qkv, path).items():
        if tensor.shape[0] % 3:
            raise UnsupportedModel(f"{path}: {tensor.shape[0]} outputs are not three equal parts")
        for name, part in zip("qkv", torch.chunk(tensor, 3), strict=True):
            tensors[f"{name}.{kind}"] = part
    return tensors


def split_qkv_with_biases(module: Any, path: str) -> dict[str, Tensor]:
    """Return q, k and v from a fused weight, with biases that are attributes of the attention.

    The k bias is a buffer of zeros, which is dropped, unless a value was assigned.
    """
    tensors = split_qkv(module.qkv, f"{path}.qkv")
    k_bias = module.k_bias if module.k_bias is not None and bool(module.k_bias.any()) else None
    return tensors | not_none({"q.bias": module.q_bias, "k.bias": k_bias, "v.bias": module.v_bias})


def separate_qkv(module: Any, path: str) -> dict[str, Tensor]:
    """Return q, k and v from three Linears."""
    tensors: dict[str, Tensor] = {}
    for name in "qkv":
        tensors |= prefixed(name, linear(getattr(module, f"{name}_proj"), f"{path}.{name}_proj"))
    return tensors


def _assemble(
    module: Any,
    path: str,
    projections: dict[str, Tensor],
    *,
    heads: int,
    head_norm: nn.Module | None = None,
    **more: Any,
) -> Piece[AttentionSpec]:
    """Add the parts that have the same name in all of timm's attentions."""
    norms = {
        "q_norm": norm(getattr(module, "q_norm", None), f"{path}.q_norm"),
        "k_norm": norm(getattr(module, "k_norm", None), f"{path}.k_norm"),
        "head_norm": norm(head_norm, f"{path}.sub_norm"),
        "out_norm": norm(getattr(module, "norm", None), f"{path}.norm"),
    }
    gate = getattr(module, "gate", None)
    parts = prefixed("gate", linear(gate, f"{path}.gate")) if gate is not None else {}
    parts |= prefixed("out", linear(module.proj, f"{path}.proj"))
    scale = softmax_scale(module, path)
    return attention_piece(projections | parts, heads, scale, path, norms=norms, **more)


def attention_piece(
    tensors: dict[str, Tensor],
    heads: int,
    scale: float | None,
    path: str,
    *,
    norms: dict[str, Any] | None = None,
    kv_of: tuple[int, ...] | None = None,
    rope: Any = None,
    bias: Any = None,
    differential: Any = None,
) -> Piece[AttentionSpec]:
    """Assemble an attention from its projections, whose shapes define the widths.

    Args:
        tensors: Weights and biases of `q`, `k`, `v`, `out` and perhaps `gate`.
        heads: Number of query heads.
        scale: Multiplies the scores before the softmax. None: 1 / sqrt(qk).
        path: Path in the source model, for error messages.
        norms: q_norm, k_norm, head_norm and out_norm as pieces or None. None: there are none.
        kv_of: The key/value head of each query head. None: each has its own.
        rope: A piece of `RopeSpec`. None: no rope.
        bias: A piece of `RelativeBiasSpec`. None: no relative bias.
        differential: A piece of `DifferentialSpec`. None: ordinary attention.

    Returns:
        The attention with all tensors.

    Raises:
        UnsupportedModel: The projections do not consist of `heads` equal heads.
    """
    parts = 2 if differential is not None else 1
    kv_heads = heads if kv_of is None else max(kv_of) + 1
    rows = {name: tensors[f"{name}.weight"].shape[0] for name in "qkv"}
    qk, v = rows["q"] // (heads * parts), rows["v"] // kv_heads
    if (
        rows != {"q": heads * parts * qk, "k": kv_heads * parts * qk, "v": kv_heads * v}
        or tensors["out.weight"].shape[1] != heads * v
    ):
        raise UnsupportedModel(
            f"{path}: {rows} rows and {tensors['out.weight'].shape[1]} columns "
            f"are not of {heads} equal heads"
        )
    spec: dict[str, Any] = {}
    optional = {"rope": rope, "bias": bias, "differential": differential}
    for name, piece in {**(norms or {}), **optional}.items():
        if piece is not None:
            spec[name] = piece.spec
            tensors |= piece.prefixed(name)
    for name in ("q", "k", "v", "out", "gate"):
        spec[f"{name}_bias"] = f"{name}.bias" in tensors
    return Piece(
        AttentionSpec(
            heads=heads,
            qk=qk,
            v=v,
            scale=qk**-0.5 if scale is None else scale,
            kv_of=kv_of,
            gated="gate.weight" in tensors,
            **spec,
        ),
        tensors,
    )
