"""Structured masks: what is kept of each dimension of a Vision Transformer. They are what leaves
training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.storage import replace_file
from ..network.architecture import Architecture, ConstantSpec, Indices
from ..network.axes import HEAD_IN, POOL_ATTENTION, POOL_SITES, STEM_OUT, site_in
from ..network.modules.rope import pairs
from .groups import (
    DIMENSIONS,
    SHARED,
    ScaleRule,
    Sharing,
    architecture_of,
    attentions_at,
    groups,
    sites,
    tied_units,
)
from .ranking import Scope
from .saliency import Criterion, SaliencyOptions, Scores, kept_units

SCHEMA = "vitrim.mask/1"


def _readers(architecture: Architecture) -> list[tuple[str, Indices | None]]:
    """The sites that need a channel of the residual stream (its readers, and the stem), and which
    channels there are.
    """
    found = [
        (site_in(branch), branch.reads)
        for branch in architecture.branches
        if not isinstance(branch.core, ConstantSpec)
    ]
    return [*found, (HEAD_IN, architecture.head_reads), (STEM_OUT, architecture.stem_writes)]


@dataclass(frozen=True)
class StructuredMask:
    """Booleans, True = keep: `kept[dimension][site]`, site `*` being shared by all sites. A missing
    entry keeps everything.

    Shapes: (size,), or (heads, size) for `qk` and `v` where heads keep different columns, equal in
    number. `scale` says what the softmax scale becomes: "kept", 1/sqrt(kept qk) as in movement
    pruning, or "original" for a post-hoc mask.
    """

    kept: Mapping[str, Mapping[str, Tensor]]
    scale: ScaleRule = "kept"
    note: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scale not in ("kept", "original"):
            raise InputError(f"mask scale {self.scale!r}: choose 'kept' or 'original'")
        for dimension, entries in self.kept.items():
            if dimension not in DIMENSIONS:
                raise InputError(
                    f"mask has an unknown dimension {dimension!r}; known: {', '.join(DIMENSIONS)}"
                )
            for site, keep in entries.items():
                if keep.dtype != torch.bool:
                    raise InputError(f"mask {dimension}/{site} is {keep.dtype}, not boolean")
                if keep.ndim == 2 and dimension in ("qk", "v"):
                    counts = keep.sum(dim=1)
                    if int(counts.min()) != int(counts.max()):
                        raise InputError(
                            f"mask {dimension}/{site}: heads keep {sorted(set(counts.tolist()))} columns; every head must keep equally many"
                        )
                elif keep.ndim != 1:
                    raise InputError(f"mask {dimension}/{site} has shape {tuple(keep.shape)}")

    def get(self, dimension: str, site: str) -> Tensor | None:
        """The mask at a site, or None where everything is kept."""
        entries = self.kept.get(dimension, {})
        return entries.get(site, None if site in POOL_SITES else entries.get(SHARED))

    def __iter__(self) -> Iterator[tuple[str, str, Tensor]]:
        for dimension, entries in self.kept.items():
            for site, keep in entries.items():
                yield dimension, site, keep

    @property
    def sharing(self) -> Sharing:
        """The sharing that these entries amount to."""
        if SHARED in self.kept.get("head", {}) or SHARED in self.kept.get("ffn", {}):
            return "full"
        return (
            "residual"
            if SHARED in self.kept.get("embed", {}) or not self.kept.get("embed")
            else "unshared"
        )

    def check(self, architecture: Architecture) -> None:
        """Refuse a mask that is not of this network: unknown site, wrong size, nothing kept where
        something must be.

        Errors: InputError naming the entry.
        """
        places = {dimension: sites(architecture, dimension) for dimension in self.kept}
        for dimension, site, keep in self:
            found = places[dimension]
            sizes = (
                {found[name] for name in found if name not in POOL_SITES}
                if site == SHARED
                else {found.get(site)}
            )
            size = sizes.pop() if len(sizes) == 1 else None
            if size is None:
                raise InputError(
                    f"mask {dimension}/{site}: this model has no such site; it has {', '.join(list(found)[:6]) or 'none'}"
                )
            if keep.shape[-1] != size:
                raise InputError(
                    f"mask {dimension}/{site} has {keep.shape[-1]} entries, the model has {size}"
                )
            if (dimension in _WHY_ONE or site in POOL_SITES) and not bool(keep.any()):
                raise InputError(
                    f"mask {dimension}/{site} keeps nothing; "
                    + _WHY_ONE.get(dimension, "the pooling head needs one unit at least")
                )
            if dimension in ("qk", "v"):
                _check_columns(architecture, dimension, site, keep)
        for site, reads in _readers(architecture):
            seen = self.get("embed", site)
            if seen is not None and reads is not None and not bool(seen[list(reads)].any()):
                raise InputError(
                    f"mask embed keeps none of the {len(reads)} channels that there are at {site}; it needs one at least"
                )

    @classmethod
    def random(
        cls,
        model: nn.Module | Architecture,
        keep_ratio: float | Mapping[str, float] = 0.5,
        sharing: Sharing = "residual",
        seed: int = 0,
        *,
        per_head: bool = False,
        scale: ScaleRule = "kept",
    ) -> StructuredMask:
        """A random mask: each group keeps round(keep_ratio * size) units, at least one.

        `keep_ratio`: one number for embed, head, qk, v and ffn, or one a dimension (also `block`).
        `per_head`: another set of qk and v columns a head.
        """
        architecture = architecture_of(model)
        generator = torch.Generator().manual_seed(seed)
        ratios = (
            dict(keep_ratio)
            if isinstance(keep_ratio, Mapping)
            else dict.fromkeys(("embed", "head", "qk", "v", "ffn"), float(keep_ratio))
        )
        for name, ratio in ratios.items():
            if name not in DIMENSIONS:
                raise InputError(
                    f"keep_ratio names {name!r}; known dimensions: {', '.join(DIMENSIONS)}"
                )
            if not 0 < ratio <= 1:
                raise InputError(
                    f"keep_ratio {name} = {ratio}: give a number above 0 and at most 1"
                )
        kept: dict[str, dict[str, Tensor]] = {}
        for dimension, entries in groups(architecture, sharing).items():
            ratio = ratios.get(dimension, 1.0)
            kept[dimension] = {}
            for site in entries:
                if dimension == "block":
                    keep = torch.rand(1, generator=generator) < ratio
                else:
                    keep = _random_columns(
                        architecture, dimension, site, ratio, generator, per_head=per_head
                    )
                kept[dimension][site] = keep
        return cls(kept, scale=scale)

    @classmethod
    def from_saliency(
        cls,
        model: nn.Module,
        criterion: Criterion = "l2",
        *,
        keep_ratio: float | Mapping[str, float] = 0.5,
        scope: Scope = "global",
        sharing: Sharing = "residual",
        data: Iterable[tuple[Tensor, Tensor]] | None = None,
        fixed: Sequence[str] = (),
        scale: ScaleRule = "original",
        seed: int = 0,
    ) -> StructuredMask:
        """The mask that keeps the most salient units, without training.

        `criterion`: l1, l2, taylor, head (heads alone) or random; `data`, batches of (images, class
        numbers), for taylor and head. `keep_ratio`: the share of units that stays, each weighed by
        its parameters: of each group (scope "layer"), of all groups of the same structure
        ("isomorphic"), or of the network ("global"); one number, or one a dimension. `fixed`:
        dimensions kept whole. Errors: InputError.
        """
        options = SaliencyOptions(keep_ratio, scope, sharing, data, tuple(fixed), scale, seed)
        return mask_and_scores(model, criterion, options)[0]

    @classmethod
    def everything(
        cls, model: nn.Module | Architecture, sharing: Sharing = "residual"
    ) -> StructuredMask:
        """The mask that removes nothing."""
        found = groups(architecture_of(model), sharing)
        return cls(
            {
                dimension: {
                    site: torch.ones(size, dtype=torch.bool) for site, size in entries.items()
                }
                for dimension, entries in found.items()
            }
        )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: one uint8 tensor `dimension/site` an entry, scale and schema in
        its metadata.
        """
        tensors = {
            f"{dimension}/{site}": keep.to(torch.uint8).contiguous()
            for dimension, site, keep in self
        }
        # One metadata entry, because safetensors writes several in random order and equal masks
        # should be equal files.
        about = json.dumps(
            {"schema": SCHEMA, "scale": self.scale, "note": dict(self.note)}, sort_keys=True
        )
        replace_file(path, tensors_to_bytes(tensors, {"vitrim": about}))

    @classmethod
    def load(cls, path: Path | str) -> StructuredMask:
        """Read what `save` wrote. Errors: InputError naming the file and the entry."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such mask file")
        kept: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("vitrim", "null"))
                found = about.get("schema") if isinstance(about, dict) else None
                if found != SCHEMA:
                    raise InputError(
                        f"{path}: schema {found!r}, wanted {SCHEMA!r}; is this a mask saved by vitrim?"
                    )
                for name in file.keys():
                    dimension, _, site = name.partition("/")
                    values = file.get_tensor(name)
                    if values.dtype != torch.uint8 or bool((values > 1).any()):
                        raise InputError(f"{path}: entry {name!r} is not made of 0 and 1")
                    kept.setdefault(dimension, {})[site] = values.bool()
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path}: not a readable mask file ({error})") from error
        return cls(
            kept,
            scale=about.get("scale", "kept"),
            note={str(key): str(value) for key, value in dict(about.get("note") or {}).items()},
        )


_WHY_ONE = {
    "embed": "the residual stream needs at least one channel",
    "qk": "with no query/key column the softmax becomes uniform, which is not a dead head; remove heads by the head mask",
}


def _random_columns(
    architecture: Architecture,
    dimension: str,
    site: str,
    ratio: float,
    generator: torch.Generator,
    *,
    per_head: bool,
) -> Tensor:
    """(size,) booleans, or (heads, size) with `per_head`; units that go together are drawn
    together.
    """
    units = tied_units(architecture, dimension, site)
    count = max(1, round(ratio * len(units)))
    rows, kv_of = 1, None
    if per_head and dimension in ("qk", "v") and site != SHARED:
        rows = sites(architecture, "head")[site]
        kv_of = next((core.kv_of for _, core in attentions_at(architecture, site)), None)
    drawn = []
    for _ in range(rows if kv_of is None else max(kv_of) + 1):
        keep = torch.zeros(units.numel(), dtype=torch.bool)
        keep[units[_random_keep(len(units), count, generator)]] = True
        drawn.append(keep)
    keeps = torch.stack(drawn)
    if kv_of is not None:
        keeps = keeps[list(kv_of)]
    return keeps if rows > 1 else keeps[0]


def _random_keep(size: int, count: int, generator: torch.Generator) -> Tensor:
    """(size,) booleans of which `count` are True."""
    keep = torch.zeros(size, dtype=torch.bool)
    keep[torch.randperm(size, generator=generator)[:count]] = True
    return keep


def _check_columns(architecture: Architecture, dimension: str, site: str, keep: Tensor) -> None:
    """Columns of queries, keys and values that cannot be parted. Errors: InputError with the
    reason.
    """
    for name, core in attentions_at(architecture, site):
        if keep.ndim == 2 and keep.shape[0] != core.heads:
            raise InputError(
                f"mask {dimension}/{site} has {keep.shape[0]} rows, {name} has {core.heads} heads"
            )
        if keep.ndim == 2 and core.kv_of is not None:
            first = [core.kv_of.index(kv) for kv in core.kv_of]
            if not bool((keep == keep[first]).all()):
                raise InputError(
                    f"mask {dimension}/{site}: heads that share keys and values must keep the same columns"
                )
        if dimension == "qk" and core.rope is not None:
            pair = keep[..., pairs(core.rope.layout, core.qk)]
            split = torch.nonzero(pair.any(dim=-1) & ~pair.all(dim=-1))
            if len(split):
                one, other = pairs(core.rope.layout, core.qk)[int(split[0, -1])].tolist()
                raise InputError(
                    f"mask qk/{site} splits columns {one} and {other}: rotary position embedding turns them together; keep or drop whole pairs"
                )
    if (
        site == POOL_ATTENTION
        and keep.ndim == 2
        and architecture.pool.attention is not None
        and keep.shape[0] != architecture.pool.attention.heads
    ):
        raise InputError(
            f"mask {dimension}/{site} has {keep.shape[0]} rows, the pooling head has {architecture.pool.attention.heads} heads"
        )


def mask_and_scores(
    model: nn.Module, criterion: Criterion, options: SaliencyOptions
) -> tuple[StructuredMask, Scores]:
    """The mask of `StructuredMask.from_saliency` and the scores behind it, so that rounding the
    mask needs no second pass over the data.

    Raises:
        InputError: An option is out of range, or needs data that is not there; checked before the
        first batch is read.
    """
    kept, scores = kept_units(model, criterion, options)
    note = {"saliency": criterion, "scope": options.scope, "keep_ratio": str(options.keep_ratio)}
    mask = StructuredMask(kept, scale=options.scale, note=note)
    mask.check(architecture_of(model))
    return mask, scores
