"""What is left of every block: branches grouped into blocks, dimensions with their plain names,
totals over the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .model import KeptBranch

# In the order in which a person reads a block; unknown dimensions follow under their own names.
NAMES = {"head": "heads", "qk": "q·k width", "v": "v width", "ffn": "FFN units", "embed": "embed"}
# Up to so many units a bar shows each as a cell.
MOST_CELLS = 16


@dataclass(frozen=True)
class Bar:
    """One dimension of one block; `total` 0 says that the branch is gone and `word` how."""

    dimension: str
    name: str
    kept: int
    total: int
    word: str | None = None

    @property
    def share(self) -> float:
        return self.kept / self.total if self.total else 0.0


@dataclass(frozen=True)
class Block:
    """A block of the network and its bars."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Kept:
    """The whole network: `columns` are the dimensions that the blocks show, `embed` the residual
    stream where all blocks agree on it.
    """

    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    totals: tuple[Bar, ...]
    embed: Bar | None


def kept_blocks(branches: Sequence[KeptBranch]) -> Kept:
    """Arrange `branches` for people; needs at least one."""
    # A branch that is gone reads nothing, which says nothing about the stream.
    embeds = {
        branch.dims["embed"]
        for branch in branches
        if "embed" in branch.dims and branch.kind in ("attention", "ffn")
    }
    shared = len(embeds) == 1
    blocks: dict[str, dict[str, Bar]] = {}
    for branch in branches:
        bars = blocks.setdefault(block_name(branch.branch), {})
        if branch.kind in ("removed", "constant"):
            word = "removed" if branch.kind == "removed" else "a constant"
            for dimension in _dims_of(branch):
                bars[dimension] = Bar(
                    dimension,
                    NAMES.get(dimension, dimension),
                    0,
                    branch.dims.get(dimension, (0, 0))[1],
                    word,
                )
            continue
        for dimension, (part, total) in branch.dims.items():
            if dimension == "embed" and shared:
                continue
            known = bars.get(dimension)
            # Two branches of a block may read different channels: the bar shows the wider one, and
            # only where they differ.
            if known is None or part > known.kept:
                bars[dimension] = Bar(dimension, NAMES.get(dimension, dimension), part, total)
    found = {dimension for bars in blocks.values() for dimension in bars}
    columns = [name for name in NAMES if name in found] + sorted(found - set(NAMES))
    return Kept(
        columns=tuple(columns),
        blocks=tuple(
            Block(name, tuple(bars[column] for column in columns if column in bars))
            for name, bars in blocks.items()
        ),
        totals=tuple(_total(column, blocks.values()) for column in columns if column != "embed"),
        embed=Bar("embed", "residual stream", *embeds.pop()) if shared else None,
    )


def block_name(branch: str) -> str:
    """`blocks.3.attn` -> `block 3`; names of another form lose their last part only."""
    parts = branch.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    if number is not None:
        return f"block {number}"
    return ".".join(parts[:-1]) or branch


def _dims_of(branch: KeptBranch) -> list[str]:
    own = [dimension for dimension in branch.dims if dimension != "embed"]
    if own:
        return own
    last = branch.branch.rsplit(".", 1)[-1].lower()
    return ["ffn"] if last in ("mlp", "ffn") else ["head", "qk", "v"]


def _total(column: str, blocks: Iterable[dict[str, Bar]]) -> Bar:
    bars = [bars[column] for bars in blocks if column in bars]
    return Bar(
        column,
        NAMES.get(column, column),
        sum(bar.kept for bar in bars),
        sum(bar.total for bar in bars),
    )
