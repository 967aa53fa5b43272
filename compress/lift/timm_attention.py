"""timm's attentions: fused or separate q, k, v; with rope, relative bias, grouped keys and values,
gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import AttentionSpec, DifferentialSpec
from .parts import linear, norm, present, under
from .positions import Places
from .registry import Piece, handles
from .timm_bias import add, bias_table, relative_bias
from .timm_rope import rope_piece


@handles("attention", "timm.models.vision_transformer.Attention", "timm.layers.attention.Attention")
def attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Fused qkv: three equal thirds, each (heads, head_dim)."""
    no_rope(places, path)
    return _assemble(module, path, split_qkv(module.qkv, f"{path}.qkv"), heads=module.num_heads)


@handles("attention", "timm.layers.attention.AttentionRope")
def attention_rope(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Fused or separate q, k, v, with rope, perhaps with fewer heads of keys and values."""
    projections = (
        split_qkv(module.qkv, f"{path}.qkv") if module.qkv is not None else separate(module, path)
    )
    rope = rope_piece(places, module.head_dim, path, half=module.rotate_half)
    kv_of = None
    if module.num_kv_groups > 1:
        kv_of = tuple(head // module.num_kv_groups for head in range(module.num_heads))
    return _assemble(module, path, projections, heads=module.num_heads, kv_of=kv_of, rope=rope)


@handles("attention", "timm.models.eva.EvaAttention")
def eva_attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Biases of q and v beside a fused weight, none of k; or separate projections."""
    rope = rope_piece(places, module.head_dim, path, half=module.rotate_half)
    projections = separate(module, path) if module.qkv is None else apart_biases(module, path)
    return _assemble(module, path, projections, heads=module.num_heads, rope=rope)


@handles("attention", "timm.models.beit.Attention")
def beit_attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Fused qkv without a k bias; a relative bias of its own, or shared by all blocks, or both."""
    no_rope(places, path)
    own = None
    if module.relative_position_bias_table is not None:
        own = bias_table(
            module.relative_position_bias_table, tuple(module.window_size), path, places
        )
    bias = add(own, places.bias, path)
    return _assemble(module, path, apart_biases(module, path), heads=module.num_heads, bias=bias)


@handles("attention", "timm.models.vision_transformer_relpos.RelPosAttention")
def relpos_attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Fused qkv with a relative bias, its own before a shared one."""
    no_rope(places, path)
    own = relative_bias(module.rel_pos, f"{path}.rel_pos", places)
    bias = places.bias if own is None else own
    return _assemble(
        module, path, split_qkv(module.qkv, f"{path}.qkv"), heads=module.num_heads, bias=bias
    )


@handles("attention", "timm.layers.diff_attention.DiffAttention")
def diff_attention(module: Any, path: str, places: Places) -> Piece[AttentionSpec]:
    """Differential attention: two halves of queries and keys a head."""
    no_rope(places, path)
    return _assemble(
        module,
        path,
        split_qkv(module.qkv, f"{path}.qkv"),
        heads=module.num_heads,
        differential=differential(module),
        head_norm=module.sub_norm,
    )


def differential(module: Any) -> Piece[DifferentialSpec]:
    """λ of a differential attention."""
    if module.lambda_a is not None:
        vectors, dual = torch.stack([module.lambda_a, module.lambda_b]), True
    else:
        vectors, dual = (
            torch.stack([module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2]),
            False,
        )
    return Piece(
        DifferentialSpec(start=module.lambda_init, width=module.head_dim, dual=dual),
        {"vectors": vectors},
    )


def no_rope(places: Places, path: str) -> None:
    """Refuse rope for an attention that does not take it."""
    if places.rope is not None:
        raise UnsupportedModel(f"{path}: the model has rope, this attention does not take it")


def split_qkv(qkv: nn.Module, path: str) -> dict[str, Tensor]:
    """Tensors of q, k and v from one Linear, laid out (3, heads, head_dim)."""
    tensors: dict[str, Tensor] = {}
    for kind, tensor in linear(qkv, path).items():
        if tensor.shape[0] % 3:
            raise UnsupportedModel(f"{path}: {tensor.shape[0]} outputs are not three equal parts")
        for name, part in zip("qkv", torch.chunk(tensor, 3), strict=True):
            tensors[f"{name}.{kind}"] = part
    return tensors


def apart_biases(module: Any, path: str) -> dict[str, Tensor]:
    """A fused weight whose biases of q and v are parameters of the attention. The k bias is a
    buffer of zeros unless somebody filled it.
    """
    tensors = split_qkv(module.qkv, f"{path}.qkv")
    k_bias = module.k_bias if module.k_bias is not None and bool(module.k_bias.any()) else None
    return tensors | present({"q.bias": module.q_bias, "k.bias": k_bias, "v.bias": module.v_bias})


def separate(module: Any, path: str) -> dict[str, Tensor]:
    """Three Linears."""
    tensors: dict[str, Tensor] = {}
    for name in "qkv":
        tensors |= under(name, linear(getattr(module, f"{name}_proj"), f"{path}.{name}_proj"))
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
    """The parts that timm's attentions name alike."""
    norms = {
        "q_norm": norm(getattr(module, "q_norm", None), f"{path}.q_norm"),
        "k_norm": norm(getattr(module, "k_norm", None), f"{path}.k_norm"),
        "head_norm": norm(head_norm, f"{path}.sub_norm"),
        "out_norm": norm(getattr(module, "norm", None), f"{path}.norm"),
    }
    gate = getattr(module, "gate", None)
    parts = under("gate", linear(gate, f"{path}.gate")) if gate is not None else {}
    parts |= under("out", linear(module.proj, f"{path}.proj"))
    return assemble(projections | parts, heads, float(module.scale), path, norms=norms, **more)


def assemble(
    tensors: dict[str, Tensor],
    heads: int,
    scale: float,
    path: str,
    *,
    norms: dict[str, Any] | None = None,
    kv_of: tuple[int, ...] | None = None,
    rope: Any = None,
    bias: Any = None,
    differential: Any = None,
) -> Piece[AttentionSpec]:
    """An attention from its projections `q`, `k`, `v`, `out` and perhaps `gate`, whose widths say
    the rest.
    """
    parts, kv_heads = (
        2 if differential is not None else 1,
        heads if kv_of is None else max(kv_of) + 1,
    )
    rows = {name: tensors[f"{name}.weight"].shape[0] for name in "qkv"}
    qk, v = rows["q"] // (heads * parts), rows["v"] // kv_heads
    if (
        rows != {"q": heads * parts * qk, "k": kv_heads * parts * qk, "v": kv_heads * v}
        or tensors["out.weight"].shape[1] != heads * v
    ):
        raise UnsupportedModel(
            f"{path}: {rows} rows and {tensors['out.weight'].shape[1]} columns are not of {heads} equal heads"
        )
    spec: dict[str, Any] = {}
    for name, piece in {
        **(norms or {}),
        "rope": rope,
        "bias": bias,
        "differential": differential,
    }.items():
        if piece is not None:
            spec[name] = piece.spec
            tensors |= piece.under(name)
    for name in ("q", "k", "v", "out", "gate"):
        spec[f"{name}_bias"] = f"{name}.bias" in tensors
    return Piece(
        AttentionSpec(
            heads=heads,
            qk=qk,
            v=v,
            scale=scale,
            kv_of=kv_of,
            gated="gate.weight" in tensors,
            **spec,
        ),
        tensors,
    )
