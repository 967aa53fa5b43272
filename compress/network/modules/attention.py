"""Self-attention whose query/key width, value width and head count are free of each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import AttentionSpec
from .differential import Differential
from .norm import Norm
from .relative_bias import RelativeBias
from .rope import Rope


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, width_in) -> (batch, queries, width_out).

    Separate q, k and v projections: after pruning they have unequal widths, and runtimes fuse
    attention only in this form.
    """

    kv_index: Tensor | None

    def __init__(self, spec: AttentionSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.q = nn.Linear(width_in, spec.heads * spec.parts * spec.qk, bias=spec.q_bias)
        self.k = nn.Linear(width_in, spec.kv_heads * spec.parts * spec.qk, bias=spec.k_bias)
        self.v = nn.Linear(width_in, spec.kv_heads * spec.v, bias=spec.v_bias)
        per_head = spec.qk_norm_per_head
        self.q_norm = (
            Norm(spec.q_norm, spec.heads * spec.parts if per_head else 0) if spec.q_norm else None
        )
        self.k_norm = (
            Norm(spec.k_norm, spec.kv_heads * spec.parts if per_head else 0)
            if spec.k_norm
            else None
        )
        kv_index = None if spec.kv_of is None else torch.tensor(spec.kv_of, device="cpu")
        self.register_buffer("kv_index", kv_index, persistent=False)
        self.rope = Rope(spec.rope, spec.heads, spec.qk) if spec.rope else None
        self.bias = RelativeBias(spec.bias, spec.heads) if spec.bias else None
        self.differential = Differential(spec.differential) if spec.differential else None
        self.head_norm = (
            Norm(spec.head_norm, spec.heads if spec.head_norm_per_head else 0)
            if spec.head_norm
            else None
        )
        self.out_norm = Norm(spec.out_norm) if spec.out_norm else None
        self.gate = (
            nn.Linear(width_in, spec.heads * spec.v, bias=spec.gate_bias) if spec.gated else None
        )
        self.out = nn.Linear(spec.heads * spec.v, width_out, bias=spec.out_bias)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """`queries`: compute only the first so many tokens (they still attend to all)."""
        spec = self.spec
        asking = x if queries is None else x[:, :queries]
        q = _split(self.q(asking), spec.heads * spec.parts)
        k = _split(self.k(x), spec.kv_heads * spec.parts)
        v = _split(self.v(x), spec.kv_heads)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.kv_index is not None:
            k, v = k.index_select(1, self.kv_index), v.index_select(1, self.kv_index)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        y = self.attend(q, k, v)
        if self.head_norm is not None:
            y = self.head_norm(y)
        if self.differential is not None:
            y = y * self.differential.gain
        y = y.transpose(1, 2).flatten(2)
        if self.out_norm is not None:
            y = self.out_norm(y)
        if self.gate is not None:
            y = y * self.gate(asking).sigmoid()
        out: Tensor = self.out(y)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(scale * q kᵀ + bias) v over (batch, heads, tokens, width)."""
        bias = None if self.bias is None else self.bias()[:, : q.shape[-2]]
        if self.differential is not None:
            return self.differential.attend(q, k, v, self.spec.scale, bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.spec.scale)


def _split(x: Tensor, heads: int) -> Tensor:
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)
