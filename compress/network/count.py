"""Parameters and multiply-adds of an architecture, computed without running it.

Conventions: a parameter is a learnable number. One multiply-add counts once, for one image of the
architecture's size. Matrix products and convolutions count, attention products included; norms,
activations, softmax and additions do not (as in fvcore for matmul, linear, conv and bmm). With
`last_queries` or after tokens were dropped only the tokens that are computed count.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from .modules.model import CompactModel
from .select_specs import select_inputs, select_macs, select_widths


def count_params(architecture: Architecture) -> int:
    """Number of parameters of the network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CompactModel(architecture).parameters())


def count_macs(architecture: Architecture) -> int:
    """Number of multiply-adds for one image."""
    total = stem_macs(architecture)
    total += sum(
        branch_macs(branch, architecture.embed, tokens, queries)
        for branch, tokens, queries in branch_tokens(architecture)
    )
    total += sum(all_select_macs(architecture).values())
    return total + _pool_macs(architecture) + _head_macs(architecture)


def all_select_macs(architecture: Architecture) -> dict[str, int]:
    """Number of multiply-adds of each selection for one image, by name."""
    counts = (architecture.tokens, *architecture.step_tokens())
    return {
        select.name: select_macs(
            architecture, select, select_widths(architecture, select), before, tokens
        )
        for select, before, tokens in select_inputs(architecture, counts)
    }


def stem_macs(architecture: Architecture) -> int:
    """Number of multiply-adds of the stem for one image."""
    stem = architecture.stem
    total, channels = stem.before_macs(*architecture.image), stem.inputs(architecture.image[0])[-1]
    filled = architecture.read_width(architecture.stem_writes)
    return total + architecture.patches * filled * channels * stem.patch[0] * stem.patch[1]


def _pool_macs(architecture: Architecture) -> int:
    pool, tokens = architecture.pool, architecture.final_tokens
    width_in = architecture.read_width(architecture.head_reads)
    total = 0
    if pool.refine is not None:
        # Heads of unequal width are padded to the widest.
        total += 2 * tokens * tokens * len(pool.refine.channels) * max(pool.refine.channels)
    if pool.attention is not None and pool.width is not None:
        seen = tokens if pool.prefix else tokens - architecture.prefix
        qk, v = pool.attention.heads * pool.attention.qk, pool.attention.heads * pool.attention.v
        total += seen * (width_in + 1) * (qk + v) + v * pool.width
        if pool.ffn is not None:
            total += pool.ffn.hidden * pool.width * (3 if pool.ffn.gated else 2)
    return total


def _head_macs(architecture: Architecture) -> int:
    head, width = architecture.head, architecture.head_width
    if head is None:
        return 0
    each = width * head.hidden + head.hidden * head.classes if head.hidden else width * head.classes
    # The second classifier of a dense head reads every patch.
    patches = architecture.final_tokens - architecture.prefix
    return each * {"distilled": 2, "dense": 1 + patches}.get(architecture.pool.kind, 1)


def branch_tokens(
    architecture: Architecture, removed: Collection[str] = ()
) -> list[tuple[BranchSpec, int, int]]:
    """List the branches with the number of tokens that each reads, and that each computes.

    Branches named in `removed` are left out, and are not counted as the last attention.
    """
    after = architecture.step_tokens(removed=removed)
    return [
        (branch, tokens, queries)
        for step, tokens, queries in zip(
            architecture.steps, architecture.step_inputs(removed=removed), after, strict=True
        )
        for branch in step
        if branch.name not in removed
    ]


def branch_macs(branch: BranchSpec, embed: int, tokens: int, queries: int) -> int:
    """Number of multiply-adds of one sub-layer for one image.

    Args:
        branch: The sub-layer.
        embed: Number of channels of the residual stream.
        tokens: Number of tokens that the sub-layer reads.
        queries: Number of tokens that it computes; an FFN reads no others.

    Returns:
        The count, attention products included; 0 for a constant.
    """
    width_in = embed if branch.reads is None else len(branch.reads)
    width_out = embed if branch.writes is None else len(branch.writes)
    core = branch.core
    if isinstance(core, AttentionSpec):
        qk, v = core.heads * core.parts * core.qk, core.heads * core.v
        keys, values = core.kv_heads * core.parts * core.qk, core.kv_heads * core.v
        projections = width_in * (qk * queries + (keys + values) * tokens) + v * width_out * queries
        gate = width_in * v * queries if core.gated else 0
        # Differential attention subtracts its maps before the one product with the values.
        return projections + gate + queries * tokens * (qk + v)
    if isinstance(core, FfnSpec):
        return queries * core.hidden * (width_in * (2 if core.gated else 1) + width_out)
    return 0
