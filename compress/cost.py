"""What a network costs when only some units live: parameters and multiply-adds as functions of live counts.

The functions are polynomials of the counts, so they run on plain numbers (for a budget) and on sums of gates (for gradients) alike. `live(dimension, site,
indices)` answers how many units live there; with `indices`, how many of those channels. Input widths are the live ones: what an earlier mask
removed is not paid for by a later layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec, Indices, NormSpec
from .axes import HEAD_IN, STEM_OUT, site_in, site_out
from .count import branch_tokens

Live = Callable[[str, str, Indices | None], Any]
CostKind = Literal["params", "macs"]


def live_cost(architecture: Architecture, live: Live, kind: CostKind) -> Any:
    """Parameters, or multiply-adds an image, of the network that `compact` would build."""
    return live_params(architecture, live) if kind == "params" else live_macs(architecture, live)


def live_params(architecture: Architecture, live: Live) -> Any:
    """Learnable numbers of the live network: what `count_params` finds after the cut."""
    stem, reading = live("embed", STEM_OUT, architecture.stem_writes), live("embed", HEAD_IN, architecture.head_reads)
    patch, patches = architecture.stem.patch, architecture.tokens - architecture.prefix
    per_channel = architecture.image[0] * patch[0] * patch[1] + architecture.stem.bias + architecture.prefix + patches * architecture.position
    total = stem * per_channel + _norm(architecture.stem_norm, stem) + _norm(architecture.norm, reading) + _norm(architecture.pool_norm, reading)
    heads = 2 if architecture.pool.kind == "distilled" else 1
    total = total + heads * (reading + (architecture.head is not None and architecture.head.bias)) * architecture.classes
    for branch in architecture.branches:
        total = total + _branch_params(branch, live)
    return total


def live_macs(architecture: Architecture, live: Live) -> Any:
    """Multiply-adds of one image through the live network, attention products included: what `count_macs` finds after the cut."""
    patch, patches = architecture.stem.patch, architecture.tokens - architecture.prefix
    total = live("embed", STEM_OUT, architecture.stem_writes) * (patches * architecture.image[0] * patch[0] * patch[1])
    heads = 2 if architecture.pool.kind == "distilled" else 1
    total = total + live("embed", HEAD_IN, architecture.head_reads) * (heads * architecture.classes)
    for branch, tokens, asked in branch_tokens(architecture):
        width_in, width_out = live("embed", site_in(branch), branch.reads), live("embed", site_out(branch), branch.writes)
        core = branch.core
        if isinstance(core, AttentionSpec):
            number = live("head", branch.name, None)
            qk, v = number * live("qk", branch.name, None), number * live("v", branch.name, None)
            total = total + width_in * (qk * (asked + tokens) + v * tokens) + v * width_out * asked + (qk + v) * (asked * tokens)
        elif isinstance(core, FfnSpec):
            hidden = live("ffn", branch.name, None)
            total = total + hidden * asked * (width_in * (2 if core.gated else 1) + width_out)
    return total


def movement_cost(architecture: Architecture, live: Live) -> Any:
    """The source's own cost, in parameters (METHODS A): what lambda is multiplied with.

    Linear (n_in + 1) ΣS; convolution (n_in k² + 1) ΣS; LayerNorm 2 ΣS; attention n_in ΣS_H (2 ΣS_QK + ΣS_V) + (ΣS_H ΣS_V + 1) ΣS_O.
    """
    stem, reading = live("embed", STEM_OUT, architecture.stem_writes), live("embed", HEAD_IN, architecture.head_reads)
    patch = architecture.stem.patch
    total = (architecture.image[0] * patch[0] * patch[1] + 1) * stem
    for norm, width in ((architecture.stem_norm, stem), (architecture.norm, reading), (architecture.pool_norm, reading)):
        if norm is not None:
            total = total + 2 * width
    total = total + (2 if architecture.pool.kind == "distilled" else 1) * (reading + 1) * architecture.classes
    for branch in architecture.branches:
        n_in, n_out = live("embed", site_in(branch), branch.reads), live("embed", site_out(branch), branch.writes)
        if branch.norm is not None:
            total = total + 2 * n_in
        if branch.post_norm is not None:
            total = total + 2 * n_out
        core = branch.core
        if isinstance(core, AttentionSpec):
            heads, qk, v = (live(dimension, branch.name, None) for dimension in ("head", "qk", "v"))
            total = total + n_in * heads * (2 * qk + v) + (heads * v + 1) * n_out
        elif isinstance(core, FfnSpec):
            hidden = live("ffn", branch.name, None)
            total = total + (n_in + 1) * hidden * (2 if core.gated else 1) + (hidden + 1) * n_out
    return total


def _branch_params(branch: BranchSpec, live: Live) -> Any:
    width_in, width_out = live("embed", site_in(branch), branch.reads), live("embed", site_out(branch), branch.writes)
    total = _norm(branch.norm, width_in) + _norm(branch.post_norm, width_out) + width_out * branch.layer_scale
    core = branch.core
    if isinstance(core, AttentionSpec):
        heads, qk, v = (live(dimension, branch.name, None) for dimension in ("head", "qk", "v"))
        total = total + heads * qk * (2 * width_in + core.q_bias + core.k_bias) + heads * v * (width_in + core.v_bias)
        shared = heads if core.qk_norm_per_head else 1
        total = total + shared * (_norm(core.q_norm, qk) + _norm(core.k_norm, qk)) + _norm(core.out_norm, heads * v)
        return total + (heads * v + core.out_bias) * width_out
    if isinstance(core, FfnSpec):
        hidden = live("ffn", branch.name, None)
        rows = (width_in + core.in_bias) + ((width_in + core.gate_bias) if core.gated else 0)
        return total + hidden * rows + _norm(core.norm, hidden) + (hidden + core.out_bias) * width_out
    return total + width_out


def _norm(norm: NormSpec | None, width: Any) -> Any:
    return 0 if norm is None else width * (norm.weight + norm.bias)
