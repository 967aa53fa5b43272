"""Pooling with attention: by a learned query, and among the tokens before they are pooled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import PoolSpec, RefineSpec
from .attention import kept_softmax, sampled_softmax
from .layers import Ffn, Norm


class AttentionPool(nn.Module):
    """One learned query attends to all tokens: (batch, tokens, width_in) -> (batch, width).

    `query` has shape (heads * qk,): the projected latent vector, which does not depend on the
    image. Lee et al. 2019, "Set Transformer"; Zhai et al. 2022, "Scaling Vision Transformers".
    """

    # Factors of the keys, 0 or 1, in a network that computes with a token mask.
    key_keep: Tensor | None

    def __init__(self, spec: PoolSpec, width_in: int) -> None:
        super().__init__()
        assert spec.attention is not None
        assert spec.width is not None
        attention = spec.attention
        self.spec, self.attention = spec, attention
        self.register_buffer("key_keep", None, persistent=False)
        self.query = nn.Parameter(torch.zeros(attention.heads * attention.qk))
        self.k = nn.Linear(width_in, attention.heads * attention.qk, bias=attention.k_bias)
        self.v = nn.Linear(width_in, attention.heads * attention.v, bias=attention.v_bias)
        self.k_norm = (
            Norm(attention.k_norm, attention.heads if attention.qk_norm_per_head else 0)
            if attention.k_norm
            else None
        )
        self.out = nn.Linear(attention.heads * attention.v, spec.width, bias=attention.out_bias)
        self.norm = Norm(spec.norm) if spec.norm else None
        self.ffn = Ffn(spec.ffn, spec.width, spec.width) if spec.ffn else None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(batch, tokens, width_in) -> (batch, width); `keep`: factors (batch, tokens)."""
        heads = self.attention.heads
        q = self.query.view(1, heads, 1, -1).expand(x.shape[0], -1, -1, -1)
        k = torch.unflatten(self.k(x), -1, (heads, -1)).transpose(1, 2)
        v = torch.unflatten(self.v(x), -1, (heads, -1)).transpose(1, 2)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if keep is None:
            y = _attend(q, k, v, self.attention.scale, self.key_keep)
        else:
            scores = q @ k.transpose(-2, -1) * self.attention.scale
            y = sampled_softmax(scores, keep[:, None, None]) @ v
        pooled: Tensor = self.out(y.flatten(1))
        if self.ffn is not None:
            inner = pooled if self.norm is None else self.norm(pooled)
            pooled = pooled + self.ffn(inner)
        return pooled


class Refine(nn.Module):
    """Self-attention without parameters: (batch, tokens, width) -> (batch, tokens, width).

    Heads take the channels in order. After pruning they may have unequal widths; the narrow ones
    are padded with zeros. Locality-Attending Vision Transformer (ICLR 2026).
    """

    spread: Tensor | None
    gather: Tensor | None
    key_keep: Tensor | None

    def __init__(self, spec: RefineSpec) -> None:
        super().__init__()
        self.spec = spec
        self.heads, width = len(spec.channels), max(spec.channels)
        spread: list[int] = []
        gather: list[int] = []
        start, total = 0, sum(spec.channels)
        for head, channels in enumerate(spec.channels):
            # Index `total` is a channel of zeros after the real ones.
            spread += [start + i if i < channels else total for i in range(width)]
            gather += [head * width + i for i in range(channels)]
            start += channels
        self.register_buffer("key_keep", None, persistent=False)
        even = len(set(spec.channels)) == 1
        self.register_buffer(
            "spread", None if even else torch.tensor(spread, device="cpu"), persistent=False
        )
        self.register_buffer(
            "gather", None if even else torch.tensor(gather, device="cpu"), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        if self.spread is not None:
            x = F.pad(x, (0, 1)).index_select(-1, self.spread)
        x = torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)
        y = _attend(x, x, x, self.spec.scale, self.key_keep).transpose(1, 2).flatten(2)
        return y if self.gather is None else y.index_select(-1, self.gather)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return kept_softmax(q @ k.transpose(-2, -1) * scale, keep) @ v
