"""Self-attention with independent query/key width, value width and number of heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import AttentionSpec, DifferentialSpec
from ..select_specs import folds_keys
from .layers import Norm
from .relative_bias import RelativeBias
from .rope import Rope


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, width_in) -> (batch, queries, width_out).

    The q, k and v projections are separate: after pruning they have unequal widths, and runtimes
    fuse attention only in this form.
    """

    kv_index: Tensor | None
    # Factors of the keys, 0 or 1, in a network that computes with a token mask.
    key_keep: Tensor | None
    # Off where plain products are faster, as in timm's attention.
    fused_attn = True

    def __init__(self, spec: AttentionSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        self.spec = spec
        q_heads, kv_heads = spec.heads * spec.parts, spec.kv_heads * spec.parts
        self.q = nn.Linear(width_in, q_heads * spec.qk, bias=spec.q_bias)
        self.k = nn.Linear(width_in, kv_heads * spec.qk, bias=spec.k_bias)
        self.v = nn.Linear(width_in, spec.kv_heads * spec.v, bias=spec.v_bias)
        per_head = spec.qk_norm_per_head
        self.q_norm = Norm(spec.q_norm, q_heads if per_head else 0) if spec.q_norm else None
        self.k_norm = Norm(spec.k_norm, kv_heads if per_head else 0) if spec.k_norm else None
        kv_index = None if spec.kv_of is None else torch.tensor(spec.kv_of, device="cpu")
        self.register_buffer("kv_index", kv_index, persistent=False)
        self.register_buffer("key_keep", None, persistent=False)
        self.rope = Rope(spec.rope, spec.heads, spec.qk) if spec.rope else None
        self.bias = RelativeBias(spec.bias, spec.heads) if spec.bias else None
        self.differential = Differential(spec.differential) if spec.differential else None
        rows = spec.heads if spec.head_norm_per_head else 0
        self.head_norm = Norm(spec.head_norm, rows) if spec.head_norm else None
        self.out_norm = Norm(spec.out_norm) if spec.out_norm else None
        self.gate = (
            nn.Linear(width_in, spec.heads * spec.v, bias=spec.gate_bias) if spec.gated else None
        )
        self.out = nn.Linear(spec.heads * spec.v, width_out, bias=spec.out_bias)

    def forward(
        self,
        x: Tensor,
        queries: int | None = None,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend to all tokens.

        Args:
            x: (batch, tokens, width_in).
            queries: Compute that many leading tokens only; they still attend to all.
            keep: Factors (batch, tokens) of the keys, instead of the buffer `key_keep`.
            positions: Which tokens of the stem these are, (batch, tokens). None: the first ones.

        Returns:
            (batch, queries, width_out).
        """
        computed = x if queries is None else x[:, :queries]
        q, k = self.queries_and_keys(computed, x, positions)
        v = self.values(x)
        y = self.attend(q, k, v, keep, positions)
        if self.head_norm is not None:
            y = self.head_norm(y)
        if self.differential is not None:
            y = y * self.differential.gain
        y = y.transpose(1, 2).flatten(2)
        if self.out_norm is not None:
            y = self.out_norm(y)
        if self.gate is not None:
            y = y * self.gate(computed).sigmoid()
        out: Tensor = self.out(y)
        return out

    def queries_and_keys(
        self, computed: Tensor, x: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries of leading tokens and keys of all: (batch, heads * parts, tokens, qk) each."""
        spec = self.spec
        q = _split(self.q(computed), spec.heads * spec.parts)
        k = _split(self.k(x), spec.kv_heads * spec.parts)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.kv_index is not None:
            k = k.index_select(1, self.kv_index)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q, k

    def values(self, x: Tensor) -> Tensor:
        """(batch, tokens, width_in) -> (batch, heads, tokens, v)."""
        v = _split(self.v(x), self.spec.kv_heads)
        return v if self.kv_index is None else v.index_select(1, self.kv_index)

    def class_weights(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """How much the first token attends to each: (batch, tokens, in) -> (batch, heads, tokens).

        Where keys are a plain product of the tokens, they are not computed: q·(x Wk) = (Wk q)·x.
        """
        spec = self.spec
        if not folds_keys(spec):
            q, k = self.queries_and_keys(x[:, :1], x, positions)
            return self.weights(q, k, positions=positions).squeeze(2)
        q = _split(self.q(x[:, :1]), spec.heads * spec.parts)
        q = q if self.q_norm is None else self.q_norm(q)
        weight = self.k.weight.unflatten(0, (-1, spec.qk))
        if self.kv_index is not None:
            weight = weight.index_select(0, self.kv_index)
        # The bias of the keys adds the same to every score of a head.
        folded = (q * spec.scale) @ weight
        scores = folded.squeeze(2) @ x.transpose(1, 2)
        return self._softmax(scores.unsqueeze(2)).squeeze(2)

    def column_weights(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """How much all tokens attend to each, times the length of its value.

        Args:
            x: (batch, tokens, width_in).
            rows: Factors of the tokens that attend, (tokens,) or (batch, tokens). None: 1.
            columns: Factors (heads, v) of the value columns. None: 1.
            positions: As for `forward`.

        Returns:
            (batch, heads, tokens).
        """
        q, k = self.queries_and_keys(x, x, positions)
        maps = self.weights(q, k, positions=positions)
        if rows is not None:
            maps = maps * (rows[:, None, :, None] if rows.ndim == 2 else rows[:, None])
        v = self.values(x)
        v = v if columns is None else v * columns[:, None]
        length = v.square().sum(dim=(1, 3)).sqrt()
        return maps.sum(dim=2) * length[:, None]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Weighted values.

        Args:
            q: As for `weights`.
            k: As for `weights`.
            v: (batch, heads, keys, v).
            keep: As for `weights`.
            positions: As for `weights`.

        Returns:
            (batch, heads, queries, v).
        """
        masked = self.key_keep is not None or keep is not None
        # torch cannot export the fused product with a bias for each image.
        biased = self.bias is not None and positions is not None
        if self.differential is None and not masked and not biased and self.fused_attn:
            bias, scale = self._bias(q, k, positions), self.spec.scale
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return self.weights(q, k, keep, positions) @ v

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What values are multiplied by: softmax(scale * q kᵀ + bias).

        In differential attention, the difference of two such maps, softmax(q1 k1ᵀ) - λ softmax(q2
        k2ᵀ).

        Args:
            q: (batch, heads * parts, queries, qk); the parts of a head are neighbors.
            k: (batch, heads * parts, keys, qk).
            keep: Factors of the keys, (batch, keys), 0 or 1. None: the buffer `key_keep`.
            positions: Which tokens of the stem the keys are, (batch, keys); queries are the first
                of them. None: the first ones.

        Returns:
            (batch, heads, queries, keys); zero for keys that are not kept.
        """
        scores = (q * self.spec.scale) @ k.transpose(-2, -1)
        bias = self._bias(q, k, positions)
        if bias is not None:
            scores = scores + bias.repeat_interleave(self.spec.parts, dim=-3)
        return self._softmax(scores, keep)

    def _softmax(self, scores: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is not None:
            maps = sampled_softmax(scores, keep[:, None, None])
        elif self.key_keep is not None:
            maps = kept_softmax(scores, self.key_keep)
        else:
            maps = scores.softmax(dim=-1)
        return maps if self.differential is None else self.differential.subtract(maps)

    def _bias(self, q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor | None:
        """Rows by the computed queries, columns by the incoming keys."""
        return None if self.bias is None else self.bias(q.shape[-2], k.shape[-2], positions)


class Differential(nn.Module):
    """The factor λ of the second attention map, and differential attention with it.

    `vectors` has shape (4, width) with rows q1, k1, q2, k2, or (2,) with the exponents if `dual`.
    Ye et al. 2024, "Differential Transformer", eq. 2.
    """

    def __init__(self, spec: DifferentialSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vectors = nn.Parameter(torch.zeros(2) if spec.dual else torch.zeros(4, spec.width))

    def forward(self) -> Tensor:
        """λ: () -> scalar."""
        vectors = self.vectors
        exponents = vectors if self.spec.dual else (vectors[0::2] * vectors[1::2]).sum(dim=-1)
        first, second = exponents.exp().unbind()
        return first - second + self.spec.start

    @property
    def gain(self) -> float:
        """Factor of the heads' outputs after their norm, 1 - λ_init."""
        return 1.0 - self.spec.start

    def subtract(self, maps: Tensor) -> Tensor:
        """First - λ second: (batch, 2 * heads, queries, keys) -> (batch, heads, queries, keys)."""
        pairs = torch.unflatten(maps, 1, (-1, 2))
        found: Tensor = pairs[:, :, 0] - self() * pairs[:, :, 1]
        return found


def kept_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept keys, with exact zeros for the others.

    The maximum that is subtracted is that of the kept keys: that of all keys can be so much larger
    that every kept weight underflows. The result has gradients with respect to `keep`.

    Args:
        scores: (..., queries, keys).
        keep: (keys,) or (batch, 1, 1, keys), 0 or 1, at least one key kept.

    Returns:
        (..., queries, keys), each row with the sum 1.
    """
    dropped = keep.detach() == 0
    top = scores.detach().masked_fill(dropped, -math.inf).amax(dim=-1, keepdim=True)
    # A dropped key may have a larger score; bounded, so that its gradient is finite.
    weights = (scores - top).clamp(max=15.0).exp() * keep
    return weights / weights.sum(dim=-1, keepdim=True)


def sampled_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """`kept_softmax` for decisions that are sampled in training, with bounded gradients.

    With the weight w of a dropped key, relative to the sum of those that are kept, the derivative
    with respect to its factor is w (value - output), and w has no bound: a dropped key can have a
    far larger score than all others. Its gradient here is w / (1 + w) (value - output), which is
    what the output would change by if the key were kept.

    Args:
        scores: (batch, heads, queries, keys).
        keep: (batch, 1, 1, keys), 0 or 1, at least one key kept.

    Returns:
        (batch, heads, queries, keys), equal to `kept_softmax`.
    """
    if not keep.requires_grad:
        return kept_softmax(scores, keep)
    dropped = keep.detach() == 0
    top = scores.detach().masked_fill(dropped, -math.inf).amax(dim=-1, keepdim=True)
    weights = (scores - top).clamp(max=15.0).exp()
    with torch.no_grad():
        total = (weights * keep).sum(dim=-1, keepdim=True)
        slope = torch.where(dropped, total / (total + weights), torch.ones_like(weights))
    # The second term is exactly 0.
    weights = weights * (keep.detach() + (keep - keep.detach()) * slope)
    return weights / weights.sum(dim=-1, keepdim=True)


def _split(x: Tensor, heads: int) -> Tensor:
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)
