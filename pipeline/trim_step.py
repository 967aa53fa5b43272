"""The cut without mask learning: closed-form masks and compensation from unlabeled images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bench.local.cost_table import CostTable
from ..compress.masks.mask import StructuredMask
from ..compress.masks.masked import masked
from ..compress.network.architecture import Architecture
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost, smallest_cost
from ..compress.oneshot.budgets import Kind, file_bytes
from ..compress.oneshot.saved_state import SCHEMA as STATE_SCHEMA
from ..compress.oneshot.saved_state import STATE
from ..compress.oneshot.trim import Row, Trimmed, TrimOptions, trim
from ..compress.surgery.compactor import compact, output_error
from ..core.console import progress_bar, show, status
from ..core.errors import InputError
from ..core.written_kinds import Contents, FolderKind, has_schema, json_object
from .masks_section import MasksSection

TRIM_SCHEMA = "vitrim.trim/1"


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


def require_budget(
    architecture: Architecture,
    section: MasksSection,
    *,
    options: tuple[str, str] = ("masks.macs", "masks.params"),
) -> None:
    """Check that the budget can be met.

    Args:
        architecture: The dense model.
        section: The budget.
        options: The names of its two kinds in an error.

    Raises:
        InputError: It is below the size of what is never cut; the message gives that size.
    """
    if section.file_mb is not None:
        empty = architecture.model_copy(update={"steps": ()})
        least_mb = file_bytes(empty, section.file_precision) / 1e6
        if section.file_mb <= least_mb:
            raise InputError(
                f"masks.file_mb = {section.file_mb}: the stem and the head, which are not cut, "
                f"are {least_mb:.3f} MB; give a larger budget"
            )
        return
    if section.cost_table is not None:
        CostTable.load(section.cost_table)
        return
    kind, share = ("params", section.params) if section.params else ("macs", section.macs)
    option = options[kind == "params"]
    least = smallest_cost(architecture, kind) / network_cost(architecture, kind)
    if share is None or share <= least:
        raise InputError(
            f"{option} = {share}: the stem and the head, which are not cut, are {least:.3f} of "
            "this model; give a larger budget"
        )


def _budget(section: MasksSection) -> tuple[Kind, float]:
    """The kind and the amount of the budget, as `trim` takes them."""
    if section.file_mb is not None:
        return "file", section.file_mb * 1e6
    if section.latency_ms is not None:
        return "cost", section.latency_ms
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
    baseline: CompactModel, images: Tensor, section: MasksSection, round_to: int, *, quiet: bool
) -> Trimmed:
    """Cut the baseline without training, with a progress bar for each stage.

    Args:
        baseline: The dense model.
        images: Unlabeled images, (images, channels, height, width), normalized.
        section: The budget.
        round_to: Kept widths are multiples of this.
        quiet: Print nothing.

    Returns:
        The cut and compensated model, and how it was cut.

    Raises:
        InputError: The budget is out of reach.
    """
    costs = None if section.cost_table is None else CostTable.load(section.cost_table).costs_s
    options = TrimOptions(round_to=round_to, cost=costs, precision=section.file_precision)
    kind, amount = _budget(section)
    with StageBars(quiet=quiet) as bars:
        found = trim(
            baseline,
            images,
            budget=amount,
            kind=kind,
            options=options,
            progress=bars,
        )
    status(
        f"predicted error {found.predicted_error:.3g} of the features' variance, cosine to the "
        f"dense features {found.check.cosine:.4f} on {found.check.images} held-out images",
        quiet=quiet,
    )
    return found


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
