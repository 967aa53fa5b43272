"""The plan of a cut of selections: which stay, where, and the widths of their predictors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InputError
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, AttentionSpec, Indices, SelectSpec
from ..network.axes import select_axes
from ..network.select_specs import ATTENTION_SCORERS, scoring_attention
from .plan_attention import resize
from .plan_tokens import BranchPlan

# From a site and the channels there to the kept rows of a tensor and their new channels.
Locate = Callable[[Indices | None, str], tuple[Tensor, Indices | None]]


@dataclass(frozen=True)
class SelectPlan:
    """One selection that stays.

    Attributes:
        number: Its number in the source network.
        spec: Its new specification.
        slices: The indices to keep on each axis of each parameter, by leaf name; None = all.
    """

    number: int
    spec: SelectSpec
    slices: Mapping[str, tuple[Tensor | None, ...]]


def plan_selects(
    architecture: Architecture,
    mask: StructuredMask,
    rows: Sequence[Sequence[BranchPlan]],
    locate: Locate,
) -> tuple[SelectPlan, ...]:
    """Plan the selections of a network after a cut.

    Args:
        architecture: The network before the cut.
        mask: The mask.
        rows: The branches that stay, by step.
        locate: Locates the channels of the residual stream that a reader keeps.

    Returns:
        The selections that stay. One behind which nothing reads a patch is removed.

    Raises:
        InputError: The mask removes the attention that scores the patches.
    """
    mixing = [
        row[0].step for row in rows if any(isinstance(b.spec.core, AttentionSpec) for b in row)
    ]
    found: list[SelectPlan] = []
    for number, select in enumerate(architecture.selects):
        if architecture.pooled_prefix and not any(step >= select.at for step in mixing):
            continue
        if select.scorer in ATTENTION_SCORERS:
            _require_attention(architecture, select, rows)
        at = sum(row[0].step < select.at for row in rows)
        spec, slices = _predictor(select.model_copy(update={"at": at}), mask, locate)
        found.append(SelectPlan(number, spec, slices))
    return tuple(found)


def _require_attention(
    architecture: Architecture, select: SelectSpec, rows: Sequence[Sequence[BranchPlan]]
) -> None:
    name = scoring_attention(architecture, select).name
    stays = {b.spec.name for row in rows for b in row if isinstance(b.spec.core, AttentionSpec)}
    if name not in stays:
        raise InputError(
            f"mask removes {name}, whose attention chooses patches ({select.name}); keep one of "
            "its heads and value columns, or select by a predictor"
        )


def _predictor(
    select: SelectSpec, mask: StructuredMask, locate: Locate
) -> tuple[SelectSpec, Mapping[str, tuple[Tensor | None, ...]]]:
    spec = select.predictor
    if spec is None:
        return select, {}
    columns, reads = locate(select.reads, select.site_in)
    indices = {("embed", select.site_in): columns}
    widths: list[int] = []
    for site, width in select.hidden_sites.items():
        keep = mask.get("ffn", site)
        units = torch.arange(width) if keep is None else torch.nonzero(keep).flatten()
        indices["ffn", site] = units
        widths.append(len(units))
    first = next(iter(select.hidden_sites))
    units = indices["ffn", first]
    indices["local", first] = units[units < spec.local]
    indices["pooled", first] = units[units >= spec.local] - spec.local
    local, pooled = len(indices["local", first]), len(indices["pooled", first])
    cut = spec.model_copy(update={"local": local, "pooled": pooled, "hidden": tuple(widths[1:])})
    slices = {
        name: tuple(indices.get((axis.dimension, axis.site)) for axis in axes)
        for name, axes in select_axes(select).items()
    }
    new = {"predictor": cut, "norm": resize(select.norm, len(columns)), "reads": reads}
    return select.model_copy(update=new), slices
