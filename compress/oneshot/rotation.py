"""Exact changes of basis inside each attention head, so that trailing columns matter least.

The scores of a head depend on the product qᵀk only, so that q -> A q, k -> B k with Aᵀ B = I leaves
the network's function unchanged, and so does v -> A v with the inverse folded into the output
projection. The basis is chosen on images: with the second moment C_q of the queries and the
covariance C_k of the keys (per image: a constant added to all keys changes no softmax), the best
rank r of E[(qᵀk)²] is that of the singular values of C_q^(1/2) C_k^(1/2). For the values it is that
of C_o^(1/2) W_oᵀ, where C_o is the covariance of the head's output and W_o its part of the output
projection.

A rotation is exact only where nothing acts on single columns in between. Rope pairs, norms of
queries and keys, norms and gates of the heads' outputs leave a head's columns in their old basis.

References:
    Wong et al. 2025, "A3: an Analytical Low-Rank Approximation Framework for Attention".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lift import lift
from ..network.architecture import AttentionSpec
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from .stream import Activations, Moments, Stream
from .stream_rotation import rotate_stream

# Share of the mean variance that is added to every direction, so that the basis can be inverted
# where the images do not use one.
DAMPING = 1e-4


def rotates_qk(spec: AttentionSpec) -> bool:
    """Whether the columns of queries and keys can be rotated freely."""
    return spec.rope is None and spec.q_norm is None and spec.k_norm is None


def rotates_v(spec: AttentionSpec) -> bool:
    """Whether the columns of values can be rotated freely."""
    return spec.head_norm is None and spec.out_norm is None and not spec.gated


class HeadMoments:
    """Moments of the queries, keys and concatenated head outputs of one attention."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.queries = Moments(spec.qk, spec.heads * spec.parts)
        self.keys = Moments(spec.qk, spec.heads * spec.parts)
        self.outputs = Moments(spec.heads * spec.v)

    def add(self, seen: Activations) -> None:
        """Add one batch."""
        assert seen.qkv is not None
        q, k, _ = seen.qkv
        self.queries.add(_vectors(q))
        # Keys are centered per image, so that their second moment is a covariance.
        self.keys.add(_vectors(k - k.mean(dim=2, keepdim=True)))
        self.outputs.add(seen.inner.flatten(0, 1))

    def head_covariance(self) -> Tensor:
        """The covariance of each head's output: (heads, v, v)."""
        heads, width = self.spec.heads, self.spec.v
        blocks = self.outputs.covariance[0].view(heads, width, heads, width)
        return torch.stack([blocks[head, :, head] for head in range(heads)])


@dataclass(frozen=True)
class HeadRotation:
    """Changes of basis of one attention; None where its columns cannot be rotated.

    Attributes:
        q: Multiplies the queries of each head, (heads * parts, qk, qk).
        k: Multiplies the keys of each key head, (key heads * parts, qk, qk).
        v: Multiplies the values of each value head, (value heads, v, v).
        back: The inverse of `v`.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    back: Tensor | None = None

    def turned(self, spec: AttentionSpec, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, (batch, heads * parts, tokens, qk) each, in the new basis."""
        if self.q is None or self.k is None:
            return q, k
        keys = self.k[list(key_heads(spec))]
        return q @ self.q.transpose(1, 2).to(q), k @ keys.transpose(1, 2).to(k)

    def turned_outputs(self, spec: AttentionSpec, covariance: Tensor) -> Tensor:
        """The covariance of the concatenated heads, (heads * v, heads * v), in the new basis."""
        if self.v is None:
            return covariance
        whole: Tensor = torch.block_diag(*self.v[list(value_heads(spec))])
        return whole @ covariance @ whole.T

    def apply(self, core: Attention) -> None:
        """Change the weights of an attention in place; its function stays the same."""
        with torch.no_grad():
            if self.q is not None and self.k is not None:
                _turn_rows(core.q, self.q)
                _turn_rows(core.k, self.k)
            if self.v is not None and self.back is not None:
                _turn_rows(core.v, self.v)
                columns = torch.unflatten(core.out.weight, 1, (core.spec.heads, core.spec.v))
                for head, owner in enumerate(value_heads(core.spec)):
                    columns[:, head] = (columns[:, head].double() @ self.back[owner]).to(columns)
                core.out.weight.copy_(columns.flatten(1))


def rotate(
    model: nn.Module,
    images: Tensor,
    *,
    stream: bool = False,
    progress: Callable[[], None] | None = None,
) -> CompactModel:
    """Turn the columns of each head into the basis in which removing the last ones costs least.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`; it is not modified.
        images: Some hundred unlabeled images, (images, channels, height, width), normalized as the
            model expects.
        stream: Whether to rotate the residual stream, too. LayerNorm then becomes RMSNorm, and the
            channels are ordered by falling importance.
        progress: Called after every step of the network.

    Returns:
        A network with the same function (fp32, relative 1e-5) and shapes. Queries, keys and values
        of each head are ordered by falling importance where the architecture allows a rotation,
        and unchanged elsewhere.

    Raises:
        InputError: The images do not fit the model, or something does not commute with a rotation
            of the stream; the message names it.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    result = copy.deepcopy(lift(model)).eval()
    result.architecture.require_no_selects("rotate")
    if stream:
        result = rotate_stream(result, images, progress=progress)
    dense = Stream(result, images)
    while not dense.finished:
        attentions = [core for branch in dense.step if isinstance(core := branch.core, Attention)]
        moments = {id(core): HeadMoments(core.spec) for core in attentions}

        def add(branch: Branch, seen: Activations, moments: Any = moments) -> None:
            if id(branch.core) in moments:
                moments[id(branch.core)].add(seen)

        dense.advance(add)
        for core in attentions:
            head_rotation(core, moments[id(core)]).apply(core)
        if progress is not None:
            progress()
    return result


def head_rotation(core: Attention, moments: HeadMoments) -> HeadRotation:
    """The bases in which the last columns of each head matter least."""
    with torch.no_grad():
        q, k = _qk_bases(core.spec, moments) if rotates_qk(core.spec) else (None, None)
        v, back = _v_bases(core, moments) if rotates_v(core.spec) else (None, None)
    return HeadRotation(q, k, v, back)


def _vectors(x: Tensor) -> Tensor:
    """(batch, heads, tokens, width) -> (heads, batch * tokens, width)."""
    return x.transpose(0, 1).flatten(1, 2)


def _qk_bases(spec: AttentionSpec, moments: HeadMoments) -> tuple[Tensor, Tensor]:
    queries, keys = moments.queries.second_moment, moments.keys.covariance
    owners = key_heads(spec)
    turned_q, turned_k = torch.empty_like(queries), []
    for owner in range(spec.kv_heads * spec.parts):
        members = [head for head, key in enumerate(owners) if key == owner]
        # Heads that share a key share its basis: their queries are samples of one distribution.
        q_root, q_inverse = _roots(queries[members].mean(dim=0))
        k_root, _ = _roots(keys[members[0]])
        u, s, _ = torch.linalg.svd(q_root @ k_root)
        scale = s.clamp(min=float(s[0]) * 1e-6).sqrt()
        # q' = S^(1/2) Uᵀ C_q^(-1/2) q; k' = S^(1/2) Vᵀ C_k^(-1/2) k is its inverse transpose.
        basis = scale[:, None] * u.T @ q_inverse
        turned_q[members] = basis
        turned_k.append(torch.linalg.inv(basis).T)
    return turned_q, torch.stack(turned_k)


def _v_bases(core: Attention, moments: HeadMoments) -> tuple[Tensor, Tensor]:
    spec, owners = core.spec, value_heads(core.spec)
    outputs = moments.head_covariance()
    columns = torch.unflatten(core.out.weight, 1, (spec.heads, spec.v))
    turned, back = [], []
    for owner in range(spec.kv_heads):
        members = [head for head, value in enumerate(owners) if value == owner]
        root, inverse = _roots(outputs[members].mean(dim=0))
        weights = columns[:, members].transpose(0, 1).flatten(0, 1).double()
        _, _, vh = torch.linalg.svd(weights @ root, full_matrices=False)
        if vh.shape[0] < spec.v:
            # Fewer outputs than columns: complete the basis.
            vh = torch.linalg.svd(weights @ root, full_matrices=True)[2]
        turned.append(vh @ inverse)
        back.append(root @ vh.T)
    return torch.stack(turned), torch.stack(back)


def key_heads(spec: AttentionSpec) -> tuple[int, ...]:
    """The key head that each query head reads; differential attention has two per head."""
    return spec.kv_of if spec.kv_of is not None else tuple(range(spec.heads * spec.parts))


def value_heads(spec: AttentionSpec) -> tuple[int, ...]:
    """The value head that each query head reads."""
    return spec.kv_of if spec.kv_of is not None else tuple(range(spec.heads))


def _turn_rows(linear: nn.Linear, matrices: Tensor) -> None:
    """Multiply the rows of each head, weights and bias, by a square matrix from the left."""
    heads, width, _ = matrices.shape
    rows = linear.weight.view(heads, width, -1).double()
    linear.weight.copy_((matrices @ rows).flatten(0, 1))
    if linear.bias is not None:
        linear.bias.copy_((matrices @ linear.bias.view(heads, width, 1).double()).flatten())


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a damped moment matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    damping = DAMPING * float(values.clamp(min=0).mean()) + 1e-12
    roots = (values.clamp(min=0) + damping).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T
