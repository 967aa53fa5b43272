"""Parameters and multiply-adds of an architecture, by arithmetic.

Conventions: a parameter is a learnable number. One multiply-add is one; batch 1 at the stated image
size; matrix products and convolutions count, attention products included; norms, activations,
softmax and additions do not (fvcore's convention for matmul, linear, conv, bmm). With
`last_queries` only what is computed counts.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from .modules.model import CompactModel


def count_params(architecture: Architecture) -> int:
    """Learnable numbers of the network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CompactModel(architecture).parameters())


def count_macs(architecture: Architecture) -> int:
    """Multiply-adds of one image."""
    total = _stem_macs(architecture)
    total += sum(
        branch_macs(branch, architecture.embed, tokens, asked)
        for branch, tokens, asked in branch_tokens(architecture)
    )
    return total + _pool_macs(architecture) + _head_macs(architecture)


def _stem_macs(architecture: Architecture) -> int:
    stem = architecture.stem
    total, channels = 0, architecture.image[0]
    sizes = stem.sizes(*architecture.image[1:])
    for conv, (height, width) in zip(stem.before, sizes, strict=False):
        total += height * width * conv.channels * channels * conv.kernel[0] * conv.kernel[1]
        channels = conv.channels
    height, width = sizes[-1]
    return (
        total
        + height
        * width
        * architecture.read_width(architecture.stem_writes)
        * channels
        * stem.patch[0]
        * stem.patch[1]
    )


def _pool_macs(architecture: Architecture) -> int:
    pool, tokens, width_in = (
        architecture.pool,
        architecture.tokens,
        architecture.read_width(architecture.head_reads),
    )
    total = 0
    if pool.refine is not None:
        # Heads of unequal width are filled up to the widest.
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
    # Of a dense head the second classifier looks at every patch.
    patches = architecture.tokens - architecture.prefix
    return each * {"distilled": 2, "dense": 1 + patches}.get(architecture.pool.kind, 1)


def branch_tokens(
    architecture: Architecture, gone: Collection[str] = ()
) -> list[tuple[BranchSpec, int, int]]:
    """Each branch, but those named in `gone`, with the tokens it looks at and the tokens it
    computes.
    """
    tokens, asked = architecture.tokens, architecture.pooled_prefix
    with_attention = [
        number
        for number, step in enumerate(architecture.steps)
        if any(
            isinstance(branch.core, AttentionSpec) and branch.name not in gone for branch in step
        )
    ]
    last = len(architecture.steps)
    if architecture.last_queries and asked:
        last = with_attention[-1] if with_attention else 0
    rows = []
    for number, step in enumerate(architecture.steps):
        for branch in step:
            if branch.name in gone:
                continue
            seen = tokens if number <= last else asked
            rows.append((branch, seen, asked if number >= last else tokens))
    return rows


def branch_macs(branch: BranchSpec, embed: int, tokens: int, asked: int) -> int:
    """Multiply-adds of one sub-layer that looks at `tokens` and computes `asked` of them."""
    width_in = embed if branch.reads is None else len(branch.reads)
    width_out = embed if branch.writes is None else len(branch.writes)
    core = branch.core
    if isinstance(core, AttentionSpec):
        qk, v = core.heads * core.parts * core.qk, core.heads * core.v
        keys, values = core.kv_heads * core.parts * core.qk, core.kv_heads * core.v
        projections = width_in * (qk * asked + (keys + values) * tokens) + v * width_out * asked
        gate = width_in * v * asked if core.gated else 0
        # Differential attention takes one map off the other before it meets the values.
        return projections + gate + asked * tokens * (qk + v)
    if isinstance(core, FfnSpec):
        return asked * core.hidden * (width_in * (2 if core.gated else 1) + width_out)
    return 0
