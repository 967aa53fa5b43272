"""The nested sets of tokens that a mask describes, and how they are validated and drawn.

An entry `token/<site>` states which tokens the stream carries after a sub-layer (or after the stem,
site `stem.out`). A site without an entry carries what the site before it does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture, least_tokens
from ..network.axes import STEM_OUT
from .groups import static_steps, token_sites


def token_sets(architecture: Architecture, entries: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens that the stream carries after the stem and after each step.

    Args:
        architecture: The network before the cut.
        entries: The entries of dimension `token`, by site.

    Returns:
        One boolean tensor for the stem and one for each step, each over all tokens of the stem.
    """
    sets: list[Tensor] = []
    current = torch.ones(architecture.tokens, dtype=torch.bool)
    for site, count in token_sites(architecture).items():
        current = current.clone()
        current[count:] = False
        if site in entries:
            current[:count] &= entries[site].cpu()
        sets.append(current)
    return sets


def check_tokens(architecture: Architecture, entries: Mapping[str, Tensor]) -> None:
    """Validate that token sets are nested and contain what the head reads.

    Raises:
        InputError: The first site that is wrong; the message names it and the token.
    """
    before = torch.ones(architecture.tokens, dtype=torch.bool)
    for site, count in token_sites(architecture).items():
        before = before.clone()
        before[count:] = False
        if site not in entries:
            continue
        keep = torch.zeros_like(before)
        keep[:count] = entries[site].cpu()
        _check_nested(site, keep, before)
        _check_pinned(architecture, site, keep)
        before = keep
    _check_selectable(architecture, before)


def _check_selectable(architecture: Architecture, keep: Tensor) -> None:
    """Validate that the first selection has more patches than it keeps."""
    for select in architecture.selects[:1]:
        patches = int(keep[architecture.prefix :].sum())
        if patches <= select.left:
            raise InputError(
                f"mask token leaves {patches} patches before {select.name}, which keeps "
                f"{select.left}; keep more of them, or choose fewer there"
            )


def _check_nested(site: str, keep: Tensor, before: Tensor) -> None:
    returned = torch.nonzero(keep & ~before).flatten().tolist()
    if returned:
        raise InputError(
            f"mask token/{site} keeps {len(returned)} tokens that an earlier site has dropped, the "
            f"first is token {returned[0]}; the sets must be nested"
        )


def _check_pinned(architecture: Architecture, site: str, keep: Tensor) -> None:
    prefix, where = architecture.prefix, f"mask token/{site}"
    kind = architecture.pool.kind
    if kind == "none":
        if not bool(keep.all()):
            raise InputError(
                f"{where} drops {int((~keep).sum())} tokens, and the network returns every token; "
                "add a pooling first (reset_classifier)"
            )
        return
    pinned = architecture.pooled_prefix or (1 if kind in ("token_mean", "dense", "token") else 0)
    missing = torch.nonzero(~keep[:pinned]).flatten().tolist()
    if missing:
        raise InputError(f"{where} drops token {missing[0]}, which the head reads")
    if int(keep.sum()) < least_tokens(architecture):
        raise InputError(
            f"{where} keeps {int(keep.sum())} of {len(keep)} tokens; the head needs at least "
            f"{least_tokens(architecture)}"
        )
    patches = int(keep[prefix:].sum())
    if site == STEM_OUT and not patches:
        raise InputError(f"{where} keeps no patch; the stem must embed one at least")
    dropped = torch.nonzero(~keep[:prefix]).flatten().tolist()
    if dropped and (patches or bool(keep[dropped[0] : prefix].any())):
        raise InputError(
            f"{where} drops prefix token {dropped[0]} and keeps {patches} patches; prefix tokens "
            "are the first of the stream, so they leave after all patches, the last one first"
        )


def random_token_sets(
    architecture: Architecture, ratio: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw nested sets that keep a share of the patches until the last attention.

    Each patch that leaves does so after the stem or after a sub-layer before the last attention,
    drawn uniformly.

    Args:
        architecture: The network.
        ratio: The share of the patches that the last attention reads, at least one patch.
        generator: The source of randomness.

    Returns:
        An entry for each site up to the last attention.

    Raises:
        InputError: The network returns every token.
    """
    if architecture.pool.kind == "none":
        raise InputError(
            "keep_ratio token: the network returns every token, so none can be dropped"
        )
    # Behind the last attention tokens do not mix any more.
    last = max(architecture.attention_steps(), default=len(architecture.steps))
    last = min(last, static_steps(architecture))
    sizes = list(token_sites(architecture).items())[: last + 1]
    prefix = architecture.prefix
    patches = sizes[-1][1] - prefix
    if patches < 1:
        return {}
    least = architecture.selects[0].left + 1 if architecture.selects else 1
    kept = max(least, round(ratio * patches))
    leaving = torch.randperm(patches, generator=generator)[kept:]
    depth = torch.full((patches,), len(sizes))
    depth[leaving] = torch.randint(len(sizes), (len(leaving),), generator=generator)
    entries: dict[str, Tensor] = {}
    for number, (site, count) in enumerate(sizes):
        keep = torch.zeros(count, dtype=torch.bool)
        keep[:prefix] = True
        # Patches that the network drops by itself further on stay until then.
        keep[prefix + patches :] = True
        keep[prefix : prefix + patches] = depth > number
        entries[site] = keep
    return entries
