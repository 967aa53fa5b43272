"""Networks whose latency a cost table is fitted to, and compact networks that check its sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ..compress.latency.shapes import network_shape
from ..compress.masks.mask import StructuredMask
from ..compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    Core,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    PredictorSpec,
    SelectSpec,
    StemSpec,
)
from ..compress.network.modules.model import CompactModel
from ..compress.network.select_specs import scoring_branches
from ..compress.surgery.compactor import compact
from ..core.errors import InputError
from ..targets.cost_parts import (
    AttentionShape,
    FfnShape,
    NetworkShape,
    SelectShape,
    SubLayerShape,
)

# Sub-layers of a measured network: their share of the call's fixed cost is small.
COPIES = 4
# Widths of measured networks are multiples of it, so that the staircase of tiles is seen.
STEP = 4
KINDS = ("attention", "ffn", "both", "ends")
# Scorers of networks that select tokens, and the share of these networks.
SCORERS, SELECTING = ("predictor", "class-attention", "random"), 0.4


@dataclass(frozen=True)
class CostSizes:
    """The sizes of a dense network; those of the measured ones are at most as large.

    Attributes:
        tokens: Tokens behind the stem, with one prefix token.
        embed: Channels of the residual stream.
        heads: Heads of an attention.
        head_width: Width of each head.
        ffn: Hidden width of an FFN.
        depth: Number of blocks.
        patch: Side of a patch in pixels.
        channels: Channels of an image.
        classes: Outputs of the head.
        selects: Whether networks select tokens for each image.
    """

    tokens: int = 197
    embed: int = 192
    heads: int = 3
    head_width: int = 64
    ffn: int = 768
    depth: int = 12
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    selects: bool = False

    def __post_init__(self) -> None:
        least = {"tokens": 2, "embed": 8, "head_width": 2, "ffn": 8}
        for name, value in vars(self).items():
            if name != "selects" and value < least.get(name, 1):
                raise InputError(f"{name} = {value}: give at least {least.get(name, 1)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, as near to a square as their number allows."""
        patches = self.tokens - 1
        rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
        return rows, patches // rows


def sizes_of(architecture: Architecture) -> CostSizes:
    """The sizes of a network's dense blocks and of its ends.

    Raises:
        InputError: It has no attention or no FFN.
    """
    cores = [branch.core for branch in architecture.branches]
    attentions = [core for core in cores if isinstance(core, AttentionSpec)]
    ffns = [core for core in cores if isinstance(core, FfnSpec)]
    if not attentions or not ffns:
        raise InputError(
            "cost table: the model has no attention or no FFN to take the sizes from; give them "
            "with --block"
        )
    patch, channels = architecture.stem.patch, architecture.image[0]
    return CostSizes(
        tokens=architecture.patches + 1,
        embed=architecture.embed,
        heads=max(core.heads for core in attentions),
        head_width=max(max(core.qk, core.v) for core in attentions),
        ffn=max(core.hidden for core in ffns),
        depth=max(1, len(architecture.block_names)),
        patch=max(1, round(math.sqrt(patch[0] * patch[1]))),
        channels=channels,
        classes=architecture.classes,
        selects=bool(architecture.selects),
    )


def dense_model(sizes: CostSizes) -> CompactModel:
    """A network of these sizes with random weights; its head reads the first token."""
    scale, width = sizes.head_width**-0.5, sizes.head_width
    cores: list[Core] = [
        AttentionSpec(heads=sizes.heads, qk=width, v=width, scale=scale),
        FfnSpec(hidden=sizes.ffn),
    ]
    names = ("attn", "mlp")
    steps = tuple(
        (_branch(f"blocks.{block}.{name}", core, sizes.embed, None),)
        for block in range(sizes.depth)
        for name, core in zip(names, cores, strict=True)
    )
    return _random(_architecture(sizes, sizes.embed, steps, None, "token"))


def network_of(sizes: CostSizes, shape: NetworkShape) -> CompactModel:
    """A network of a shape with random weights, whose head reads all tokens.

    Args:
        sizes: Where the stem and the head come from.
        shape: What it computes.
    """
    steps: list[tuple[BranchSpec, ...]] = []
    selects: list[SelectSpec] = []
    for number, each in enumerate(shape.sublayers):
        if isinstance(each, SelectShape):
            selects.append(_selection(each, len(selects), len(steps), shape.embed))
            continue
        if isinstance(each, AttentionShape):
            core: Core = AttentionSpec(heads=each.heads, qk=each.qk, v=each.v, scale=each.qk**-0.5)
            tokens = each.tokens_out
        else:
            core, tokens = FfnSpec(hidden=each.hidden), each.tokens
        # Behind a selection tokens do not leave by place.
        kept = None if selects else tokens
        steps.append((_branch(f"blocks.{number}.{core.kind}", core, shape.embed, kept),))
    order = None
    if shape.tokens < sizes.tokens:
        order = tuple(range(shape.tokens - 1))
    found = _architecture(sizes, shape.embed, tuple(steps), order, "mean_all")
    if selects:
        changed = found.model_copy(update={"selects": tuple(selects)})
        found = Architecture.model_validate(changed.model_dump(by_alias=True))
    return _random(found)


def _selection(shape: SelectShape, number: int, step: int, embed: int) -> SelectSpec:
    """A selection of a shape: a predictor where it has a norm, else scores of the attention."""
    plain = SelectSpec(
        name=f"select.{number}", at=step, patches=max(1, shape.kept - 1), scorer="random"
    )
    if not shape.reads:
        return plain.model_copy(update={"scorer": "class-attention"}) if shape.macs else plain
    patches = shape.tokens - 1
    # The first layer of the predictor whose multiply-adds are nearest.
    units = min(range(1, embed + 1), key=lambda each: abs(_macs(patches, embed, each) - shape.macs))
    return plain.model_copy(
        update={
            "scorer": "predictor",
            "predictor": _predictor(units),
            "norm": NormSpec(width=embed),
        }
    )


def _predictor(units: int) -> PredictorSpec:
    """A predictor as DynamicViT has it, of a first layer of twice as many units."""
    return PredictorSpec(local=units, pooled=units, hidden=(units, max(1, units // 2)))


def _macs(patches: int, embed: int, units: int) -> int:
    half = max(1, units // 2)
    return patches * (2 * embed * units + units * units + units * half + half) + units * units


def _branch(name: str, core: Core, embed: int, tokens: int | None) -> BranchSpec:
    return BranchSpec(name=name, core=core, norm=NormSpec(width=embed), tokens=tokens)


def _architecture(
    sizes: CostSizes,
    embed: int,
    steps: tuple[tuple[BranchSpec, ...], ...],
    order: tuple[int, ...] | None,
    pool: str,
) -> Architecture:
    rows, columns = sizes.grid
    return Architecture(
        image=(sizes.channels, rows * sizes.patch, columns * sizes.patch),
        embed=embed,
        stem=StemSpec(patch=(sizes.patch, sizes.patch)),
        order=order,
        steps=steps,
        norm=NormSpec(width=embed),
        pool=PoolSpec.model_validate({"kind": pool}),
        head=HeadSpec(classes=sizes.classes),
    )


def _random(architecture: Architecture) -> CompactModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CompactModel(architecture).eval()


def first_shapes(sizes: CostSizes, count: int, seed: int) -> list[NetworkShape]:
    """The networks that are measured first: the largest, the smallest, the ends, random ones.

    Args:
        sizes: The dense network.
        count: How many.
        seed: Of the random ones.
    """
    full = _sublayers(sizes.tokens, sizes.tokens, sizes.heads, sizes.head_width, sizes.ffn)
    narrow = max(STEP, sizes.head_width // 4)
    few = max(2, sizes.tokens // 4)
    small = _sublayers(few, few, 1, narrow, max(STEP, sizes.ffn // 8))
    least = max(STEP, sizes.embed // 4)
    found = [
        _shape(sizes, sizes.embed, sizes.tokens, full),
        _shape(sizes, least, few, small),
        _shape(sizes, sizes.embed, sizes.tokens, []),
        _shape(sizes, sizes.embed, sizes.tokens, [each for each in full if _mixes(each)]),
        _shape(sizes, sizes.embed, sizes.tokens, [each for each in full if not _mixes(each)]),
        _shape(sizes, least, few, []),
    ]
    if sizes.selects:
        rng = np.random.default_rng(seed)
        shares = ((sizes.embed, sizes.tokens, "predictor"), (least, few, "class-attention"))
        found += [_selecting(sizes, *share, small, rng) for share in shares]
    return [*found, *random_shapes(sizes, max(0, count - len(found)), seed)][:count]


def random_shapes(sizes: CostSizes, count: int, seed: int) -> list[NetworkShape]:
    """Random networks of one shape of attention, of FFN, or of both, up to the dense sizes.

    Args:
        sizes: The dense network.
        count: How many.
        seed: Equal seeds give equal networks.
    """
    rng = np.random.default_rng(seed)
    return [_random_shape(sizes, rng) for _ in range(count)]


def _random_shape(sizes: CostSizes, rng: np.random.Generator) -> NetworkShape:
    kind = KINDS[int(rng.choice(len(KINDS), p=[0.45, 0.3, 0.2, 0.05]))]
    embed = _width(rng, sizes.embed // 4, sizes.embed)
    before = int(rng.integers(max(2, sizes.tokens // 4), sizes.tokens + 1))
    # Most sub-layers pass on all of their tokens.
    after = before if rng.random() < 0.6 else int(rng.integers(1, before + 1))
    heads = int(rng.integers(1, sizes.heads + 1))
    least = min(sizes.head_width, max(STEP, sizes.head_width // 4))
    qk, v = (_width(rng, least, sizes.head_width) for _ in range(2))
    hidden = _width(rng, sizes.ffn // 8, sizes.ffn)
    if kind == "ffn":
        after = before
    sublayers = _sublayers(before, after, heads, (qk, v), hidden)
    if kind in ("attention", "ffn"):
        sublayers = [each for each in sublayers if each.kind == kind]
    if sizes.selects and before > 2 * COPIES and rng.random() < SELECTING:
        scorer = str(rng.choice(SCORERS, p=(0.6, 0.3, 0.1)))
        return _selecting(sizes, embed, before, scorer, sublayers, rng)
    return _shape(sizes, embed, before, [] if kind == "ends" else sublayers)


def _selecting(
    sizes: CostSizes,
    embed: int,
    tokens: int,
    scorer: str,
    sublayers: Sequence[SubLayerShape],
    rng: np.random.Generator,
) -> NetworkShape:
    """A network that selects tokens behind all but its last sub-layers, in equal steps.

    Args:
        sizes: The dense network.
        embed: Channels of the residual stream.
        tokens: Tokens behind the stem.
        scorer: What scores them.
        sublayers: Attentions and FFNs, whose tokens are replaced.
        rng: Draws the numbers that are kept.
    """
    mixing = [each for each in sublayers if isinstance(each, AttentionShape)]
    ffns = [each for each in sublayers if isinstance(each, FfnShape)]
    mixing = mixing or [AttentionShape(tokens_in=1, tokens_out=1, heads=1, qk=STEP, v=STEP)]
    least = max(2, tokens - int(rng.integers(COPIES, max(COPIES + 1, tokens // 2))))
    counts = np.linspace(tokens, least, COPIES).round().astype(int).tolist()
    units = max(1, embed // int(rng.integers(2, 5)))
    found: list[SubLayerShape] = []
    for number, (count, kept) in enumerate(zip(counts, [*counts[1:], 0], strict=True)):
        each = mixing[number % len(mixing)]
        both = {"tokens_in": count, "tokens_out": count}
        found.append(each.model_copy(update=both))
        if kept and kept < count:
            found.append(_select_of(scorer, embed, (count, kept), each, units))
        if ffns:
            hidden = ffns[number % len(ffns)].hidden
            found.append(FfnShape(tokens=kept or count, hidden=hidden))
    return _shape(sizes, embed, tokens, found)


def _select_of(
    scorer: str, embed: int, counts: tuple[int, int], scoring: AttentionShape, units: int
) -> SelectShape:
    """The shape of a selection of a scorer behind an attention."""
    tokens, kept = counts
    if scorer == "predictor":
        macs = _macs(tokens - 1, embed, units)
        return SelectShape(tokens=tokens, kept=kept, macs=macs, reads=embed)
    if scorer == "random":
        return SelectShape(tokens=tokens, kept=kept)
    # The class token's query, folded into the keys.
    heads, qk = scoring.heads, scoring.qk
    macs = 2 * heads * qk * embed + tokens * embed * heads
    return SelectShape(tokens=tokens, kept=kept, macs=macs)


def _width(rng: np.random.Generator, least: int, most: int) -> int:
    low = max(STEP, least)
    return min(most, low + STEP * int(rng.integers(0, max(0, most - low) // STEP + 1)))


def _mixes(shape: SubLayerShape) -> bool:
    return isinstance(shape, AttentionShape)


def _sublayers(
    before: int, after: int, heads: int, width: int | tuple[int, int], hidden: int
) -> list[SubLayerShape]:
    """Attentions and FFNs in turn, with tokens that fall in equal steps."""
    qk, v = (width, width) if isinstance(width, int) else width
    counts = np.linspace(before, after, COPIES + 1).round().astype(int).tolist()
    found: list[SubLayerShape] = []
    for read, computed in pairwise(counts):
        found.append(AttentionShape(tokens_in=read, tokens_out=computed, heads=heads, qk=qk, v=v))
        found.append(FfnShape(tokens=computed, hidden=hidden))
    return found


def _shape(
    sizes: CostSizes, embed: int, tokens: int, sublayers: Sequence[SubLayerShape]
) -> NetworkShape:
    return NetworkShape(
        embed=embed,
        tokens=tokens,
        pixels=sizes.channels * sizes.patch**2,
        classes=sizes.classes,
        sublayers=tuple(sublayers),
    )


def compact_networks(
    dense: CompactModel, count: int, seed: int
) -> list[tuple[NetworkShape, CompactModel]]:
    """Random compact networks of mixed widths, tokens and depth, and their shapes.

    Args:
        dense: The dense network.
        count: How many; the dense network itself is the first.
        seed: Equal seeds give equal networks.
    """
    rng = np.random.default_rng(seed)
    found = [(network_shape(dense.architecture), dense)][:count]
    sizes = sizes_of(dense.architecture)
    widths = {"qk": sizes.head_width, "v": sizes.head_width, "ffn": sizes.ffn, "embed": sizes.embed}
    pinned = scoring_branches(dense.architecture)
    while len(found) < count:
        # The widths of compact networks are rounded.
        shares = {
            name: _width(rng, max(STEP, width // 3 // 8 * 8), width) / width
            for name, width in widths.items()
        }
        shares |= {"head": float(rng.uniform(0.3, 1.0)), "block": float(rng.uniform(0.6, 1.0))}
        leaves = dense.architecture.pool.kind != "none" and not sizes.selects
        if leaves and rng.random() < 0.5:
            shares["token"] = float(rng.uniform(0.3, 1.0))
        mask = StructuredMask.random(dense, shares, seed=int(rng.integers(2**31)))
        if pinned:
            # An attention that scores tokens stays.
            blocks = {k: v for k, v in mask.kept["block"].items() if k not in pinned}
            mask = StructuredMask({**mask.kept, "block": blocks})
        # As it is exported: the last block computes only what the head reads.
        reads = bool(dense.architecture.pooled_prefix) or None
        small = compact(dense, mask, last_queries=reads).eval()
        found.append((network_shape(small.architecture), small))
    return found
