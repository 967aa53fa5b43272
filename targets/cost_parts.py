"""The sizes of networks that a latency depends on, and the work of each kind of operator in them.

Products count the columns that the kernels compute, which are whole tiles:
`ceil(width / tile) * tile`. A sub-layer that is gone has no parts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

ATTENTION_PARTS = (
    *("attention", "heads", "projections", "attention products", "output", "softmax"),
    *("attention norms", "attention residual", "head copies", "dropping", "attention weights"),
)
FFN_PARTS = ("ffn", "ffn products", "ffn norms", "activation", "ffn weights")
END_PARTS = ("call", "stem", "stem tokens", "classes")
SELECT_PARTS = (
    *("selection", "selection products", "selection scores", "selection norms"),
    "selection rows",
)
PARTS = (*ATTENTION_PARTS, *FFN_PARTS, *END_PARTS, *SELECT_PARTS)
Numbers = npt.NDArray[np.float64]
# One size, or an array of sizes; arrays are broadcast.
Sizes = int | npt.NDArray[np.int64]
Size = Annotated[int, Field(ge=1, le=10_000_000)]
Amount = Annotated[int, Field(ge=0, le=10**15)]


class Plain(BaseModel):
    """Frozen data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class AttentionShape(Plain):
    """The sizes of an attention: it reads `tokens_in` tokens and computes `tokens_out` of them."""

    kind: Literal["attention"] = "attention"
    tokens_in: Size
    tokens_out: Size
    heads: Size
    qk: Size
    v: Size


class FfnShape(Plain):
    """The sizes of a feed-forward sub-layer."""

    kind: Literal["ffn"] = "ffn"
    tokens: Size
    hidden: Size


class SelectShape(Plain):
    """The sizes of a selection of tokens for each image.

    Attributes:
        kind: "select".
        tokens: Tokens that it chooses from, prefix tokens included.
        kept: Tokens that it leaves.
        macs: Multiply-adds of its scores.
        reads: Channels that the norm of its predictor reads; 0 without one.
    """

    kind: Literal["select"] = "select"
    tokens: Size
    kept: Size
    macs: Amount = 0
    reads: Annotated[int, Field(ge=0, le=10_000_000)] = 0


SubLayerShape = Annotated[AttentionShape | FfnShape | SelectShape, Field(discriminator="kind")]


class NetworkShape(Plain):
    """The sizes of a network that its latency depends on.

    Attributes:
        embed: Channels of the residual stream.
        tokens: Tokens behind the stem, prefix tokens included.
        pixels: Multiply-adds of the stem for each token and channel: the numbers in a patch.
        classes: Outputs of the head; 1 without one.
        sublayers: What it computes, and the selections of tokens; what is gone is not listed.
    """

    embed: Size
    tokens: Size
    pixels: Size
    classes: Size
    sublayers: tuple[SubLayerShape, ...] = ()


def attention_parts(
    embed: Sizes,
    tokens_in: Sizes,
    tokens_out: Sizes,
    heads: Sizes,
    qk: Sizes,
    v: Sizes,
    *,
    tile: int,
) -> list[Any]:
    """Return the amount of each of `ATTENTION_PARTS` in an attention.

    Args:
        embed: Channels of the residual stream.
        tokens_in: Tokens that it reads.
        tokens_out: Tokens that it computes.
        heads: Heads.
        qk: Width of each head's queries and keys.
        v: Width of each head's values.
        tile: Columns that the kernels compute at once.

    Returns:
        One number or array for each part.
    """
    e, n, m, h = embed, tokens_in, tokens_out, heads
    # Queries of fewer tokens than are read are selected by an operator of its own.
    drops = np.not_equal(m, n)
    return [
        1,
        h,
        e * (m * whole_tiles(h * qk, tile) + n * whole_tiles(h * qk, tile))
        + e * n * whole_tiles(h * v, tile),
        h * m * (whole_tiles(n, tile) * qk + n * whole_tiles(v, tile)),
        m * h * v * whole_tiles(e, tile),
        n * m * h,
        n * e,
        m * e,
        h * ((n + m) * qk + (n + m) * v),
        drops * 1,
        e * h * (2 * qk + 2 * v),
    ]


def ffn_parts(embed: Sizes, tokens: Sizes, hidden: Sizes, *, tile: int) -> list[Any]:
    """Return the amount of each of `FFN_PARTS` in an FFN.

    Args:
        embed: Channels of the residual stream.
        tokens: Tokens that it computes.
        hidden: Hidden units.
        tile: Columns that the kernels compute at once.
    """
    products = tokens * (embed * whole_tiles(hidden, tile) + hidden * whole_tiles(embed, tile))
    return [1, products, tokens * embed, tokens * hidden, 2 * embed * hidden]


def end_parts(
    embed: Sizes, tokens: Sizes, pixels: Sizes, classes: Sizes, *, tile: int
) -> list[Any]:
    """Return the amount of each of `END_PARTS` outside the sub-layers.

    Args:
        embed: Channels of the residual stream.
        tokens: Tokens behind the stem.
        pixels: Multiply-adds of the stem for each token and channel.
        classes: Outputs of the head.
        tile: Columns that the kernels compute at once.
    """
    wide = whole_tiles(embed, tile)
    return [1, tokens * pixels * wide, tokens * embed, embed * classes]


def select_parts(embed: Sizes, tokens: Sizes, kept: Sizes, macs: Sizes, reads: Sizes) -> list[Any]:
    """Return the amount of each of `SELECT_PARTS` in a selection.

    Args:
        embed: Channels of the residual stream.
        tokens: Tokens that it chooses from.
        kept: Tokens that it leaves.
        macs: Multiply-adds of its scores.
        reads: Channels that its norm reads.
    """
    return [1, macs, tokens, tokens * reads, kept * embed]


def network_parts(network: NetworkShape, tile: int) -> Numbers:
    """Return the amount of each of `PARTS` in a network, (parts,)."""
    e = network.embed
    attention = np.zeros(len(ATTENTION_PARTS))
    ffn = np.zeros(len(FFN_PARTS))
    selects = np.zeros(len(SELECT_PARTS))
    for each in network.sublayers:
        if isinstance(each, AttentionShape):
            sizes = (e, each.tokens_in, each.tokens_out, each.heads, each.qk, each.v)
            attention += np.array(attention_parts(*sizes, tile=tile), dtype=np.float64)
        elif isinstance(each, FfnShape):
            ffn += np.array(ffn_parts(e, each.tokens, each.hidden, tile=tile), dtype=np.float64)
        else:
            chosen = select_parts(e, each.tokens, each.kept, each.macs, each.reads)
            selects += np.array(chosen, dtype=np.float64)
    ends = end_parts(e, network.tokens, network.pixels, network.classes, tile=tile)
    return np.concatenate([attention, ffn, np.array(ends, dtype=np.float64), selects])


def whole_tiles(width: Sizes, tile: int) -> Any:
    """Return widths rounded up to whole tiles."""
    return -(-width // tile) * tile
