"""What a network costs when only some units live: parameters and multiply-adds as functions of live
counts.

The functions are polynomials of the counts, so they run on plain numbers (for a budget) and on sums
of gates (for gradients) alike. `live(dimension, site, indices)` answers how many units live there;
with `indices`, how many of those channels or heads. Input widths are the live ones: what an earlier
mask removed is not paid for by a later layer. `live("block", branch, None)` is 0 for a sub-layer
that has gone as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec, Indices, NormSpec
from .axes import HEAD_IN, POOL_ATTENTION, POOL_FFN, POOL_OUT, STEM_OUT, site_in, site_out
from .count import branch_tokens

Live = Callable[[str, str, Indices | None], Any]
CostKind = Literal["params", "macs"]


def live_cost(architecture: Architecture, live: Live, kind: CostKind) -> Any:
    """Parameters, or multiply-adds an image, of the network that `compact` would build."""
    return live_params(architecture, live) if kind == "params" else live_macs(architecture, live)


def live_params(architecture: Architecture, live: Live) -> Any:
    """Learnable numbers of the live network: what `count_params` finds after the cut."""
    stem, reading = (
        live("embed", STEM_OUT, architecture.stem_writes),
        live("embed", HEAD_IN, architecture.head_reads),
    )
    spec, patches = architecture.stem, architecture.tokens - architecture.prefix
    channels = [architecture.image[0], *(conv.channels for conv in spec.before)]
    total: Any = sum(
        conv.channels * (before * conv.kernel[0] * conv.kernel[1] + conv.bias)
        for conv, before in zip(spec.before, channels, strict=False)
    )
    per_channel = (
        channels[-1] * spec.patch[0] * spec.patch[1]
        + spec.bias
        + architecture.prefix
        + patches * architecture.position
    )
    total = (
        total
        + stem * per_channel
        + _norm(architecture.patch_norm, stem)
        + _norm(architecture.stem_norm, stem)
        + _norm(architecture.norm, reading)
    )
    pooled = reading * (2 if architecture.pool.kind == "token_mean" else 1)
    pool = architecture.pool
    if pool.attention is not None:
        pooled, attention = live("embed", POOL_OUT, None), pool.attention
        heads, qk, v = (live(dimension, POOL_ATTENTION, None) for dimension in ("head", "qk", "v"))
        total = (
            total
            + heads * qk * (1 + reading + attention.k_bias)
            + heads * v * (reading + attention.v_bias)
            + _norm(attention.k_norm, qk)
        )
        total = total + (heads * v + attention.out_bias) * pooled + _norm(pool.norm, pooled)
        if pool.ffn is not None:
            total = total + _ffn_params(pool.ffn, pooled, live("ffn", POOL_FFN, None), pooled)
    total = total + _norm(architecture.pool_norm, pooled)
    head = architecture.head
    if head is not None:
        if head.hidden:
            total, pooled = total + (pooled + 1) * head.hidden, head.hidden
        total = total + architecture.classifiers * (pooled + head.bias) * head.classes
    gone = _gone(architecture, live)
    for branch in architecture.branches:
        if branch.name not in gone:
            total = total + _branch_params(branch, live)
    return total


def live_macs(architecture: Architecture, live: Live) -> Any:
    """Multiply-adds of one image through the live network, attention products included: what
    `count_macs` finds after the cut.
    """
    spec, patches = architecture.stem, architecture.tokens - architecture.prefix
    channels = [architecture.image[0], *(conv.channels for conv in spec.before)]
    sizes = spec.sizes(*architecture.image[1:])
    total: Any = sum(
        down * across * conv.channels * before * conv.kernel[0] * conv.kernel[1]
        for conv, before, (down, across) in zip(spec.before, channels, sizes, strict=False)
    )
    total = total + live("embed", STEM_OUT, architecture.stem_writes) * (
        patches * channels[-1] * spec.patch[0] * spec.patch[1]
    )
    reading = live("embed", HEAD_IN, architecture.head_reads)
    pooled, pool = reading * (2 if architecture.pool.kind == "token_mean" else 1), architecture.pool
    if pool.attention is not None:
        seen = architecture.tokens if pool.prefix else patches
        pooled = live("embed", POOL_OUT, None)
        heads = live("head", POOL_ATTENTION, None)
        qk, v = heads * live("qk", POOL_ATTENTION, None), heads * live("v", POOL_ATTENTION, None)
        total = total + (reading + 1) * (qk + v) * seen + v * pooled
        if pool.ffn is not None:
            total = total + live("ffn", POOL_FFN, None) * pooled * (3 if pool.ffn.gated else 2)
    head = architecture.head
    if head is not None:
        each = (
            pooled * head.hidden + head.hidden * head.classes
            if head.hidden
            else pooled * head.classes
        )
        total = total + each * {"distilled": 2, "dense": 1 + patches}.get(pool.kind, 1)
    for branch, tokens, asked in branch_tokens(architecture, _gone(architecture, live)):
        width_in, width_out = (
            live("embed", site_in(branch), branch.reads),
            live("embed", site_out(branch), branch.writes),
        )
        core = branch.core
        if isinstance(core, AttentionSpec):
            number, stored = (
                live("head", branch.name, None),
                _live_kv_heads(branch.name, core, live),
            )
            each_qk, each_v = (
                live("qk", branch.name, None) * core.parts,
                live("v", branch.name, None),
            )
            qk, v = number * each_qk, number * each_v
            total = (
                total
                + width_in * (qk * asked + stored * (each_qk + each_v) * tokens)
                + v * width_out * asked
                + (qk + v) * (asked * tokens)
            )
            if core.gated:
                total = total + width_in * v * asked
        elif isinstance(core, FfnSpec):
            hidden = live("ffn", branch.name, None)
            total = total + hidden * asked * (width_in * (2 if core.gated else 1) + width_out)
    return total


def movement_cost(architecture: Architecture, live: Live) -> Any:
    """The source's own cost, in parameters (METHODS A): what lambda is multiplied with.

    Linear (n_in + 1) ΣS; convolution (n_in k² + 1) ΣS; LayerNorm 2 ΣS; attention n_in ΣS_H (2 ΣS_QK
    + ΣS_V) + (ΣS_H ΣS_V + 1) ΣS_O. Grouped queries are not in the source: their keys and values are
    counted once a group.
    """
    stem, reading = (
        live("embed", STEM_OUT, architecture.stem_writes),
        live("embed", HEAD_IN, architecture.head_reads),
    )
    patch = architecture.stem.patch
    total = (architecture.image[0] * patch[0] * patch[1] + 1) * stem
    for norm, width in (
        (architecture.stem_norm, stem),
        (architecture.norm, reading),
        (architecture.pool_norm, reading),
    ):
        if norm is not None:
            total = total + 2 * width
    total = total + architecture.classifiers * (reading + 1) * architecture.classes
    for branch in architecture.branches:
        n_in, n_out = (
            live("embed", site_in(branch), branch.reads),
            live("embed", site_out(branch), branch.writes),
        )
        if branch.norm is not None:
            total = total + 2 * n_in
        if branch.post_norm is not None:
            total = total + 2 * n_out
        core = branch.core
        if isinstance(core, AttentionSpec):
            heads, qk, v = (live(dimension, branch.name, None) for dimension in ("head", "qk", "v"))
            total = (
                total
                + n_in * (heads * qk + _live_kv_heads(branch.name, core, live) * (qk + v))
                + (heads * v + 1) * n_out
            )
        elif isinstance(core, FfnSpec):
            hidden = live("ffn", branch.name, None)
            total = total + (n_in + 1) * hidden * (2 if core.gated else 1) + (hidden + 1) * n_out
    return total


def _gone(architecture: Architecture, live: Live) -> set[str]:
    return {branch.name for branch in architecture.branches if not live("block", branch.name, None)}


def _branch_params(branch: BranchSpec, live: Live) -> Any:
    width_in, width_out = (
        live("embed", site_in(branch), branch.reads),
        live("embed", site_out(branch), branch.writes),
    )
    total = (
        _norm(branch.norm, width_in)
        + _norm(branch.post_norm, width_out)
        + width_out * branch.layer_scale
    )
    core = branch.core
    if isinstance(core, AttentionSpec):
        heads, qk, v = (live(dimension, branch.name, None) for dimension in ("head", "qk", "v"))
        stored = _live_kv_heads(branch.name, core, live)
        total = total + heads * core.parts * qk * (width_in + core.q_bias)
        total = total + stored * (
            core.parts * qk * (width_in + core.k_bias) + v * (width_in + core.v_bias)
        )
        rows = (heads * core.parts, stored * core.parts) if core.qk_norm_per_head else (1, 1)
        total = (
            total
            + rows[0] * _norm(core.q_norm, qk)
            + rows[1] * _norm(core.k_norm, qk)
            + _norm(core.out_norm, heads * v)
        )
        total = total + (heads if core.head_norm_per_head else 1) * _norm(core.head_norm, v)
        if core.gated:
            total = total + heads * v * (width_in + core.gate_bias)
        if core.bias is not None:
            total = total + heads * core.bias.rows
        if core.differential is not None:
            total = total + (2 if core.differential.dual else 4 * core.differential.width)
        return total + (heads * v + core.out_bias) * width_out
    if isinstance(core, FfnSpec):
        return total + _ffn_params(core, width_in, live("ffn", branch.name, None), width_out)
    return total + width_out


def _live_kv_heads(site: str, core: AttentionSpec, live: Live) -> Any:
    """Heads of keys and values that some live head asks: as many as heads, but where queries are
    grouped.

    1 - product over a group of (1 - live) is 1 as soon as one of its heads lives, and its slope at
    a head is what that head alone decides: nothing while another of the group lives.
    """
    if core.kv_of is None:
        return live("head", site, None)
    total: Any = 0
    for group in range(core.kv_heads):
        nobody: Any = 1
        for head, asked in enumerate(core.kv_of):
            if asked == group:
                nobody = nobody * (1 - live("head", site, (head,)))
        total = total + (1 - nobody)
    return total


def _ffn_params(core: FfnSpec, width_in: Any, hidden: Any, width_out: Any) -> Any:
    rows = (width_in + core.in_bias) + ((width_in + core.gate_bias) if core.gated else 0)
    return hidden * rows + _norm(core.norm, hidden) + (hidden + core.out_bias) * width_out


def _norm(norm: NormSpec | None, width: Any) -> Any:
    return 0 if norm is None else width * (norm.weight + norm.bias)
