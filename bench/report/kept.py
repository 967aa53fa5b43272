"""What remains of every block: branches grouped into blocks, and totals over the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .model import KeptBranch

# In the order of a block's columns; unknown dimensions follow under their own names.
NAMES = {"head": "heads", "qk": "q·k width", "v": "v width", "ffn": "FFN units"}
NAMES |= {"token": "tokens", "embed": "embed"}
# A bar of heads shows each of them as a cell, up to this number.
MOST_CELLS = 16


@dataclass(frozen=True)
class Bar:
    """One dimension of one block; `word` replaces the figures of a branch that was removed."""

    dimension: str
    name: str
    kept: int
    total: int
    word: str | None = None

    @property
    def share(self) -> float:
        """The kept share, from 0 to 1."""
        return self.kept / self.total if self.total else 0.0

    @property
    def label(self) -> str:
        """Name and figures in words."""
        return f"{self.name}: {self.word or f'{self.kept} of {self.total} kept'}"


@dataclass(frozen=True)
class Block:
    """A block of the network and its bars."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Kept:
    """The whole network.

    Attributes:
        columns: The dimensions of the blocks.
        blocks: All blocks in order.
        totals: Sums over the blocks.
        embed: The residual stream; None where blocks read different parts of it.
    """

    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    totals: tuple[Bar, ...]
    embed: Bar | None

    @property
    def stream_text(self) -> str:
        """The kept channels of the residual stream in one sentence; "" without `embed`."""
        if self.embed is None:
            return ""
        channels = f"{self.embed.kept} of {self.embed.total} channels"
        return f"The residual stream (embed) keeps {channels}, the same ones in every block."


def kept_blocks(branches: Sequence[KeptBranch]) -> Kept:
    """Group branches into blocks; at least one branch is required."""
    # A removed branch reads nothing, whatever the width of the stream.
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
            bars |= _removed_bars(branch)
        else:
            _add_bars(bars, branch, without_embed=shared)
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
    """`blocks.3.attn` -> `block 3`; other names lose their last part only."""
    parts = branch.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    if number is not None:
        return f"block {number}"
    return ".".join(parts[:-1]) or branch


def _removed_bars(branch: KeptBranch) -> dict[str, Bar]:
    word = "removed" if branch.kind == "removed" else "a constant"
    bars = {}
    for dimension in _dimensions(branch):
        total = branch.dims.get(dimension, (0, 0))[1]
        bars[dimension] = Bar(dimension, NAMES.get(dimension, dimension), 0, total, word)
    return bars


def _add_bars(bars: dict[str, Bar], branch: KeptBranch, *, without_embed: bool) -> None:
    for dimension, (part, total) in branch.dims.items():
        if dimension == "embed" and without_embed:
            continue
        known = bars.get(dimension)
        # Branches of a block may read different channels: the bar shows the wider one; of tokens
        # those that the block ends with.
        if known is None or part > known.kept or dimension == "token":
            bars[dimension] = Bar(dimension, NAMES.get(dimension, dimension), part, total)


def _dimensions(branch: KeptBranch) -> list[str]:
    own = [dimension for dimension in branch.dims if dimension != "embed"]
    if own:
        return own
    last = branch.branch.rsplit(".", 1)[-1].lower()
    return ["ffn"] if last in ("mlp", "ffn") else ["head", "qk", "v"]


def _total(column: str, blocks: Iterable[dict[str, Bar]]) -> Bar:
    bars = [bars[column] for bars in blocks if column in bars]
    kept, total = sum(bar.kept for bar in bars), sum(bar.total for bar in bars)
    return Bar(column, NAMES.get(column, column), kept, total)
