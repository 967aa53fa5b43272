"""Parameters and multiply-adds of an architecture, by arithmetic.

Conventions: a parameter is a learnable number. One multiply-add is one; batch 1 at the stated image size; matrix products and convolutions count,
attention products included; norms, activations, softmax and additions do not (fvcore's convention for matmul, linear, conv, bmm). With `last_queries` only what
is computed counts.
"""

from __future__ import annotations

import torch

from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from .vit.model import CompactModel


def count_params(architecture: Architecture) -> int:
    """Learnable numbers of the network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CompactModel(architecture).parameters())


def count_macs(architecture: Architecture) -> int:
    """Multiply-adds of one image."""
    patches = architecture.grid[0] * architecture.grid[1]
    patch = architecture.stem.patch
    total = patches * architecture.read_width(architecture.stem_writes) * architecture.image[0] * patch[0] * patch[1]
    total += sum(branch_macs(branch, architecture.embed, tokens, asked) for branch, tokens, asked in branch_tokens(architecture))
    heads = 2 if architecture.pool.kind == "distilled" else 1
    return total + heads * architecture.read_width(architecture.head_reads) * architecture.classes


def branch_tokens(architecture: Architecture) -> list[tuple[BranchSpec, int, int]]:
    """Each branch with the tokens it looks at and the tokens it computes."""
    tokens, asked = architecture.tokens, architecture.pooled_prefix
    with_attention = [
        number for number, step in enumerate(architecture.steps) if any(isinstance(branch.core, AttentionSpec) for branch in step)
    ]
    last = len(architecture.steps)
    if architecture.last_queries and asked:
        last = with_attention[-1] if with_attention else 0
    rows = []
    for number, step in enumerate(architecture.steps):
        for branch in step:
            seen = tokens if number <= last else asked
            rows.append((branch, seen, asked if number >= last else tokens))
    return rows


def branch_macs(branch: BranchSpec, embed: int, tokens: int, asked: int) -> int:
    """Multiply-adds of one sub-layer that looks at `tokens` and computes `asked` of them."""
    width_in = embed if branch.reads is None else len(branch.reads)
    width_out = embed if branch.writes is None else len(branch.writes)
    core = branch.core
    if isinstance(core, AttentionSpec):
        qk, v = core.heads * core.qk, core.heads * core.v
        projections = width_in * (qk * (asked + tokens) + v * tokens) + v * width_out * asked
        return projections + asked * tokens * (qk + v)
    if isinstance(core, FfnSpec):
        return asked * core.hidden * (width_in * (2 if core.gated else 1) + width_out)
    return 0
