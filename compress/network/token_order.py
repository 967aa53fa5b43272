"""The order of the tokens behind the stem: learned ones in front, patches, learned ones between.

A learned token that the head does not read (a register, or a class token beside a pooling of
patches) may leave before the last patch does. Since every set of tokens is a number of leading
ones, such a token stands between the patches, in front of those that leave before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.errors import InputError

if TYPE_CHECKING:
    from .architecture import Architecture


# Runs of tokens: whether these are learned, and the first and the end among such tokens.
Runs = tuple[tuple[bool, int, int], ...]


def stem_runs(architecture: Architecture) -> Runs:
    """The stream behind the stem as runs of learned tokens and of patches.

    Returns:
        For each run: whether its tokens are learned, and the first and the end of them, among the
        learned tokens or among the patches.
    """
    runs: list[tuple[bool, int, int]] = [(True, 0, architecture.prefix)]
    patches = 0
    for learned, before in enumerate(patches_before(architecture), start=architecture.prefix):
        runs += [(False, patches, before), (True, learned, learned + 1)]
        patches = before
    runs.append((False, patches, architecture.patches))
    merged: list[tuple[bool, int, int]] = []
    for is_learned, start, stop in runs:
        if start == stop:
            continue
        if merged and merged[-1][0] == is_learned:
            start = merged.pop()[1]
        merged.append((is_learned, start, stop))
    return tuple(merged)


def patches_before(architecture: Architecture) -> tuple[int, ...]:
    """For each learned token between the patches the number of patches before it."""
    return tuple(
        place - architecture.prefix - number
        for number, place in enumerate(architecture.inner or ())
    )


def patch_positions(architecture: Architecture, tokens: int | None = None) -> list[int]:
    """Places in the stream of the patches among the first `tokens`, or among all."""
    inner = set(architecture.inner or ())
    stop = architecture.tokens if tokens is None else tokens
    return [place for place in range(architecture.prefix, stop) if place not in inner]


def grid_places(architecture: Architecture, tokens: int | None = None) -> tuple[int, ...]:
    """Places in the grid of the patches among the first `tokens` of the stream, or of all."""
    count = len(patch_positions(architecture, tokens))
    return tuple(range(count)) if architecture.order is None else architecture.order[:count]


def token_places(architecture: Architecture) -> tuple[int, ...]:
    """For each token behind the stem its place among the learned tokens and the grid at the source.

    A place in the grid is counted behind all learned tokens of the source model.
    """
    learned = architecture.learned
    first = tuple(range(architecture.learned_tokens)) if learned is None else learned
    patches = [architecture.source_tokens + place for place in grid_places(architecture)]
    return tuple(
        place
        for is_learned, start, stop in stem_runs(architecture)
        for place in (first if is_learned else patches)[start:stop]
    )


def require_no_inner(architecture: Architecture, purpose: str) -> None:
    """Raise InputError if learned tokens stand between patches, which `purpose` does not support.

    Args:
        architecture: The network.
        purpose: What is to be done with it, at the beginning of the message.
    """
    if architecture.inner:
        raise InputError(
            f"{purpose}: token {architecture.inner[0]} of this network is learned and stands "
            "between its patches, since it leaves before them; do this before such tokens leave"
        )
