"""The sizes of networks and sub-layers as cost tables have them, and their other budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from ...targets.cost_parts import (
    AttentionShape,
    FfnShape,
    NetworkShape,
    SelectShape,
    SubLayerShape,
)
from ...targets.cost_table import CostTable
from ..network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    FfnSpec,
    SelectSpec,
)
from ..network.count import branch_macs, branch_tokens, stem_macs
from ..network.live_latency import plain_hidden
from ..network.select_specs import select_inputs, select_macs, select_widths
from ..oneshot.choice import priced

Cost = Callable[[BranchSpec, int, int, int], float]


def sublayer_shape(
    branch: BranchSpec, embed: int, tokens: int, queries: int
) -> SubLayerShape | None:
    """The sizes of a sub-layer; None for a constant, which costs nothing.

    Args:
        branch: The sub-layer. A gated FFN and every unknown kind count as an FFN of equal
            multiply-adds.
        embed: Channels of the residual stream.
        tokens: Tokens that it reads.
        queries: Tokens that it computes.
    """
    core = branch.core
    if isinstance(core, ConstantSpec):
        return None
    if isinstance(core, AttentionSpec):
        return AttentionShape(
            tokens_in=tokens,
            tokens_out=queries,
            heads=core.heads,
            qk=core.parts * core.qk,
            v=core.v,
        )
    if isinstance(core, FfnSpec):
        return FfnShape(tokens=queries, hidden=plain_hidden(core, core.hidden))
    macs = branch_macs(branch, embed, tokens, queries)
    return FfnShape(tokens=queries, hidden=max(1, math.ceil(macs / (2 * embed * queries))))


def select_shape(
    architecture: Architecture, select: SelectSpec, before: int, tokens: int
) -> SelectShape:
    """The sizes of a selection of tokens.

    Args:
        architecture: The network.
        select: One of its selections.
        before: Tokens that the step before it reads.
        tokens: Tokens that it chooses from.
    """
    widths = select_widths(architecture, select)
    return SelectShape(
        tokens=tokens,
        kept=architecture.prefix + select.left,
        macs=select_macs(architecture, select, widths, before, tokens),
        reads=widths.reads if select.norm is not None else 0,
    )


def network_shape(architecture: Architecture, removed: Collection[str] = ()) -> NetworkShape:
    """The sizes of a network as it is exported: the last block computes what the head reads.

    Args:
        architecture: The network.
        removed: Sub-layers that are gone.
    """
    found = priced(architecture)
    shapes: list[SubLayerShape | None] = [
        sublayer_shape(branch, found.embed, tokens, queries)
        for branch, tokens, queries in branch_tokens(found, removed)
    ]
    counts = (found.tokens, *found.step_tokens(removed=removed))
    shapes += [
        select_shape(found, select, before, tokens)
        for select, before, tokens in select_inputs(found, counts)
    ]
    return NetworkShape(
        embed=found.embed,
        tokens=found.tokens,
        pixels=_stem_pixels(found),
        classes=_classes(found),
        sublayers=tuple(shape for shape in shapes if shape is not None),
    )


def _stem_pixels(architecture: Architecture) -> int:
    """Multiply-adds of the stem for each patch and channel, rounded up."""
    filled = architecture.read_width(architecture.stem_writes)
    return max(1, math.ceil(stem_macs(architecture) / (architecture.patches * filled)))


def _classes(architecture: Architecture) -> int:
    return architecture.classes if architecture.head is not None else 1


def latency_cost(table: CostTable) -> Cost:
    """The cost of a sub-layer in milliseconds, for budgets of a cut without training."""

    def cost(branch: BranchSpec, embed: int, tokens: int, queries: int) -> float:
        shape = sublayer_shape(branch, embed, tokens, queries)
        return 0.0 if shape is None else shape_ms(table, embed, shape)

    return cost


def shape_ms(table: CostTable, embed: int, shape: SubLayerShape) -> float:
    """The milliseconds of one sub-layer."""
    if isinstance(shape, FfnShape):
        return float(table.ffn_ms(embed, shape.tokens, shape.hidden))
    if isinstance(shape, SelectShape):
        chosen = (shape.tokens, shape.kept, shape.macs, shape.reads)
        return float(table.select_ms(embed, *chosen))
    sizes = (shape.tokens_in, shape.tokens_out, shape.heads, shape.qk, shape.v)
    return float(table.attention_ms(embed, *sizes))


def ends_ms(table: CostTable, architecture: Architecture, embed: int, tokens: int) -> float:
    """The milliseconds of the call, the stem and the head.

    Args:
        table: The cost table.
        architecture: The network.
        embed: Channels of the stream.
        tokens: Tokens that the stem returns; it embeds no other patches.
    """
    patches = tokens - architecture.learned_tokens
    # Which patches they are makes no difference. Layers in front of the patches compute all.
    fewer = architecture.model_copy(update={"order": tuple(range(patches))})
    return float(table.ends_ms(embed, tokens, _stem_pixels(fewer), _classes(architecture)))
