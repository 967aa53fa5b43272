"""The nested sets of tokens that a mask describes, and how they are validated and drawn.

An entry `token/<site>` states which tokens the stream carries after a sub-layer (or after the stem,
site `stem.out`). A site without an entry carries what the site before it does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture
from ..network.architecture_checks import pinned_tokens, pools_patches
from ..network.axes import STEM_OUT
from ..network.select_specs import static_steps
from ..network.token_order import patch_positions
from .groups import token_sites


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
        patches = int(keep[patch_positions(architecture, len(keep))].sum())
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
    where, kind = f"mask token/{site}", architecture.pool.kind
    if kind == "none":
        if not bool(keep.all()):
            raise InputError(
                f"{where} drops {int((~keep).sum())} tokens, and the network returns every token; "
                "add a pooling first (reset_classifier)"
            )
        return
    missing = torch.nonzero(~keep[: pinned_tokens(architecture)]).flatten().tolist()
    if missing:
        raise InputError(f"{where} drops token {missing[0]}, which the head reads")
    if not bool(keep.any()):
        raise InputError(f"{where} keeps 0 of {len(keep)} tokens; the head needs at least 1")
    patches = int(keep[patch_positions(architecture, len(keep))].sum())
    if not patches and (site == STEM_OUT or pools_patches(architecture)):
        why = "the stem must embed" if site == STEM_OUT else "the head pools them and needs"
        raise InputError(f"{where} keeps no patch; {why} one at least")
    learned = [place for place in range(architecture.prefix) if not keep[place]]
    if learned and architecture.selects:
        raise InputError(
            f"{where} drops learned token {learned[0]}; {architecture.selects[0].name} chooses "
            "patches for each image and moves all learned tokens on, so drop it before that "
            "selection is added"
        )


def random_token_sets(
    architecture: Architecture,
    ratio: float,
    generator: torch.Generator,
    *,
    learned_ratio: float = 1.0,
) -> dict[str, Tensor]:
    """Draw nested sets that keep a share of the patches until the last attention.

    Each patch that leaves does so after the stem or after a sub-layer before the last attention,
    drawn uniformly.

    Args:
        architecture: The network.
        ratio: The share of the patches that the last attention reads, at least one patch.
        generator: The source of randomness.
        learned_ratio: The share of the learned tokens in front that the last attention reads. What
            the head reads stays in any case.

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
    patches = torch.tensor(patch_positions(architecture, sizes[-1][1]), dtype=torch.long)
    if not len(patches):
        return {}
    least = architecture.selects[0].left + 1 if architecture.selects else 1
    kept = max(least, round(ratio * len(patches)))
    leaving = patches[torch.randperm(len(patches), generator=generator)[kept:]]
    # Tokens that the network drops by itself further on stay until then.
    depth = torch.full((architecture.tokens,), len(sizes))
    depth[leaving] = torch.randint(len(sizes), (len(leaving),), generator=generator)
    if learned_ratio < 1.0:
        first = pinned_tokens(architecture)
        free = torch.arange(first, architecture.prefix)
        free = free[torch.randperm(len(free), generator=generator)]
        free = free[round(learned_ratio * len(free)) :]
        depth[free] = torch.randint(len(sizes), (len(free),), generator=generator)
    return {site: depth[:count] > number for number, (site, count) in enumerate(sizes)}
