"""`StructuredMask`: which units of a Vision Transformer are kept, the result of mask learning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..network.architecture import Architecture
from ..network.files import MASK, mask_metadata
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
from .mask_checks import check_entries, check_fit, entry_at
from .mask_files import require_mask_file, write_masks
from .ranking import Scope
from .saliency import USUAL, Criterion, SaliencyOptions, Scores, default_scope, kept_units
from .token_sets import random_token_sets

SCHEMA = "vitrim.mask/1"


@dataclass(frozen=True)
class StructuredMask:
    """Booleans, True = keep, over the named dimensions of a Vision Transformer.

    Attributes:
        kept: `kept[dimension][site]`, a boolean tensor of shape (size,), or (heads, size) for `qk`
            and `v` where heads keep different columns, equal in number. Dimensions are `embed`,
            `head`, `qk`, `v`, `ffn`, `block` and `token`; the site `*` applies to all sites that
            have no entry of their own. A missing entry keeps everything. `token` entries name, at
            the stem (`stem.out`) or a sub-layer, the tokens that the stream carries after it; the
            sets are nested, and a site without an entry has that of the site before it.
        scale: The softmax scale after the cut: "kept", 1/sqrt(number of kept qk columns), as in
            movement pruning (default), or "original", that of the source model, for post-hoc masks.
        note: How the mask was made, as text by key; saved with it, and otherwise unused.

    Raises:
        InputError: A dimension, data type or shape that no network has.

    References:
        L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time" (masks per
        dimension, sharing, the kept softmax scale).
    """

    kept: Mapping[str, Mapping[str, Tensor]]
    scale: ScaleRule = "kept"
    note: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scale not in ("kept", "original"):
            raise InputError(f"mask scale {self.scale!r}: choose 'kept' or 'original'")
        check_entries(self.kept)

    def get(self, dimension: str, site: str) -> Tensor | None:
        """The entry that applies at a site, or None where everything is kept."""
        return entry_at(self.kept, dimension, site)

    def __iter__(self) -> Iterator[tuple[str, str, Tensor]]:
        for dimension, entries in self.kept.items():
            for site, keep in entries.items():
                yield dimension, site, keep

    @property
    def sharing(self) -> Sharing:
        """The sharing that these entries amount to."""
        if SHARED in self.kept.get("head", {}) or SHARED in self.kept.get("ffn", {}):
            return "full"
        embed = self.kept.get("embed")
        return "residual" if not embed or SHARED in embed else "unshared"

    def check(self, architecture: Architecture) -> None:
        """Validate the mask against a network.

        Raises:
            InputError: An unknown site, a wrong size, or nothing kept where something must be; the
                message names the entry.
        """
        check_fit(self.kept, architecture)

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
        """Draw a random mask: each group keeps round(keep_ratio * size) units, at least one.

        Args:
            model: A supported Vision Transformer, a `CompactModel`, or its architecture.
            keep_ratio: The share of units to keep, above 0 and at most 1: one number for embed,
                head, qk, v and ffn, or one per dimension (also `block`, and `token`: the share of
                the patches that the last attention reads); others are kept whole.
            sharing: "unshared", every site has its own mask; "residual" (default), one embed mask
                for the whole residual stream; "full", also one head, qk, v and ffn mask.
            seed: Equal seeds give equal masks.
            per_head: Draw other qk and v columns for each head instead of the same for all.
            scale: The softmax scale after the cut, as in `StructuredMask`.

        Returns:
            A mask that fits `model`.

        Raises:
            InputError: An unknown dimension, a ratio out of range, or a sharing that the model
                does not allow.
            UnsupportedModel: A module has no rule; the message names its path.
        """
        architecture = architecture_of(model)
        generator = torch.Generator().manual_seed(seed)
        ratios = (
            dict(keep_ratio)
            if isinstance(keep_ratio, Mapping)
            else dict.fromkeys(USUAL, float(keep_ratio))
        )
        _check_ratios(ratios)
        kept: dict[str, dict[str, Tensor]] = {}
        for dimension, entries in groups(architecture, sharing).items():
            ratio = ratios.get(dimension, 1.0)
            kept[dimension] = {}
            for site in entries:
                if dimension == "block":
                    keep = torch.rand(1, generator=generator) < ratio
                else:
                    rows = _rows(architecture, dimension, site) if per_head else None
                    units = tied_units(architecture, dimension, site)
                    keep = _random_units(units, ratio, rows, generator)
                kept[dimension][site] = keep
        if ratios.get("token", 1.0) < 1.0:
            kept["token"] = random_token_sets(architecture, ratios["token"], generator)
        return cls(kept, scale=scale)

    @classmethod
    def from_saliency(
        cls,
        model: nn.Module,
        criterion: Criterion = "l2",
        *,
        keep_ratio: float | Mapping[str, float] = 0.5,
        scope: Scope | None = None,
        sharing: Sharing = "residual",
        data: Iterable[tuple[Tensor, Tensor]] | None = None,
        fixed: Sequence[str] = (),
        scale: ScaleRule = "original",
        seed: int = 0,
    ) -> StructuredMask:
        """Keep the most salient units, without training.

        Args:
            model: A supported Vision Transformer, or a `CompactModel`.
            criterion: "l1" or "l2", the norm of the weights that a unit owns (default "l2");
                "taylor", the first-order change of the loss; "fisher", its mean square over single
                images; "head", the sensitivity of heads alone; "random".
            keep_ratio: The share of units to keep, each weighted by its parameters: one number
                (default 0.5), or one per dimension.
            scope: Which units are ranked against each other: all of the network ("global"), those
                of one group ("layer"), or those of all groups of the same structure
                ("isomorphic"). None: "global" for "taylor" and "fisher", else "layer".
            sharing: Which sites share a mask, as in `random`.
            data: Batches of (images, class numbers), shapes (batch, channels, height, width) and
                (batch,). "taylor", "fisher" and "head" need them, the others ignore them.
            fixed: Dimensions that are kept whole (default: none).
            scale: The softmax scale after the cut, by default that of the source model.
            seed: For the criterion "random".

        Returns:
            A mask that fits `model`; its note names the criterion, scope and ratio.

        Raises:
            InputError: An option is out of range, or needs data that are not given.
            UnsupportedModel: A module has no rule; the message names its path.

        References:
            Kolev et al., "Evaluating Neural Network Pruning Techniques on Vision Transformers"
            (structured magnitude).
            Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8.
            Michel et al. 2019, "Are Sixteen Heads Really Better than One?", eq. 2.
            Fang et al. 2024, "Isomorphic Pruning for Vision Models".
        """
        options = SaliencyOptions(keep_ratio, scope, sharing, data, tuple(fixed), scale, seed)
        return mask_and_scores(model, criterion, options)[0]

    @classmethod
    def everything(
        cls, model: nn.Module | Architecture, sharing: Sharing = "residual"
    ) -> StructuredMask:
        """The mask that removes nothing.

        Args:
            model: A supported Vision Transformer, a `CompactModel`, or its architecture.
            sharing: Which sites share a mask, as in `random`.

        Returns:
            A mask with an entry for each group of the sharing.

        Raises:
            InputError: The model does not allow this sharing.
            UnsupportedModel: A module has no rule; the message names its path.
        """
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
        """Write a safetensors file.

        It holds one uint8 tensor `dimension/site` per entry, and schema, scale and note in its
        metadata. Equal masks result in equal files.

        Args:
            path: The file to write or to replace.

        Raises:
            InputError: The file cannot be written, or exists and is no mask.
        """
        tensors = {
            f"{dimension}/{site}": keep.to(torch.uint8).contiguous()
            for dimension, site, keep in self
        }
        about = {"schema": SCHEMA, "scale": self.scale, "note": dict(self.note)}
        write_masks(path, tensors, about, MASK)

    @classmethod
    def load(cls, path: Path | str) -> StructuredMask:
        """Read a file that `save` wrote.

        Args:
            path: The file, which may be untrusted.

        Returns:
            The mask; whether it fits a model is validated by `check`.

        Raises:
            InputError: There is no such file, or it is not a valid mask; the message names the
                file and the entry.
        """
        path = require_mask_file(path, "mask file")
        kept: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                about = mask_metadata(path, file.metadata(), SCHEMA, MASK)
                names = file.keys()
                for name in names:
                    dimension, _, site = name.partition("/")
                    values = file.get_tensor(name)
                    if values.dtype != torch.uint8 or bool((values > 1).any()):
                        raise InputError(f"{path}: entry {name!r} is not made of 0 and 1")
                    kept.setdefault(dimension, {})[site] = values.bool()
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable mask file ({error})") from error
        note = about.get("note") or {}
        if not isinstance(note, dict):
            raise InputError(f"{path}: its note is not a table of texts")
        texts = {key: str(value) for key, value in note.items()}
        return cls(kept, scale=about.get("scale", "kept"), note=texts)


def require_mask(mask: object) -> None:
    """Raise InputError, with what to give instead, if `mask` is no `StructuredMask`."""
    if not isinstance(mask, StructuredMask):
        found = "None" if mask is None else f"a {type(mask).__name__}"
        raise InputError(
            f"mask: {found} where a StructuredMask was expected; "
            "make one with StructuredMask.load, .random or .from_saliency"
        )


def mask_and_scores(
    model: nn.Module, criterion: Criterion, options: SaliencyOptions
) -> tuple[StructuredMask, Scores]:
    """The mask of `StructuredMask.from_saliency`, and the scores that it was ranked by.

    With the scores, rounding the mask needs no second pass over the data.

    Raises:
        InputError: An option is out of range, or needs data that are not given; raised before the
            first batch is read.
    """
    source = lift(model)
    kept, scores = kept_units(source, criterion, options)
    scope = default_scope(criterion) if options.scope is None else options.scope
    note = {"saliency": criterion, "scope": scope, "keep_ratio": str(options.keep_ratio)}
    mask = StructuredMask(kept, scale=options.scale, note=note)
    mask.check(source.architecture)
    return mask, scores


def _check_ratios(ratios: Mapping[str, float]) -> None:
    for name, ratio in ratios.items():
        if name not in DIMENSIONS:
            raise InputError(
                f"keep_ratio names {name!r}; known dimensions: {', '.join(DIMENSIONS)}"
            )
        if not 0 < ratio <= 1:
            raise InputError(f"keep_ratio {name} = {ratio}: give a number above 0 and at most 1")


def _rows(architecture: Architecture, dimension: str, site: str) -> list[int] | None:
    """For each head the row of columns that it uses; None where all heads use the same."""
    if dimension not in ("qk", "v") or site == SHARED:
        return None
    kv_of = next((core.kv_of for _, core in attentions_at(architecture, site)), None)
    return list(range(sites(architecture, "head")[site])) if kv_of is None else list(kv_of)


def _random_units(
    units: Tensor, ratio: float, rows: list[int] | None, generator: torch.Generator
) -> Tensor:
    """(size,) booleans, or (heads, size) with `rows`; `units` (units, members) are drawn whole."""
    count = max(1, round(ratio * len(units)))
    drawn = torch.zeros(1 if rows is None else max(rows) + 1, units.numel(), dtype=torch.bool)
    for keep in drawn:
        keep[units[torch.randperm(len(units), generator=generator)[:count]]] = True
    return drawn[0] if rows is None or len(rows) == 1 else drawn[rows]
