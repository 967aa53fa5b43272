"""Validation of an architecture: paths of blocks, order and numbers of tokens, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .branch_specs import AttentionSpec, check_indices, check_norm
from .select_specs import check_select_pool, selected_tokens

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


def check_learned(architecture: Architecture) -> None:
    """Raise ValueError unless the learned tokens are those of the source model, each once."""
    inner, learned = architecture.inner, architecture.learned
    check_indices("inner", inner, architecture.tokens)
    if inner and inner[0] <= architecture.prefix:
        raise ValueError(f"inner names token {inner[0]}, which belongs to the prefix")
    if (learned is None) != (architecture.source_prefix is None):
        raise ValueError("learned and source_prefix need each other")
    if learned is None:
        if inner:
            raise ValueError("inner needs learned")
        return
    count = architecture.source_tokens
    if len(learned) != architecture.learned_tokens:
        raise ValueError(
            f"learned names {len(learned)} tokens, the network has {architecture.learned_tokens}"
        )
    if len(set(learned)) != len(learned) or max(learned, default=-1) >= count:
        raise ValueError(f"learned must name tokens below {count}, each at most once")


def _check_inner(architecture: Architecture, tokens: int, where: str) -> None:
    if architecture.inner and architecture.inner[0] < tokens:
        raise ValueError(
            f"the learned token {architecture.inner[0]} must leave before {where}, which {tokens} "
            "tokens reach"
        )


def check_tokens(architecture: Architecture) -> None:
    """Raise ValueError unless the numbers of tokens fall, down to what the head reads."""
    check_select_pool(architecture)
    before = architecture.tokens
    for number, step in enumerate(architecture.steps):
        if any(select.at == number for select in architecture.selects):
            _check_inner(architecture, before, "a selection")
        before = selected_tokens(architecture, number, before)
        counts = {branch.tokens for branch in step}
        if len(counts) > 1:
            raise ValueError(f"{step[0].name}: parallel branches must have equal tokens")
        count = counts.pop() if counts else None
        if count is not None and count > before:
            raise ValueError(f"{step[0].name}: {count} tokens, the stream has {before} there")
        before = before if count is None else count
    _check_inner(architecture, before, "the head")
    before = selected_tokens(architecture, len(architecture.steps), before)
    least = least_tokens(architecture)
    if before < least:
        raise ValueError(f"the stream ends with {before} tokens, the head reads {least}")


def check_positions(name: str, core: AttentionSpec, architecture: Architecture) -> None:
    """Raise ValueError unless the positions of an attention are those of the patches."""
    rope, bias, prefix = core.rope, core.bias, architecture.prefix
    behind = architecture.tokens - prefix
    if rope is not None and (rope.tokens, rope.prefix) != (behind, prefix):
        raise ValueError(
            f"{name}.rope is for {rope.prefix} + {rope.tokens} tokens, "
            f"the stem gives {prefix} + {behind}"
        )
    if bias is not None and (bias.grid, bias.prefix) != (architecture.grid, prefix):
        raise ValueError(
            f"{name}.bias is for {bias.prefix} + {bias.grid} tokens, "
            f"the stem gives {prefix} + {architecture.grid}"
        )
    if bias is not None and (bias.order, bias.inner) != (architecture.order, architecture.inner):
        raise ValueError(f"{name}.bias.order differs from the order of the tokens")


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


def pinned_tokens(architecture: Architecture) -> int:
    """Number of leading tokens that the head reads one by one, which cannot leave."""
    return {"token": 1, "distilled": 2, "token_mean": 1, "dense": 1}.get(architecture.pool.kind, 0)


def pools_patches(architecture: Architecture) -> bool:
    """Whether the head pools patches without the learned tokens."""
    pool = architecture.pool
    if pool.kind == "attention":
        return not pool.prefix
    return pool.kind in ("mean", "max", "avgmax", "token_mean", "dense")


def least_tokens(architecture: Architecture) -> int:
    """Number of leading tokens that the stream must carry at its end, for the head to read."""
    if architecture.pool.kind == "none":
        return architecture.tokens
    if pools_patches(architecture):
        return architecture.prefix + 1
    return max(1, pinned_tokens(architecture))
