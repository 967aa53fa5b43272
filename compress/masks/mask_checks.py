"""Validation of structured masks, alone and against the network that they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...core.errors import InputError
from ..network.architecture import Architecture, ConstantSpec, Indices
from ..network.axes import HEAD_IN, POOL_ATTENTION, STEM_OUT, has_own_mask, site_in
from ..network.modules.rope import pairs
from ..network.patch_grid import format_image_size
from ..network.select_specs import is_hidden_site
from .groups import DIMENSIONS, SHARED, attentions_at, sites
from .token_sets import check_tokens

Entries = Mapping[str, Mapping[str, Tensor]]

_WHY_ONE = {
    "embed": "the residual stream needs at least one channel",
    "qk": "with no query/key column the softmax becomes uniform, which is not a dead head; "
    "remove heads by the head mask",
}


def entry_at(kept: Entries, dimension: str, site: str) -> Tensor | None:
    """The mask entry that applies at a site, or None where everything is kept."""
    entries = kept.get(dimension, {})
    return entries.get(site, None if has_own_mask(site) else entries.get(SHARED))


def check_entries(kept: Entries) -> None:
    """Validate dimensions, data types and shapes without a network.

    Raises:
        InputError: The first entry that no network could have; the message names it.
    """
    for dimension, entries in kept.items():
        if dimension not in DIMENSIONS:
            raise InputError(
                f"mask has an unknown dimension {dimension!r}; known: {', '.join(DIMENSIONS)}"
            )
        for site, keep in entries.items():
            where = f"mask {dimension}/{site}"
            if keep.dtype != torch.bool:
                raise InputError(f"{where} is {keep.dtype}, not boolean")
            if keep.ndim == 2 and len(keep) and dimension in ("qk", "v"):
                counts = keep.sum(dim=1)
                if int(counts.min()) != int(counts.max()):
                    found = sorted(set(counts.tolist()))
                    raise InputError(
                        f"{where}: heads keep {found} columns; every head must keep equally many"
                    )
            elif keep.ndim != 1:
                raise InputError(f"{where} has shape {tuple(keep.shape)}")


def check_fit(kept: Entries, architecture: Architecture) -> None:
    """Validate a mask against a network: sites, sizes, and what must not become empty.

    Raises:
        InputError: The first entry that does not fit; the message names it.
    """
    for dimension, entries in kept.items():
        places = sites(architecture, dimension)
        for site, keep in entries.items():
            _check_entry(architecture, dimension, site, keep, places)
    if "token" in kept:
        check_tokens(architecture, kept["token"])
    for site, reads in _readers(architecture):
        seen = entry_at(kept, "embed", site)
        if seen is not None and reads is not None and not bool(seen[list(reads)].any()):
            raise InputError(
                f"mask embed keeps none of the {len(reads)} channels that there are at {site}; "
                "it needs one at least"
            )


def _check_entry(
    architecture: Architecture, dimension: str, site: str, keep: Tensor, places: Mapping[str, int]
) -> None:
    where = f"mask {dimension}/{site}"
    if site == SHARED and dimension == "token":
        raise InputError(f"{where}: token masks are not shared; name the stem or a sub-layer")
    if site == SHARED:
        sizes = {size for name, size in places.items() if not has_own_mask(name)}
    else:
        sizes = {places[site]} if site in places else set()
    if len(sizes) != 1:
        known = ", ".join(list(places)[:6]) or "none"
        raise InputError(f"{where}: this model has no such site; it has {known}")
    (size,) = sizes
    if keep.shape[-1] != size:
        why = _why_other_tokens(architecture, size) if dimension == "token" else ""
        raise InputError(f"{where} has {keep.shape[-1]} entries, the model has {size}{why}")
    owner = "predictor" if is_hidden_site(site) else "pooling head"
    if (dimension in _WHY_ONE or has_own_mask(site)) and not bool(keep.any()):
        reason = _WHY_ONE.get(dimension, f"the {owner} needs one unit at least")
        raise InputError(f"{where} keeps nothing; {reason}")
    if dimension in ("qk", "v"):
        _check_columns(architecture, dimension, site, keep)
    for select in architecture.selects:
        first = next(iter(select.hidden_sites), None)
        if select.predictor is not None and (dimension, site) == ("ffn", first):
            _check_local(where, keep[: select.predictor.local])


def _why_other_tokens(architecture: Architecture, size: int) -> str:
    """Why a token mask has another length, and the way out."""
    if architecture.drops_tokens or size != architecture.tokens:
        return (
            " there, which has dropped tokens already; make a mask for this model, or cut the "
            "dense one by both"
        )
    return (
        f" ({architecture.patches} patches at {format_image_size(architecture.image[1:])}, "
        f"{architecture.learned_tokens} learned): the mask is of another number of patches, "
        "that of another image size or model; cut the model at the mask's image size, then resize "
        "the result (vitrim.resized, vitrim export --image-size)"
    )


def _check_local(where: str, keep: Tensor) -> None:
    if not bool(keep.any()):
        raise InputError(f"{where} keeps no local unit; all patches would get the same score")


def _check_columns(architecture: Architecture, dimension: str, site: str, keep: Tensor) -> None:
    """Validate query, key and value columns: the number of rows, and tied columns."""
    where = f"mask {dimension}/{site}"
    for name, core in attentions_at(architecture, site):
        if keep.ndim == 2 and keep.shape[0] != core.heads:
            raise InputError(f"{where} has {keep.shape[0]} rows, {name} has {core.heads} heads")
        if keep.ndim == 2 and core.kv_of is not None:
            first = [core.kv_of.index(kv) for kv in core.kv_of]
            if not bool((keep == keep[first]).all()):
                raise InputError(
                    f"{where}: heads that share keys and values must keep the same columns"
                )
        if dimension == "qk" and core.rope is not None:
            tied = pairs(core.rope.layout, core.qk)
            pair = keep[..., tied]
            split = torch.nonzero(pair.any(dim=-1) & ~pair.all(dim=-1))
            if len(split):
                one, other = tied[int(split[0, -1])].tolist()
                raise InputError(
                    f"mask qk/{site} splits columns {one} and {other}: rotary position embedding "
                    "rotates them as a pair; keep or drop whole pairs"
                )
    pool = architecture.pool.attention if site == POOL_ATTENTION else None
    if pool is not None and keep.ndim == 2 and keep.shape[0] != pool.heads:
        raise InputError(
            f"{where} has {keep.shape[0]} rows, the pooling head has {pool.heads} heads"
        )


def _readers(architecture: Architecture) -> Iterator[tuple[str, Indices | None]]:
    """The sites that need a channel of the residual stream, and the channels that each has."""
    for branch in architecture.branches:
        if not isinstance(branch.core, ConstantSpec):
            yield site_in(branch), branch.reads
    for select in architecture.selects:
        if select.predictor is not None:
            yield select.site_in, select.reads
    yield HEAD_IN, architecture.head_reads
    yield STEM_OUT, architecture.stem_writes
