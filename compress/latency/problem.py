"""The chain of sub-layers of a network at one width of the stream, for `programme`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...targets.cost_table import CostTable
from ..network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    FfnSpec,
    SelectSpec,
    StemSpec,
)
from ..network.axes import STEM_OUT
from ..network.live_latency import plain_hidden
from ..network.select_specs import scoring_branches
from ..oneshot.allocation import Option
from ..oneshot.budgets import Precision
from ..oneshot.choice import absorbed_share
from ..tokens.counts import STEM
from .losses import Losses
from .programme import Numbers, Stage
from .shapes import sublayer_shape

# Numbers of tokens to choose from; widths of one dimension of a sub-layer to choose from.
TOKEN_LEVELS, ATTENTION_WIDTHS, FFN_WIDTHS = 12, 10, 200
# Bytes of a number between operators, by the precision of the artifact. Dynamic int8, and weights
# of few bits alone, have numbers of four bytes there.
ACTIVATION_BYTES = {"fp16": 2, "bf16": 2, "int8-static": 1}


def weight_precision(table: CostTable | None, given: Precision | None = None) -> Precision:
    """The precision in which weights count: a given one, else that of a table, else fp32.

    Weights of four bits count as those of eight.
    """
    if given is not None or table is None:
        return given or "fp32"
    if table.precision.startswith(("int8", "int4")):
        return "int8"
    return "fp16" if table.precision in ("fp16", "bf16") else "fp32"


def activation_bytes(table: CostTable | None, given: Precision | None = None) -> float:
    """The bytes of a number between operators, for all images of an inference.

    Args:
        table: The cost table, whose runtime computes; None: one image in the given precision.
        given: The precision of the weights, where there is no table.
    """
    if table is None:
        return float(ACTIVATION_BYTES.get(given or "fp32", 4))
    return float(table.batch * ACTIVATION_BYTES.get(table.precision, 4))


@dataclass(frozen=True)
class Levels:
    """The numbers of tokens of a chain.

    Attributes:
        counts: The tokens at each level, falling; 0 is all.
        prefix: The level at which only the tokens that the head reads are computed; None if it
            reads patches. Every attention but the last one needs more.
        free: Whether tokens may leave at the stem and at any attention; else where the network
            drops them already.
    """

    counts: tuple[int, ...]
    prefix: int | None
    free: bool


@dataclass(frozen=True)
class Choices:
    """The widths of a sub-layer to choose from; of a selection and of the stem there are none.

    Attributes:
        branch: The sub-layer, the selection, or the stem, at which patches may leave.
        step: The number of its step, or of the one behind the selection; `STEM` of the stem.
        widths: The widths of each option by dimension.
        losses: The loss of each option, (options,).
        sizes: Heads, qk and v of each option of an attention, or the hidden width alone,
            (3 or 1, options); 0 where the sub-layer is gone.
    """

    branch: BranchSpec | SelectSpec | StemSpec
    step: int
    widths: tuple[Mapping[str, int], ...]
    losses: Numbers
    sizes: tuple[np.ndarray, ...]

    @property
    def name(self) -> str:
        """The name of the sub-layer or selection, or the site of the stem."""
        return STEM_OUT if isinstance(self.branch, StemSpec) else self.branch.name

    @property
    def embeds(self) -> bool:
        """Whether it is the stem."""
        return isinstance(self.branch, StemSpec)

    @property
    def mixes(self) -> bool:
        """Whether it is an attention, at which tokens may leave."""
        branch = self.branch
        return isinstance(branch, BranchSpec) and isinstance(branch.core, AttentionSpec)

    @property
    def selection(self) -> SelectSpec | None:
        """The selection of tokens; None for a sub-layer and the stem."""
        return self.branch if isinstance(self.branch, SelectSpec) else None

    @property
    def gone(self) -> np.ndarray:
        """Which options remove the sub-layer, (options,)."""
        return np.asarray(self.sizes[0] == 0)


def token_levels(architecture: Architecture, *, free: bool, more: Collection[int] = ()) -> Levels:
    """The numbers of tokens to choose from.

    Args:
        architecture: The network.
        free: Whether tokens may leave; without effect where a step has several attentions, or an
            operator of its own selects tokens.
        more: Further numbers of tokens, used where tokens may leave.
    """
    kinds = (AttentionSpec, FfnSpec, ConstantSpec)
    simple = all(
        sum(isinstance(branch.core, AttentionSpec) for branch in step) <= 1
        and all(isinstance(branch.core, kinds) for branch in step)
        for step in architecture.steps
    )
    counts = {architecture.tokens, *architecture.step_tokens(last_queries=False)}
    counts |= {architecture.prefix + select.left for select in architecture.selects}
    free = free and simple and architecture.pool.kind != "none" and not architecture.selects
    # Their levels are those of patches.
    free = free and not architecture.inner
    if free:
        patches = architecture.patches
        counts |= {
            architecture.prefix + max(1, round(patches * share / TOKEN_LEVELS))
            for share in range(1, TOKEN_LEVELS)
        }
        counts |= {count for count in more if architecture.prefix < count <= architecture.tokens}
    falling = tuple(sorted(counts, reverse=True))
    read = architecture.pooled_prefix
    if simple and read and read < falling[-1] and architecture.attention_steps():
        return Levels((*falling, read), len(falling), free)
    return Levels(falling, None, free)


def sublayer_choices(
    architecture: Architecture, losses: Losses, chosen: Mapping[str, Option] | None = None
) -> list[Choices]:
    """The options of every sub-layer, and the selections of tokens between them.

    A sub-layer without losses stays whole, and one whose attention scores tokens is not removed.

    Args:
        architecture: The network.
        losses: What each choice loses.
        chosen: Options of an earlier solution, from which follows what the sub-layer before a
            removed one can take over. None: all of it.
    """
    found = []
    pinned = scoring_branches(architecture)
    for number, step in enumerate([*architecture.steps, ()]):
        for select in architecture.selects:
            if select.at == number:
                found.append(Choices(select, number, ({},), np.zeros(1), (np.ones(1),)))
        # The attention of a step decides which tokens its other sub-layers compute.
        for branch in sorted(step, key=lambda each: not isinstance(each.core, AttentionSpec)):
            if isinstance(branch.core, ConstantSpec):
                continue
            choices = _choices(architecture, branch, number, losses, chosen or {})
            found.append(_staying(choices) if branch.name in pinned else choices)
    return found


def stem_choices(architecture: Architecture) -> Choices:
    """The stem, of whose patches some may leave."""
    return Choices(architecture.stem, STEM, ({},), np.zeros(1), (np.ones(1),))


def _staying(choices: Choices) -> Choices:
    """The options that do not remove the sub-layer."""
    places = np.nonzero(~choices.gone)[0]
    return replace(
        choices,
        widths=tuple(choices.widths[place] for place in places.tolist()),
        losses=choices.losses[places],
        sizes=tuple(size[places] for size in choices.sizes),
    )


def _choices(
    architecture: Architecture,
    branch: BranchSpec,
    step: int,
    losses: Losses,
    chosen: Mapping[str, Option],
) -> Choices:
    predicted, core = losses.sublayers.get(branch.name), branch.core
    if not isinstance(core, AttentionSpec | FfnSpec):
        before = (architecture.tokens, *architecture.step_tokens(last_queries=False))
        shape = sublayer_shape(branch, architecture.embed, before[step], before[step + 1])
        hidden = 0 if shape is None else getattr(shape, "hidden", 1)
        return Choices(branch, step, ({},), np.zeros(1), (np.array([hidden]),))
    most = FFN_WIDTHS if isinstance(core, FfnSpec) else ATTENTION_WIDTHS
    curves = () if predicted is None else predicted.curves
    places = [_thinned(len(curve.widths), most) for curve in curves]
    absorbed = None if predicted is None else absorbed_share(predicted, chosen)
    widths: list[dict[str, int]] = []
    values: list[float] = []
    for picked in itertools.product(*places):
        option = {
            curve.dimension: curve.widths[place]
            for curve, place in zip(curves, picked, strict=True)
        }
        loss = sum(curve.errors[place] for curve, place in zip(curves, picked, strict=True))
        if option.get("head") == 0 and any(picked[1:]):
            # Removed once: the widths of heads that are gone make no difference.
            continue
        if absorbed is not None and 0 in (option.get("head"), option.get("ffn")):
            loss = min(loss, absorbed)
        widths.append(option)
        values.append(loss * (1.0 if predicted is None else predicted.weight))
    return Choices(branch, step, tuple(widths), np.array(values), _sizes(core, widths))


def _thinned(count: int, most: int) -> list[int]:
    """Places of at most `most` of `count` widths, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})


def _sizes(
    core: AttentionSpec | FfnSpec, widths: Sequence[Mapping[str, int]]
) -> tuple[np.ndarray, ...]:
    if isinstance(core, FfnSpec):
        whole = [plain_hidden(core, width.get("ffn", core.hidden)) for width in widths]
        return (np.array(whole, dtype=np.int64),)
    rows = [
        [width.get(name, size) for width in widths]
        for name, size in (("head", core.heads), ("qk", core.qk), ("v", core.v))
    ]
    heads, qk, v = (np.array(row, dtype=np.int64) for row in rows)
    return heads, core.parts * qk, v


@dataclass(frozen=True)
class Grid:
    """The token numbers of each pair of levels of a sub-layer, and which options are possible.

    Attributes:
        pairs: Levels before and after.
        read: Tokens that the sub-layer reads, (pairs, 1).
        computed: Tokens that it computes, (pairs, 1); of the stem, those that it returns.
        possible: (pairs, options).
        leaving: The loss of the tokens that leave, (pairs, 1).
    """

    pairs: tuple[tuple[int, int], ...]
    read: np.ndarray
    computed: np.ndarray
    possible: np.ndarray
    leaving: Numbers


def token_grid(
    architecture: Architecture, choices: Choices, levels: Levels, losses: Losses
) -> Grid:
    """The pairs of token levels of a sub-layer.

    Args:
        architecture: The network.
        choices: The sub-layer.
        levels: The numbers of tokens.
        losses: What is lost with tokens that leave.
    """
    if choices.embeds:
        return _stem_grid(architecture, levels, losses)
    if choices.selection is not None:
        return _select_grid(architecture, choices.selection, levels)
    carried = (architecture.tokens, *architecture.step_tokens(last_queries=False))
    before, after = carried[choices.step], carried[choices.step + 1]
    counts, prefix, row = levels.counts, levels.prefix, losses.tokens.get(choices.step)
    pairs: list[tuple[int, int]] = []
    leaving: list[float] = []
    drops: list[bool] = []
    for i, read in enumerate(counts):
        if i == prefix:
            pairs.append((i, i))
            leaving.append(0.0)
            drops.append(False)
            continue
        if read > before:
            continue
        # The network itself keeps so many of them.
        kept = counts.index(min(read, after))
        for j in range(kept, len(counts)):
            loss = 0.0
            if j == prefix:
                if not choices.mixes:
                    continue
            elif j > kept:
                if not (choices.mixes and levels.free and row is not None):
                    continue
                loss = row[counts[j]] - row[min(read, len(row) - 1)]
            pairs.append((i, j))
            leaving.append(max(0.0, loss))
            drops.append(j > kept)
    possible = np.ones((len(pairs), len(choices.losses)), dtype=bool)
    if choices.mixes:
        for place, (i, _) in enumerate(pairs):
            if i == prefix:
                possible[place] = choices.gone
            elif drops[place]:
                # Tokens leave at an attention, so it has to be there.
                possible[place] = ~choices.gone
    reads = np.array([[counts[i]] for i, _ in pairs], dtype=np.int64)
    computed = np.array([[counts[j]] for _, j in pairs], dtype=np.int64)
    return Grid(tuple(pairs), reads, computed, possible, np.array(leaving)[:, None])


def _stem_grid(architecture: Architecture, levels: Levels, losses: Losses) -> Grid:
    """The pairs of levels of the stem: all tokens fall to any number with a patch."""
    counts, row, least = levels.counts, losses.tokens[STEM], architecture.prefix + 1
    after = [j for j, count in enumerate(counts) if count >= least and j != levels.prefix]
    reads = np.full((len(after), 1), counts[0], dtype=np.int64)
    computed = np.array([[counts[j]] for j in after], dtype=np.int64)
    # A network may drop some before its first attention, which reads no more of them.
    loss = np.array([row[min(count, len(row) - 1)] for count in counts])
    leaving = np.maximum(loss[after] - loss[0], 0.0)[:, None]
    possible = np.ones((len(after), 1), dtype=bool)
    return Grid(tuple((0, j) for j in after), reads, computed, possible, leaving)


def _select_grid(architecture: Architecture, select: SelectSpec, levels: Levels) -> Grid:
    """The pairs of levels of a selection: any number falls to that which it leaves."""
    counts, left = levels.counts, architecture.prefix + select.left
    pairs = tuple(
        (i, i if i == levels.prefix else counts.index(min(count, left)))
        for i, count in enumerate(counts)
    )
    reads = np.array([[counts[i]] for i, _ in pairs], dtype=np.int64)
    computed = np.array([[counts[j]] for _, j in pairs], dtype=np.int64)
    possible = np.ones((len(pairs), 1), dtype=bool)
    return Grid(pairs, reads, computed, possible, np.zeros((len(pairs), 1)))


def stage_of(choices: Choices, grid: Grid, amounts: Numbers) -> Stage:
    """A stage of the programme whose options take these amounts, (pairs, options)."""
    times = np.where(grid.possible, amounts, np.inf)
    return Stage(choices.name, grid.pairs, times, choices.losses[None] + grid.leaving)
