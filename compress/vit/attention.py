"""Self-attention whose query/key width, value width and head count are free of each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import AttentionSpec
from .norm import Norm


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, width_in) -> (batch, queries, width_out).

    Separate q, k and v projections: after pruning they have unequal widths, and runtimes fuse attention only in this form.
    """

    def __init__(self, spec: AttentionSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.q = nn.Linear(width_in, spec.heads * spec.qk, bias=spec.q_bias)
        self.k = nn.Linear(width_in, spec.heads * spec.qk, bias=spec.k_bias)
        self.v = nn.Linear(width_in, spec.heads * spec.v, bias=spec.v_bias)
        norm_heads = spec.heads if spec.qk_norm_per_head else 0
        self.q_norm = Norm(spec.q_norm, norm_heads) if spec.q_norm else None
        self.k_norm = Norm(spec.k_norm, norm_heads) if spec.k_norm else None
        self.out_norm = Norm(spec.out_norm) if spec.out_norm else None
        self.out = nn.Linear(spec.heads * spec.v, width_out, bias=spec.out_bias)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """`queries`: compute only the first so many tokens (they still attend to all)."""
        asking = x if queries is None else x[:, :queries]
        q = self._split(self.q(asking), self.spec.qk)
        k = self._split(self.k(x), self.spec.qk)
        v = self._split(self.v(x), self.spec.v)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)
        if self.out_norm is not None:
            y = self.out_norm(y)
        out: Tensor = self.out(y)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(scale * q kᵀ) v over (batch, heads, tokens, width)."""
        # torch's fused CPU attention is several times slower under reduced matmul precision (measured: 287 images/s fused, 732 unfused).
        if not (q.is_cpu and torch.get_float32_matmul_precision() != "highest"):
            return F.scaled_dot_product_attention(q, k, v, scale=self.spec.scale)
        return ((q * self.spec.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v

    def _split(self, x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (self.spec.heads, width)).transpose(1, 2)
