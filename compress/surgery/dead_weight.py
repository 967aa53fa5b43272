"""Weight that is dead already, in a model pruned elsewhere: found, proven removable, and removed;
the rest is told.

Unstructured pruning leaves zeros. Where they fill a row, a column, a head or a channel, something
may go without changing the output: see dead_ffn.py, dead_attention.py and dead_channels.py for
what, and why. What goes may leave more behind that is dead, so this repeats until nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..lift import lift
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..network.modules.model import CompactModel, build
from .compactor import compact
from .dead_attention import dead_attention
from .dead_channels import dead_channels, rescale_norms
from .dead_ffn import DeadUnits, dead_ffn

# As the compactor promises.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Removed:
    """Units of a dimension at a site that went; `folded`: some of them were constant, and live on
    in a bias.
    """

    site: str
    dimension: str
    removed: int
    total: int
    folded: bool


@dataclass(frozen=True)
class Left:
    """Units that are zero throughout and stay, with the reason."""

    site: str
    count: int
    why: str


@dataclass(frozen=True)
class Sparsity:
    """Zeros that stay in a matrix of the smaller model: shape, and the share of its entries."""

    tensor: str
    shape: tuple[int, ...]
    zeros: float


@dataclass(frozen=True)
class DeadWeight:
    """What was dead in a model. `mask` fits the model as it came; `compact` computes the same
    without it.

    `error`: largest difference of the outputs on noise images over the largest output.
    """

    mask: StructuredMask
    compact: CompactModel
    removed: tuple[Removed, ...]
    left: tuple[Left, ...]
    sparsity: tuple[Sparsity, ...]
    error: float


def find_dead(model: nn.Module) -> DeadWeight:
    """Find and remove what does nothing, or the same for every token; the output stays (fp32,
    relative 1e-5, checked here on noise images).

    `model`: any supported Vision Transformer; exact zeros count, small numbers do not. Fold
    `torch.nn.utils.prune` masks first (prune_masks.py). Errors: UnsupportedModel.
    """
    source = lift(model)
    kept = _Kept(source.architecture)
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
            f"taking out dead weight changed the output by {error:.1e}; this is a bug in vitrim, not in the model"
        )
    removed = tuple(
        Removed(
            site,
            dimension,
            int(keep.numel() - keep.sum()),
            keep.numel(),
            (dimension, site) in folded,
        )
        for dimension, site, keep in mask
    )
    return DeadWeight(
        mask,
        current.train(model.training),
        removed,
        tuple(found.left),
        tuple(_sparsity(current)),
        error,
    )


Keep = dict[str, dict[str, Tensor]]


@dataclass
class _Found:
    """One look: what to keep, by dimension and site, and the model with biases folded and norms
    rescaled as that needs.
    """

    model: CompactModel
    keep: Keep
    folded: set[tuple[str, str]]
    left: list[Left]


def _examine(model: CompactModel) -> _Found:
    architecture, state = (
        model.architecture,
        {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
    )
    keep: Keep = {}
    folded: set[tuple[str, str]] = set()
    left: list[Left] = []
    steps = []
    for number, step in enumerate(architecture.steps):
        row = []
        for position, branch in enumerate(step):
            prefix = f"steps.{number}.{position}."
            units = _dead_units(
                branch,
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in state.items()
                    if name.startswith(prefix)
                },
            )
            for dimension, entry in units.keep.items():
                keep.setdefault(dimension, {})[branch.name] = entry
            left += [Left(branch.name, count, why) for count, why in units.left]
            if bool(units.fold.any()):
                folded |= {
                    (dimension, branch.name) for dimension in units.keep if dimension != "qk"
                }
                branch = _add_bias(branch, state, prefix, units.fold)
            row.append(branch)
        steps.append(tuple(row))
    architecture = architecture.model_copy(update={"steps": tuple(steps)})
    channels = dead_channels(architecture, state)
    if channels.keep is not None:
        architecture, state = rescale_norms(architecture, state, channels.keep)
        keep["embed"] = {SHARED: channels.keep}
    if channels.left:
        left.append(Left("residual stream", channels.left, channels.why))
    return _Found(build(architecture, state) if keep else model, keep, folded, left)


def _dead_units(branch: BranchSpec, tensors: Mapping[str, Tensor]) -> DeadUnits:
    core = branch.core
    inner = {
        name.removeprefix("core."): tensor
        for name, tensor in tensors.items()
        if name.startswith("core.")
    }
    # Behind a norm the layer scale says nothing about what the norm sees.
    gain = tensors.get("layer_scale") if branch.post_norm is None else None
    if isinstance(core, AttentionSpec):
        return dead_attention(core, inner, gain)
    if isinstance(core, FfnSpec):
        return dead_ffn(core, inner, gain)
    return DeadUnits({}, torch.zeros(1))


def _add_bias(
    branch: BranchSpec, state: dict[str, Tensor], prefix: str, fold: Tensor
) -> BranchSpec:
    """Add to the output bias of a sub-layer, giving it one where it has none."""
    name = f"{prefix}core.{'out' if isinstance(branch.core, AttentionSpec) else 'fc2'}.bias"
    state[name] = state[name] + fold if name in state else fold
    return branch.model_copy(update={"core": branch.core.model_copy(update={"out_bias": True})})


class _Kept:
    """Indices into the source that are still there after some rounds."""

    def __init__(self, architecture: Architecture) -> None:
        self._source = architecture
        self._embed = torch.arange(architecture.embed)
        self._ffn: dict[str, Tensor] = {}
        self._heads: dict[str, Tensor] = {}
        # (living heads, columns)
        self._columns: dict[tuple[str, str], Tensor] = {}
        for branch in architecture.branches:
            core = branch.core
            if isinstance(core, FfnSpec):
                self._ffn[branch.name] = torch.arange(core.hidden)
            elif isinstance(core, AttentionSpec):
                self._heads[branch.name] = torch.arange(core.heads)
                for dimension, width in (("qk", core.qk), ("v", core.v)):
                    self._columns[dimension, branch.name] = torch.arange(width).expand(
                        core.heads, width
                    )

    def narrow(self, keep: Keep) -> None:
        """Take away what one more round removes; its masks are in terms of what the round before
        left.
        """
        for entry in keep.get("embed", {}).values():
            self._embed = self._embed[entry]
        for site, entry in keep.get("ffn", {}).items():
            self._ffn[site] = self._ffn[site][entry]
        for dimension in ("qk", "v"):
            for site, entry in keep.get(dimension, {}).items():
                found = self._columns[dimension, site]
                self._columns[dimension, site] = found[entry].view(len(found), -1)
        for site, entry in keep.get("head", {}).items():
            self._heads[site] = self._heads[site][entry]
            for dimension in ("qk", "v"):
                self._columns[dimension, site] = self._columns[dimension, site][entry]

    def mask(self) -> StructuredMask:
        """The whole removal as one mask of the source."""
        kept: Keep = {}

        def note(dimension: str, site: str, keep: Tensor) -> None:
            if not bool(keep.all()):
                kept.setdefault(dimension, {})[site] = keep

        note("embed", SHARED, _booleans(self._embed, self._source.embed))
        for branch in self._source.branches:
            core, site = branch.core, branch.name
            if isinstance(core, FfnSpec):
                note("ffn", site, _booleans(self._ffn[site], core.hidden))
            elif isinstance(core, AttentionSpec):
                heads = self._heads[site]
                note("head", site, _booleans(heads, core.heads))
                for dimension, width in (("qk", core.qk), ("v", core.v)):
                    columns = self._columns[dimension, site]
                    if len(heads):
                        note(
                            dimension,
                            site,
                            self._every_head(
                                core, heads, torch.stack([_booleans(row, width) for row in columns])
                            ),
                        )
        return StructuredMask(kept, scale="original", note={"dead": "found in the weights"})

    @staticmethod
    def _every_head(core: AttentionSpec, heads: Tensor, rows: Tensor) -> Tensor:
        """(living heads, width) -> (heads, width): dead heads take the columns of one they share
        keys with, or of the first living one.
        """
        group = list(core.kv_of) if core.kv_of is not None else list(range(core.heads))
        place = {int(head): row for row, head in enumerate(heads)}
        stand_in = {group[head]: row for head, row in reversed(place.items())}
        return torch.stack(
            [rows[place.get(head, stand_in.get(group[head], 0))] for head in range(core.heads)]
        )


def _booleans(indices: Tensor, size: int) -> Tensor:
    keep = torch.zeros(size, dtype=torch.bool)
    keep[indices] = True
    return keep


def _difference(one: CompactModel, other: CompactModel) -> float:
    images = torch.randn(2, *one.architecture.image, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, found = (
            model.eval()(images.to(next(model.parameters()))) for model in (one, other)
        )
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))


def _sparsity(model: CompactModel) -> list[Sparsity]:
    rows = []
    for name, parameter in model.named_parameters():
        zeros = float((parameter == 0).float().mean()) if parameter.ndim >= 2 else 0.0
        if zeros > 0:
            rows.append(Sparsity(name, tuple(parameter.shape), zeros))
    return rows
