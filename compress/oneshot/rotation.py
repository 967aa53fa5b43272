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

import torch
from torch import Tensor, nn

from ..lift import lift
from ..network.architecture import AttentionSpec
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from .stream import Moments, Stream, recorded_attention, recorded_inputs

# Share of the mean variance that is added to every direction, so that the basis can be inverted
# where the images do not use one.
DAMPING = 1e-4


def rotates_qk(spec: AttentionSpec) -> bool:
    """Whether the columns of queries and keys can be rotated freely."""
    return spec.rope is None and spec.q_norm is None and spec.k_norm is None


def rotates_v(spec: AttentionSpec) -> bool:
    """Whether the columns of values can be rotated freely."""
    return spec.head_norm is None and spec.out_norm is None and not spec.gated


def rotate(
    model: nn.Module, images: Tensor, *, progress: Callable[[], None] | None = None
) -> CompactModel:
    """Turn the columns of each head into the basis in which removing the last ones costs least.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`; it is not modified.
        images: Some hundred unlabeled images, (images, channels, height, width), normalized as the
            model expects.
        progress: Called after every step of the network.

    Returns:
        A network with the same function (fp32, relative 1e-5), shapes and architecture. Queries,
        keys and values of each head are ordered by falling importance where the architecture
        allows a rotation, and unchanged elsewhere.

    Raises:
        InputError: The images do not fit the model.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    result = copy.deepcopy(lift(model)).eval()
    stream = Stream(result, images)
    while not stream.finished:
        for branch in stream.step:
            if isinstance(branch.core, Attention):
                rotate_branch(branch, stream)
        stream.advance()
        if progress is not None:
            progress()
    return result


def rotate_branch(branch: Branch, stream: Stream) -> None:
    """Rotate the heads of one attention in place, on the stream that it reads."""
    core = branch.core
    assert isinstance(core, Attention)
    if not (rotates_qk(core.spec) or rotates_v(core.spec)):
        return
    queries, keys, outputs = _moments(branch, core, stream)
    with torch.no_grad():
        if rotates_qk(core.spec):
            _rotate_qk(core, queries.second_moment, keys.covariance)
        if rotates_v(core.spec):
            _rotate_v(core, outputs.covariance)


def _moments(branch: Branch, core: Attention, stream: Stream) -> tuple[Moments, Moments, Moments]:
    spec = core.spec
    queries = Moments(spec.qk, spec.heads * spec.parts)
    keys = Moments(spec.qk, spec.heads * spec.parts)
    outputs = Moments(spec.v, spec.heads)
    for x in stream.batches:
        with (
            torch.no_grad(),
            recorded_attention(core) as attention,
            recorded_inputs(core.out) as concatenated,
        ):
            branch(x)
        q, k, _ = attention[0]
        queries.add(_vectors(q))
        # Keys are centered per image, so that their second moment is a covariance.
        keys.add(_vectors(k - k.mean(dim=2, keepdim=True)))
        heads = torch.unflatten(concatenated[0], -1, (spec.heads, spec.v)).transpose(1, 2)
        outputs.add(_vectors(heads))
    return queries, keys, outputs


def _vectors(x: Tensor) -> Tensor:
    """(batch, heads, tokens, width) -> (heads, batch * tokens, width)."""
    return x.transpose(0, 1).flatten(1, 2)


def _rotate_qk(core: Attention, queries: Tensor, keys: Tensor) -> None:
    owners = key_heads(core.spec)
    for owner in range(core.spec.kv_heads * core.spec.parts):
        members = [head for head, key in enumerate(owners) if key == owner]
        # Heads that share a key share its basis: their queries are samples of one distribution.
        q_root, q_inverse = _roots(queries[members].mean(dim=0))
        k_root, _ = _roots(keys[members[0]])
        u, s, _ = torch.linalg.svd(q_root @ k_root)
        scale = s.clamp(min=float(s[0]) * 1e-6).sqrt()
        # q' = S^(1/2) Uᵀ C_q^(-1/2) q; k' = S^(1/2) Vᵀ C_k^(-1/2) k is its inverse transpose.
        turned_q = scale[:, None] * u.T @ q_inverse
        turned_k = torch.linalg.inv(turned_q).T
        for head in members:
            _turn_rows(core.q, head, turned_q)
        _turn_rows(core.k, owner, turned_k)


def _rotate_v(core: Attention, outputs: Tensor) -> None:
    spec = core.spec
    owners = spec.kv_of if spec.kv_of is not None else tuple(range(spec.heads))
    columns = torch.unflatten(core.out.weight, 1, (spec.heads, spec.v))
    for owner in range(spec.kv_heads):
        members = [head for head, value in enumerate(owners) if value == owner]
        root, inverse = _roots(outputs[members].mean(dim=0))
        weights = columns[:, members].transpose(0, 1).flatten(0, 1).double()
        _, _, vh = torch.linalg.svd(weights @ root, full_matrices=False)
        if vh.shape[0] < spec.v:
            # Fewer outputs than columns: complete the basis.
            vh = torch.linalg.svd(weights @ root, full_matrices=True)[2]
        turned, back = vh @ inverse, root @ vh.T
        _turn_rows(core.v, owner, turned)
        for head in members:
            columns[:, head] = (columns[:, head].double() @ back).to(columns)
    core.out.weight.copy_(columns.flatten(1))


def key_heads(spec: AttentionSpec) -> tuple[int, ...]:
    """The key head that each query head reads; differential attention has two per head."""
    return spec.kv_of if spec.kv_of is not None else tuple(range(spec.heads * spec.parts))


def _turn_rows(linear: nn.Linear, head: int, matrix: Tensor) -> None:
    """Multiply the rows of one head, weights and bias, by a square matrix from the left."""
    width = len(matrix)
    rows = slice(head * width, (head + 1) * width)
    linear.weight[rows] = (matrix @ linear.weight[rows].double()).to(linear.weight)
    if linear.bias is not None:
        linear.bias[rows] = (matrix @ linear.bias[rows].double()).to(linear.bias)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a damped moment matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    damping = DAMPING * float(values.clamp(min=0).mean()) + 1e-12
    roots = (values.clamp(min=0) + damping).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T
