"""Dead weight of models that were pruned by another tool: found, verified and removed.

Unstructured pruning leaves zeros. Where they fill a row, a column, a head or a channel, units can
be removed without changing the output; the rules are in `dead_ffn`, `dead_attention`,
`dead_predictor` and `dead_channels`. A removal may make other units dead, so the search repeats
until it finds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..network.modules.model import CompactModel, build
from ..network.select_specs import ATTENTION_SCORERS, Scorer, scoring_branches
from .compactor import compact, output_error, score_error
from .dead_attention import dead_attention
from .dead_channels import dead_channels, rescale_norms
from .dead_ffn import DeadUnits, dead_ffn
from .dead_predictor import dead_predictor
from .kept_indices import Keep, KeptIndices

# The tolerance of `compact`.
TOLERANCE = 1e-5
# The suffixes of a pruned tensor and its mask in torch.nn.utils.prune.
_ORIGINAL, _MASK = "_orig", "_mask"


@dataclass(frozen=True)
class Removed:
    """The removed units of a dimension at a site.

    Attributes:
        site: Where they were.
        dimension: Their dimension.
        removed: Their number.
        total: The number of units before.
        folded: Whether some of them were constant and became part of a bias.
    """

    site: str
    dimension: str
    removed: int
    total: int
    folded: bool


@dataclass(frozen=True)
class Remaining:
    """Units that are zero and stay nevertheless, with the reason."""

    site: str
    count: int
    why: str


@dataclass(frozen=True)
class Sparsity:
    """A matrix of the smaller model with zeros: its name, shape, and the share of zeros."""

    tensor: str
    shape: tuple[int, ...]
    zeros: float


@dataclass(frozen=True)
class DeadWeight:
    """The dead weight of a model.

    Attributes:
        mask: The removal, as a mask of the source model.
        compact: The model without the dead weight.
        removed: What was removed.
        remaining: Zeros that could not be removed as units.
        sparsity: Matrices of `compact` that have zeros.
        error: The largest difference of the outputs on noise images, over the largest output; or
            that of the scores by which a selection chooses tokens, if it is larger.
    """

    mask: StructuredMask
    compact: CompactModel
    removed: tuple[Removed, ...]
    remaining: tuple[Remaining, ...]
    sparsity: tuple[Sparsity, ...]
    error: float


def find_dead(model: nn.Module) -> DeadWeight:
    """Find and remove units that do nothing, or the same for every token.

    Only exact zeros count. The output stays equal (fp32, relative 1e-5), and so do the scores by
    which selections choose tokens, which is verified on noise images. Masks of
    `torch.nn.utils.prune` have to be folded first: `fold_prune_masks`.

    Raises:
        UnsupportedModel: A module has no rule; the message names its path.
    """
    source = lift(model)
    kept = KeptIndices(source.architecture)
    current, folded = source, set[tuple[str, str]]()
    while True:
        found = _examine(current)
        if not found.keep:
            break
        current = compact(found.model, StructuredMask(found.keep, scale="original"))
        kept.narrow(found.keep)
        folded |= found.folded
    if current is source:
        current = compact(source, StructuredMask({}, scale="original"))
    mask = kept.mask()
    error = _difference(source, current)
    if not error <= TOLERANCE:
        raise AssertionError(
            f"removal of dead weight changed the output by {error:.1e}; "
            "this is a bug in vitrim, not in the model"
        )
    removed = []
    for dimension, site, keep in mask:
        total, count = keep.numel(), int(keep.numel() - keep.sum())
        removed.append(Removed(site, dimension, count, total, (dimension, site) in folded))
    return DeadWeight(
        mask,
        current.train(model.training),
        tuple(removed),
        tuple(found.remaining),
        tuple(_sparsity(current)),
        error,
    )


@dataclass
class _Found:
    """The result of one search.

    `model` has the biases and norms that the removal by `keep` needs. `folded`: (dimension, site)
    of constant units.
    """

    model: CompactModel
    keep: Keep
    folded: set[tuple[str, str]]
    remaining: list[Remaining]


def _examine(model: CompactModel) -> _Found:
    architecture = model.architecture
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    keep: Keep = {}
    folded: set[tuple[str, str]] = set()
    remaining: list[Remaining] = []
    steps = []
    scoring = {name: scoring_branches(architecture, (name,)) for name in ATTENTION_SCORERS}
    for number, step in enumerate(architecture.steps):
        row = []
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}."
            scorers = [name for name, branches in scoring.items() if branch.name in branches]
            units = _dead_units(branch, _below(state, prefix), scorers)
            for dimension, entry in units.keep.items():
                keep.setdefault(dimension, {})[branch.name] = entry
            remaining += [Remaining(branch.name, count, why) for count, why in units.remaining]
            if bool(units.fold.any()):
                folded |= {
                    (dimension, branch.name) for dimension in units.keep if dimension != "qk"
                }
                branch = _add_bias(branch, state, prefix, units.fold)
            row.append(branch)
        steps.append(tuple(row))
    _examine_predictors(architecture, state, keep, folded, remaining)
    architecture = architecture.model_copy(update={"steps": tuple(steps)})
    channels = dead_channels(architecture, state)
    if channels.keep is not None:
        architecture, state = rescale_norms(architecture, state, channels.keep)
        keep["embed"] = {SHARED: channels.keep}
    remaining += [Remaining("residual stream", count, why) for count, why in channels.remaining]
    return _Found(build(architecture, state) if keep else model, keep, folded, remaining)


def _examine_predictors(
    architecture: Architecture,
    state: dict[str, Tensor],
    keep: Keep,
    folded: set[tuple[str, str]],
    remaining: list[Remaining],
) -> None:
    """Search the predictors of a network.

    Args:
        architecture: The network.
        state: Its tensors, of which biases get the constants of removed units.
        keep: Gets the entries of the mask.
        folded: Gets the sites of constant units, as in `_Found`.
        remaining: Gets what does nothing and stays.
    """
    for number, select in enumerate(architecture.selects):
        if select.predictor is None:
            continue
        prefix = f"selects.{number}."
        units = dead_predictor(select, _below(state, prefix))
        if units.keep:
            keep["ffn"] = {**keep.get("ffn", {}), **units.keep}
        for site, (bias, fold) in units.folds.items():
            state[prefix + bias] = state[prefix + bias] + fold
            folded.add(("ffn", site))
        remaining += [Remaining(*row) for row in units.remaining]


def _dead_units(
    branch: BranchSpec, tensors: Mapping[str, Tensor], scorers: Collection[Scorer]
) -> DeadUnits:
    core, inner = branch.core, _below(tensors, "core.")
    # A layer scale behind a norm does not change what the norm reads.
    gain = tensors.get("layer_scale") if branch.post_norm is None else None
    if isinstance(core, AttentionSpec):
        return dead_attention(core, inner, gain, scorers)
    if isinstance(core, FfnSpec):
        return dead_ffn(core, inner, gain)
    return DeadUnits({}, torch.zeros(1))


def _add_bias(
    branch: BranchSpec, state: dict[str, Tensor], prefix: str, fold: Tensor
) -> BranchSpec:
    """Add to the output bias of a sub-layer, which gets one if it has none."""
    name = f"{prefix}core.{'out' if isinstance(branch.core, AttentionSpec) else 'fc2'}.bias"
    state[name] = state[name] + fold if name in state else fold
    return branch.model_copy(update={"core": branch.core.model_copy(update={"out_bias": True})})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _difference(one: CompactModel, other: CompactModel) -> float:
    images = torch.randn(2, *one.architecture.image, generator=torch.Generator().manual_seed(0))
    images = images.to(next(one.parameters()))
    # The outputs are those of the same choices, whatever the scores are.
    return max(output_error(one, other, images), score_error(one, other, images))


def _sparsity(model: CompactModel) -> list[Sparsity]:
    rows = []
    for name, parameter in model.named_parameters():
        zeros = float((parameter == 0).float().mean()) if parameter.ndim >= 2 else 0.0
        if zeros > 0:
            rows.append(Sparsity(name, tuple(parameter.shape), zeros))
    return rows


def fold_prune_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the masks of `torch.nn.utils.prune` into the tensors of a checkpoint.

    Args:
        state: A state dict. `weight_orig` and `weight_mask` become `weight`, and so for any tensor;
            other entries stay as they are.

    Returns:
        A state dict of the model without pruning hooks.

    Raises:
        InputError: An entry has no mask, a mask of another shape, or exists in both forms.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base = name.removesuffix(_MASK)
        if name.endswith(_MASK) and f"{base}{_ORIGINAL}" in state:
            continue
        if not name.endswith(_ORIGINAL):
            result[name] = tensor
            continue
        base = name.removesuffix(_ORIGINAL)
        mask = state.get(f"{base}{_MASK}")
        if mask is None:
            raise InputError(
                f"checkpoint entry {name!r} has no {base + _MASK!r} beside it; "
                "call torch.nn.utils.prune.remove before saving"
            )
        if mask.shape != tensor.shape:
            raise InputError(
                f"checkpoint entry {base + _MASK!r} has shape {list(mask.shape)}, "
                f"{name!r} has {list(tensor.shape)}"
            )
        if base in state:
            raise InputError(f"checkpoint has both {base!r} and {name!r}; keep one")
        result[base] = tensor * mask.to(tensor.dtype)
    return result
