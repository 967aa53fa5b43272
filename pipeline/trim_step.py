"""The cut without mask learning: closed-form masks and compensation from unlabeled images."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compress.latency.cut import LatencyCut, LatencyCuts, LatencyOptions
from ..compress.latency.problem import weight_precision
from ..compress.latency.shapes import network_shape
from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.network.architecture import Architecture
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.budgets import SHARES, Kind
from ..compress.oneshot.saved_state import SCHEMA as STATE_SCHEMA
from ..compress.oneshot.saved_state import STATE
from ..compress.oneshot.trim import Row, Trimmed, TrimOptions, predict, trim, trim_to
from ..compress.surgery.compactor import compact, output_error
from ..core.console import progress_bar, show, status
from ..core.written_kinds import Contents, FolderKind, has_schema, json_object
from ..targets.cost_table import CostTable
from .masks_section import MasksSection

TRIM_SCHEMA = "vitrim.trim/1"
# Where something is added after a cut: the share of the budget that is enough, how often the cut is
# repeated for more, and the largest factor on a budget that was exceeded.
FILLED, TRIES, DOWN = 0.97, 4, 0.99
# The largest share that a cut can be given.
LARGEST = 0.999


def _state_contents(folder: Path) -> Contents | None:
    if not has_schema(json_object(folder / STATE), STATE_SCHEMA):
        return None
    return {STATE: None, "*.safetensors": None}


STATE_FOLDER = FolderKind("the state of a cut", STATE, _state_contents)
STAGES = {
    "weigh": "weighing the depths",
    "predict": "predicting errors",
    "compensate": "compensating",
    "score": "scoring tokens",
    "gates": "training gates",
    "errors": "measuring errors",
    "slim": "slimming blocks",
    "evaluate": "pruning single blocks",
    "compare": "comparing candidates",
    "learn": "comparing buckets",
}


class StageBars(contextlib.ExitStack):
    """A progress bar for each stage of `trim`, shown one after the other."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet
        self._stage = ""
        self._advance: Callable[[int], None] = lambda done: None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are complete."""
        if stage != self._stage:
            self.close()
            bar = progress_bar(STAGES.get(stage, stage), total, quiet=self._quiet)
            self._stage, self._advance = stage, self.enter_context(bar)
        self._advance(done)


def latency_budget_ms(architecture: Architecture, section: MasksSection, table: CostTable) -> float:
    """The latency of `[masks]` in milliseconds; a share is that of the dense model by the table.

    Raises:
        InputError: There is a budget of energy, and the table has no power.
    """
    if section.latency_ms is not None:
        found = section.latency_ms
    else:
        assert section.latency is not None
        found = section.latency * table.latency_ms(network_shape(architecture))
    if section.energy_mj is None:
        return found
    return min(found, table.energy_latency_ms(section.energy_mj, "masks.energy_mj"))


def _budget(section: MasksSection) -> tuple[Kind, float]:
    """The kind and the amount of the budget, as `trim` takes them."""
    if section.file_mb is not None:
        return "file", section.file_mb * 1e6
    if section.params is not None:
        return "params", section.params
    assert section.macs is not None
    return "macs", section.macs


def start_section(section: MasksSection) -> MasksSection:
    """The closed-form cut that `start = "one-shot"` begins with: the square root of the budget.

    The closed form loses little there, and the masks learn the other half of the way.
    """
    shares = {"params": section.params, "macs": section.macs}
    larger = {kind: None if share is None else share**0.5 for kind, share in shares.items()}
    return section.model_copy(update=larger)


def trim_baseline(
    baseline: CompactModel,
    images: Tensor,
    section: MasksSection,
    round_to: int,
    *,
    count: Callable[[Architecture], float] | None = None,
    quiet: bool,
) -> Trimmed:
    """Cut the baseline without training, with a progress bar for each stage.

    Args:
        baseline: The dense model.
        images: Unlabeled images, (images, channels, height, width), normalized.
        section: The budget.
        round_to: Kept widths are multiples of this.
        count: From a cut network to its cost with what is added to it afterwards, in the unit of
            the budget (default: nothing is).
        quiet: Print nothing.

    Returns:
        The cut and compensated model, and how it was cut.

    Raises:
        InputError: The budget is out of reach.
    """
    options = TrimOptions(round_to=round_to, precision=section.file_precision or "fp32")
    kind, amount = _budget(section)
    with StageBars(quiet=quiet) as bars:
        if count is None:
            found = trim(baseline, images, budget=amount, kind=kind, options=options, progress=bars)
        else:
            prediction = predict(baseline, images, options=options, progress=bars)
            # At first as if it saved as much of the cut network as of the baseline.
            first = amount / count(baseline.architecture) if kind in SHARES else amount
            most = LARGEST if kind in SHARES else math.inf
            found = _trimmed_within(
                amount,
                lambda budget: trim_to(
                    prediction, budget=min(budget, most), kind=kind, progress=bars
                ),
                lambda each: count(each.model.architecture),
                first,
            )
    status(
        f"predicted error {found.predicted_error:.3g} of the features' variance, cosine to the "
        f"dense features {found.check.cosine:.4f} on {found.check.images} held-out images",
        quiet=quiet,
    )
    return found


def _trimmed_within(
    amount: float,
    trimmed: Callable[[float], Trimmed],
    count: Callable[[Trimmed], float],
    first: float,
) -> Trimmed:
    """The cut whose cost with what is added to it is at most `amount`.

    Args:
        amount: The cost not to exceed.
        trimmed: Cuts to a budget of the widths alone.
        count: The cost of a cut with what is added to it.
        first: The budget of the widths that is tried first.

    Returns:
        The largest cut within the budget of those that were tried.
    """
    found: list[tuple[float, Trimmed]] = []
    budget, tries = first, 0
    # The cost of a cut follows its budget in steps; below the last one, `trimmed` raises.
    while not found or tries < TRIES:
        cut = trimmed(budget)
        total, tries = count(cut), tries + 1
        if total <= amount:
            found.append((total, cut))
        if total <= amount and (total >= FILLED * amount or tries >= TRIES):
            break
        budget *= amount / total if total < amount else min(DOWN, amount / total)
    return max(found, key=lambda pair: pair[0])[1]


def latency_cuts(
    baseline: CompactModel,
    images: Tensor,
    section: MasksSection,
    round_to: int,
    table: CostTable,
    bars: StageBars,
) -> LatencyCuts:
    """The cuts of the baseline to latencies, after one pass over the images.

    Args:
        baseline: The dense model.
        images: Unlabeled images, (images, channels, height, width), normalized.
        section: The budgets beside the latency, and whether tokens stay.
        round_to: Kept widths are multiples of this.
        table: The cost table.
        bars: Shows the stages.
    """
    precision = weight_precision(table, section.file_precision)
    return LatencyCuts(
        baseline,
        images,
        table,
        options=TrimOptions(round_to=round_to, precision=precision),
        latency=LatencyOptions(
            tokens=patches_may_leave(section),
            candidates=section.candidates,
            file_mb=section.file_mb,
            peak_memory_mb=section.peak_memory_mb,
        ),
        progress=bars,
    )


def patches_may_leave(section: MasksSection) -> bool:
    """Whether a cut to a latency may drop patches; tokens that are chosen otherwise stay."""
    return "token" not in section.fixed and section.tokens is None


def show_latency(found: LatencyCut, table: CostTable, *, quiet: bool = False) -> None:
    """Print the latency by the table beside the budget, and how many tokens each block keeps."""
    source = "by the table of" if table.estimated is None else "by an estimate of"
    status(
        f"{found.latency_ms:.4g} ms of {found.budget_ms:.4g} ms {source} {table.title}",
        quiet=quiet,
    )
    if found.tokens is not None:
        counts = ", ".join(map(str, dict.fromkeys(found.tokens.counts.values())))
        status(f"tokens: {counts}", quiet=quiet)


def show_fits(found: Trimmed) -> None:
    """Print the error of the stream behind each sub-layer, before and after its refit."""
    for fit in found.fits:
        show(
            f"{fit.branch}: error {fit.before:.3g} -> {fit.after:.3g} of what the sub-layer adds, "
            f"ridge {fit.ridge:g}"
        )


def trim_record(found: Trimmed, **more: Any) -> str:
    """The contents of trim.json: what was predicted, chosen, refitted and measured.

    Args:
        found: The cut.
        more: Further entries, such as the accuracies of features.
    """
    record: dict[str, Any] = {
        "schema": TRIM_SCHEMA,
        "predicted_error": found.predicted_error,
        "cost_share": found.cost,
        "check": asdict(found.check),
        "widths": {name: dict(widths) for name, widths in found.widths.items()},
        "rows": [_row(row) for row in found.rows],
        "fits": [asdict(fit) for fit in found.fits],
        **more,
    }
    return json.dumps(record, indent=1) + "\n"


def _row(row: Row) -> dict[str, Any]:
    """One sub-layer of trim.json: widths, errors as shares of the features' variance, cost."""
    return {
        "name": row.name,
        "before": dict(row.before),
        "after": dict(row.after),
        "predicted": row.predicted,
        "measured": row.measured,
        "cost_share": row.cost_share,
    }


def exact_cut_error(rotated: CompactModel, mask: StructuredMask, images: Tensor) -> float:
    """Largest difference of logits between masked and cut network, before compensation.

    It is relative to the largest logit.
    """
    return output_error(masked(rotated, mask), compact(rotated, mask), images)
