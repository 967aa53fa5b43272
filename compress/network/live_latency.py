"""The latency of a network of which only some units are live, by a cost table.

It equals the table's latency of the network that `compact` builds, as it is exported: the last
attention has queries for what the head reads. The stream has one width.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

from ...targets.cost_table import CostTable
from .architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from .axes import STEM_OUT
from .cost import Live, attention_counts, embedded, live_select_widths, live_tokens
from .select_specs import select_inputs, select_macs, selected_tokens

# Whole nanoseconds, so that a budget is compared with whole numbers.
NS_PER_MS = 10**6
KNOWN_SIZES = 65536


def plain_hidden(core: FfnSpec, hidden: int) -> int:
    """The hidden width of an FFN of two matrices with as many multiply-adds as one of `hidden`."""
    return math.ceil(1.5 * hidden) if core.gated else hidden


class LatencyCost:
    """Latencies in whole nanoseconds; those of sub-layers of known sizes are not computed again.

    Args:
        table: The cost table of the target, runtime and precision.
    """

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._attention = lru_cache(KNOWN_SIZES)(table.attention_ms)
        self._ffn = lru_cache(KNOWN_SIZES)(table.ffn_ms)

    @property
    def tile(self) -> int:
        """Columns that the kernels compute at once."""
        return self.table.tile

    def __call__(self, architecture: Architecture, live: Live) -> int:
        """The latency of the live network in nanoseconds, rounded up.

        Args:
            architecture: The network, with `last_queries`.
            live: Returns numbers of live units, as `compress.network.cost` describes it.
        """
        return math.ceil(NS_PER_MS * self.latency_ms(architecture, live))

    def latency_ms(self, architecture: Architecture, live: Live) -> float:
        """The latency of the live network in milliseconds; the arguments are `__call__`'s."""
        names = [branch.name for branch in architecture.branches]
        removed = {name for name in names if not live("block", name, None)}
        tokens = [int(count) for count in live_tokens(architecture, live, removed)]
        embed = int(live("embed", STEM_OUT, None))
        total = self._ends(architecture, live, embed, tokens[0], removed)
        for number, step in enumerate(architecture.steps):
            read = selected_tokens(architecture, number, tokens[number])
            for branch in step:
                if branch.name not in removed:
                    total += self._branch(branch, live, embed, read, tokens[number + 1])
        for select, before, count in select_inputs(architecture, tokens):
            widths = live_select_widths(architecture, select, live)
            macs = int(select_macs(architecture, select, widths, before, count))
            reads = int(widths.reads) if select.norm is not None else 0
            kept = architecture.prefix + select.left
            total += float(self.table.select_ms(embed, count, kept, macs, reads))
        return self.table.corrected_ms(total)

    def _ends(
        self,
        architecture: Architecture,
        live: Live,
        embed: int,
        tokens: int,
        removed: Collection[str],
    ) -> float:
        stem, patches = architecture.stem, int(embedded(architecture, live, removed)[1])
        filled = int(live("embed", STEM_OUT, architecture.stem_writes))
        window = stem.inputs(architecture.image[0])[-1] * stem.patch[0] * stem.patch[1]
        macs = stem.before_macs(*architecture.image) + patches * filled * window
        pixels = max(1, math.ceil(macs / (patches * filled)))
        classes = architecture.classes if architecture.head is not None else 1
        return float(self.table.ends_ms(embed, tokens, pixels, classes))

    def _branch(
        self, branch: BranchSpec, live: Live, embed: int, tokens: int, queries: int
    ) -> float:
        core = branch.core
        if isinstance(core, AttentionSpec):
            heads, qk, v = map(int, attention_counts(branch.name, live))
            return float(self._attention(embed, tokens, queries, heads, core.parts * qk, v))
        if isinstance(core, FfnSpec):
            hidden = int(live("ffn", branch.name, None))
            return float(self._ffn(embed, queries, plain_hidden(core, hidden)))
        return 0.0
