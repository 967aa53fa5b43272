"""The groups of units that a mask consists of: dimensions, the sites of each, and tied units."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import read
from ..network.architecture import Architecture, AttentionSpec, FfnSpec
from ..network.axes import (
    HEAD_IN,
    POOL_ATTENTION,
    POOL_FFN,
    POOL_OUT,
    STEM_OUT,
    has_own_mask,
    site_in,
    site_out,
)
from ..network.modules.rope import pairs
from ..network.select_specs import static_steps

Sharing = Literal["unshared", "residual", "full"]
ScaleRule = Literal["kept", "original"]
# Units of these dimensions are parameters, or own some.
WIDTHS = ("embed", "head", "qk", "v", "ffn", "block")
DIMENSIONS = (*WIDTHS, "token")
SHARED = "*"


def sites(architecture: Architecture, dimension: str) -> dict[str, int]:
    """The sites of a network at which a dimension occurs: site -> size."""
    found: dict[str, int] = {}
    if dimension == "token":
        return token_sites(architecture)
    if dimension == "embed":
        found[STEM_OUT] = architecture.embed
    for branch in architecture.branches:
        core = branch.core
        if dimension == "embed":
            found[site_in(branch)] = found[site_out(branch)] = architecture.embed
        elif dimension == "block":
            found[branch.name] = 1
        elif isinstance(core, AttentionSpec) and dimension in ("head", "qk", "v"):
            found[branch.name] = {"head": core.heads, "qk": core.qk, "v": core.v}[dimension]
        elif isinstance(core, FfnSpec) and dimension == "ffn":
            found[branch.name] = core.hidden
    for select in architecture.selects:
        if dimension == "ffn":
            found |= select.hidden_sites
        elif dimension == "embed" and select.predictor is not None:
            found[select.site_in] = architecture.embed
    pool = architecture.pool
    if dimension == "embed":
        found[HEAD_IN] = architecture.embed
        if pool.width is not None:
            found[POOL_OUT] = pool.width
    elif pool.attention is not None and dimension in ("head", "qk", "v"):
        found[POOL_ATTENTION] = {
            "head": pool.attention.heads,
            "qk": pool.attention.qk,
            "v": pool.attention.v,
        }[dimension]
    elif pool.ffn is not None and dimension == "ffn":
        found[POOL_FFN] = pool.ffn.hidden
    return found


def token_sites(architecture: Architecture) -> dict[str, int]:
    """The sites of the token masks: the stem, and each step, named by its first branch.

    Behind a selection by content there are none.

    Returns:
        Site -> number of tokens that the stream carries there, prefix tokens included.
    """
    found = {STEM_OUT: architecture.tokens}
    # Which tokens the last attention skips for the head is no part of a mask.
    counts = architecture.step_tokens(False)[: static_steps(architecture)]
    for step, count in zip(architecture.steps, counts, strict=False):
        found[step[0].name] = count
    return found


def tied_units(architecture: Architecture, dimension: str, site: str) -> Tensor:
    """The indices of a group that are kept or removed as one, such as the columns of a rope pair.

    Returns:
        (units, members); most groups have one member per unit.
    """
    if dimension == "qk":
        for _, core in attentions_at(architecture, site):
            if core.rope is not None:
                return pairs(core.rope.layout, core.qk)
    found = sites(architecture, dimension)
    size = (
        found[site]
        if site != SHARED
        else next(size for name, size in found.items() if not has_own_mask(name))
    )
    return torch.arange(size)[:, None]


def attentions_at(architecture: Architecture, site: str) -> list[tuple[str, AttentionSpec]]:
    """Name and spec of each attention in the blocks that a mask at `site` applies to."""
    found = (
        (branch.name, branch.core)
        for branch in architecture.branches
        if site in (SHARED, branch.name)
    )
    return [(name, core) for name, core in found if isinstance(core, AttentionSpec)]


def groups(architecture: Architecture, sharing: Sharing) -> dict[str, dict[str, int]]:
    """The masks that a sharing defines: dimension -> site (or `*` for one shared by all) -> size.

    `unshared`: every site has its own masks. `residual`: one embed mask for the residual stream.
    `full`: one mask per dimension. Whole sub-layers are never shared, nor are the units of an
    attention-pooling head and of predictors.

    Raises:
        InputError: The sharing is unknown, or needs equal sizes where the model has several.

    References:
        L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (sharing).
    """
    if sharing not in ("unshared", "residual", "full"):
        raise InputError(f"sharing = {sharing!r}: choose 'unshared', 'residual' or 'full'")
    wanted: dict[str, dict[str, int]] = {}
    # Nested token sets are drawn, ranked or learned by rules of their own.
    for dimension in WIDTHS:
        found = sites(architecture, dimension)
        shared = (dimension == "embed" and sharing != "unshared") or (
            dimension in ("head", "qk", "v", "ffn") and sharing == "full"
        )
        own = {site: size for site, size in found.items() if has_own_mask(site)}
        sizes = {found[site] for site in found if site not in own}
        if shared and sizes:
            if len(sizes) > 1:
                raise InputError(
                    f"sharing = 'full' needs the same {dimension} size in every block, "
                    f"this model has {sorted(sizes)}; use 'residual'"
                )
            found = {SHARED: sizes.pop(), **own}
        if found:
            wanted[dimension] = found
    return wanted


def architecture_of(model: nn.Module | Architecture) -> Architecture:
    """The architecture of a model; a model of another library is read first."""
    if isinstance(model, Architecture):
        return model
    found = getattr(model, "architecture", None)
    if isinstance(found, Architecture):
        return found
    # No weights are used, so there is nothing to compare with the model.
    return read(model, proof=False).spec
