"""Latency saved by static token masks: `python -m benchmarks.speed.tokens`.

(latency speed-up) / (MAC reduction) of Vision Transformers with token masks against the dense one,
in ONNX Runtime fp32 (the form that `vitrim.export` chooses) and in our TVM kernels fp32, one
thread, batch 1 and 8: 1.0 where time fell exactly as the multiply-adds did. Two cuts: tokens alone
at 57 % of the multiply-adds (a twentieth of the patches is never embedded, the others leave
linearly from the third block on, those far from the centre first), and tokens and widths together
at half of them. The last attention computes the queries that the head reads only, in the dense
model too, and MACs count that.

The models of a row take turns in one process; the processor time of the computing thread is
measured, which other programs do not lengthen. Each row is measured several times, at different
moments: a ratio is the median over turns, each of which divides two neighbours in time, and in
brackets the smallest and largest of the passes. Weights are random.

    python -m benchmarks.speed.tokens [--model deit_small_patch16_224 ...] [--batch 1 8]
        [--runtime onnxruntime tvm] [--passes 3] [--limit-s 20] [--work FOLDER] [--out FILE]

Artifacts stay in the work folder, and a later run uses them again. Writes `results/tokens.json` and
`tokens.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vitrim
from torch import Tensor
from vitrim.bench.local.environment import read_machine
from vitrim.compress.masks.groups import token_sites
from vitrim.compress.network.architecture import Architecture, AttentionSpec
from vitrim.compress.network.modules.model import CompactModel
from vitrim.targets.catalog import load_target

from ..models import computed_macs, lifted
from ..results_file import RESULTS, markdown_head, markdown_row, publish
from .avx2 import opened
from .quotients import RUNTIMES, command_line, measured_rows, quotient_cells

TOKENS, BOTH = "tokens", "tokens and widths"
# The share of the multiply-adds that a cut keeps; of the second one, tokens alone would keep 0.7.
SHARES = {TOKENS: 0.57, BOTH: 0.5}
BOTH_TOKENS = 0.7
# The share of the patches that the stem embeds, and the blocks that compute all of these.
EMBEDDED, WHOLE_BLOCKS = 0.95, 2
GOAL = 0.97
SCHEMA = "vitrim.benchmark-tokens/1"


def patch_counts(architecture: Architecture, least: int) -> list[int]:
    """The patches that the stream carries after the stem, and after each attention but the last.

    Args:
        architecture: The dense network.
        least: How many the last attention reads.
    """
    first = round(EMBEDDED * architecture.patches)
    attentions = len(attention_sites(architecture))
    falling = attentions - 1 - WHOLE_BLOCKS
    rest = [round(first - (first - least) * (n + 1) / falling) for n in range(falling)]
    return [first] * (1 + WHOLE_BLOCKS) + rest


def attention_sites(architecture: Architecture) -> list[str]:
    """The site of each step with an attention."""
    sites = list(token_sites(architecture))[1:]
    return [
        site
        for site, step in zip(sites, architecture.steps, strict=True)
        if any(isinstance(branch.core, AttentionSpec) for branch in step)
    ]


def nested_sets(architecture: Architecture, counts: Iterable[int]) -> dict[str, Tensor]:
    """Entries of a mask: the patches nearest to the centre of the image at each site.

    Args:
        architecture: The dense network.
        counts: As of `patch_counts`.
    """
    (down, across), prefix = architecture.grid, architecture.prefix
    rows, columns = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
    distance = (rows - (down - 1) / 2) ** 2 + (columns - (across - 1) / 2) ** 2
    order = torch.argsort(distance.flatten(), stable=True)
    sites = [next(iter(token_sites(architecture))), *attention_sites(architecture)]
    entries = {}
    for site, count in zip(sites, counts, strict=False):
        entries[site] = torch.zeros(architecture.tokens, dtype=torch.bool)
        entries[site][:prefix] = True
        entries[site][prefix + order[:count]] = True
    return entries


def with_tokens(dense: CompactModel, share: float) -> dict[str, Tensor]:
    """The entries of a token mask that keeps this share of the multiply-adds, or slightly less."""
    architecture = dense.architecture
    few, many = 1, round(EMBEDDED * architecture.patches)
    while many - few > 1:
        middle = (few + many) // 2
        entries = nested_sets(architecture, patch_counts(architecture, middle))
        kept = computed_macs(vitrim.compact(dense, vitrim.StructuredMask({"token": entries})))
        few, many = (few, middle) if kept > share * computed_macs(dense) else (middle, many)
    return nested_sets(architecture, patch_counts(architecture, few))


def with_widths(dense: CompactModel, tokens: dict[str, Tensor], round_to: int) -> CompactModel:
    """Tokens, one head less, and as many FFN units as leave half of the multiply-adds."""
    attention, ffn = dense.architecture.steps[0][0].core, dense.architecture.steps[1][0].core
    heads, hidden = attention.heads, ffn.hidden  # type: ignore[union-attr]

    def cut(units: int) -> CompactModel:
        ratios = {"head": (heads - 1) / heads, "ffn": units / hidden}
        widths = vitrim.StructuredMask.random(dense, ratios)
        return vitrim.compact(dense, vitrim.StructuredMask({**widths.kept, "token": tokens})).eval()

    few, many = computed_macs(cut(round_to)), computed_macs(cut(hidden))
    wanted = SHARES[BOTH] * computed_macs(dense)
    # Multiply-adds are linear in the FFN's width.
    units = round_to + (wanted - few) / (many - few) * (hidden - round_to)
    return cut(round_to * round(units / round_to))


@dataclass(frozen=True)
class Models:
    """The dense model of a name, and its cuts."""

    name: str

    @cached_property
    def all(self) -> dict[str, CompactModel]:
        """{"dense" or cut: model}."""
        dense = lifted(self.name)
        mask = vitrim.StructuredMask({"token": with_tokens(dense, SHARES[TOKENS])})
        both = with_widths(dense, with_tokens(dense, BOTH_TOKENS), load_target("host").round_to)
        return {"dense": dense, TOKENS: vitrim.compact(dense, mask).eval(), BOTH: both}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = result["rows"]
    reached = sum(row["quotient"] >= GOAL for row in rows)
    lines = [
        f"`python -m benchmarks.speed.tokens` on {result['machine']['cpu_model']}, one thread, the "
        "models of a row in turns: processor time, median; the quotient is speed-up over MAC "
        f"reduction, with the smallest and largest of {result['passes']} passes.",
        "",
        *markdown_head(
            *("model", "cut", "runtime", "batch", "G MACs", "dense (ms)", "cut (ms)"),
            *("speed-up", "MAC reduction", "quotient", "passes"),
            numbers=8,
        ),
    ]
    for row in rows:
        runtime = RUNTIMES[row["runtime"]]
        cells = (row["model"], row["cut"], runtime, row["batch"], *quotient_cells(row))
        lines.append(markdown_row(*cells))
    lines += ["", f"A quotient of at least {GOAL}: {reached} of {len(rows)} rows."]
    lines += [f"- {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Export, measure, and write both files."""
    parser = command_line(__doc__, Path("runs/benchmark-tokens"), RESULTS / "tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, absent = measured_rows(
        options, lambda name: (("dense", TOKENS, BOTH), Models(name).all.__getitem__), opened
    )
    result = {
        "schema": SCHEMA,
        "machine": read_machine(),
        "passes": options.passes,
        "goal": GOAL,
        "rows": rows,
        "absent": absent,
    }
    publish(options.out, result, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
