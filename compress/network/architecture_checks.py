"""Validation of an architecture: paths of blocks, order and numbers of tokens, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .branch_specs import AttentionSpec, check_indices, check_norm
from .select_specs import selected_tokens

if TYPE_CHECKING:
    from .architecture import Architecture


def check_blocks(architecture: Architecture) -> None:
    """Raise ValueError unless the branches belong to the named blocks, in order."""
    blocks = architecture.blocks
    if blocks is None:
        return
    if len(set(blocks)) != len(blocks):
        raise ValueError("two blocks have the same path")
    number = 0
    for branch in architecture.branches:
        while number < len(blocks) and not branch.name.startswith(f"{blocks[number]}."):
            number += 1
        if number == len(blocks):
            raise ValueError(f"blocks has no block of {branch.name}, or in another order")


def check_order(architecture: Architecture) -> None:
    """Raise ValueError unless the order names patches of the grid, each at most once."""
    if architecture.order is None:
        return
    patches = architecture.grid[0] * architecture.grid[1]
    if not architecture.order or len(set(architecture.order)) != len(architecture.order):
        raise ValueError("order must name at least one patch, and each at most once")
    if max(architecture.order) >= patches:
        raise ValueError(f"order names patch {max(architecture.order)}, the grid has {patches}")


def check_tokens(architecture: Architecture) -> None:
    """Raise ValueError unless the numbers of tokens fall, down to what the head reads."""
    before = architecture.tokens
    for number, step in enumerate(architecture.steps):
        before = selected_tokens(architecture, number, before)
        counts = {branch.tokens for branch in step}
        if len(counts) > 1:
            raise ValueError(f"{step[0].name}: parallel branches must have equal tokens")
        count = counts.pop() if counts else None
        if count is not None and count > before:
            raise ValueError(f"{step[0].name}: {count} tokens, the stream has {before} there")
        before = before if count is None else count
    before = selected_tokens(architecture, len(architecture.steps), before)
    least = least_tokens(architecture)
    if before < least:
        raise ValueError(f"the stream ends with {before} tokens, the head reads {least}")


def check_positions(name: str, core: AttentionSpec, architecture: Architecture) -> None:
    """Raise ValueError unless the positions of an attention are those of the patches."""
    rope, bias, prefix = core.rope, core.bias, architecture.prefix
    if rope is not None and (rope.tokens, rope.prefix) != (architecture.patches, prefix):
        raise ValueError(
            f"{name}.rope is for {rope.prefix} + {rope.tokens} tokens, "
            f"the stem gives {prefix} + {architecture.patches}"
        )
    if bias is not None and (bias.grid, bias.prefix) != (architecture.grid, prefix):
        raise ValueError(
            f"{name}.bias is for {bias.prefix} + {bias.grid} tokens, "
            f"the stem gives {prefix} + {architecture.grid}"
        )
    if bias is not None and bias.order != architecture.order:
        raise ValueError(f"{name}.bias.order differs from the order of the patches")


def check_output(architecture: Architecture) -> None:
    """Raise ValueError unless norms, pooling and classifier fit what the head reads."""
    read = architecture.read_width(architecture.head_reads)
    check_indices("head_reads", architecture.head_reads, architecture.embed)
    check_norm("norm", architecture.norm, read)
    check_norm("pool_norm", architecture.pool_norm, architecture.head_width)
    refine = architecture.pool.refine
    if refine is not None and architecture.norm is None:
        raise ValueError("pool.refine needs the norm before it")
    if refine is not None and sum(refine.channels) != read:
        raise ValueError(f"pool.refine has {sum(refine.channels)} channels, the head reads {read}")
    if architecture.pool_norm is not None and architecture.pool.kind in ("distilled", "dense"):
        raise ValueError(f"pool '{architecture.pool.kind}' has no norm after pooling")
    if architecture.pool.kind == "none" and architecture.head is not None:
        raise ValueError("a classifier needs a pooling, pool.kind is 'none'")
    if (architecture.feature_width is None) != (architecture.feature_writes is None):
        raise ValueError("feature_width and feature_writes need each other")
    if architecture.feature_writes is not None and architecture.feature_width is not None:
        check_indices("feature_writes", architecture.feature_writes, architecture.feature_width)
        if len(architecture.feature_writes) != architecture.head_width:
            raise ValueError(
                f"feature_writes names {len(architecture.feature_writes)} features, "
                f"the network has {architecture.head_width}"
            )


def least_tokens(architecture: Architecture) -> int:
    """Number of leading tokens that the stream must carry at its end, for the head to read."""
    kind, prefix = architecture.pool.kind, architecture.prefix
    if architecture.pool.kind == "none":
        return architecture.tokens
    if architecture.pooled_prefix:
        return architecture.pooled_prefix
    if kind.endswith("_all") or (kind == "attention" and architecture.pool.prefix):
        return 1
    return prefix + 1
