"""Cut to a latency that is measured: export, measure the very file, correct the budget, repeat."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import Tensor

from ..bench.local.measure import measure_here
from ..bench.local.options import MeasureOptions
from ..bench.results.measurement import Measurement
from ..compress.latency.cut import LatencyCut, LatencyCuts
from ..compress.latency.shapes import network_shape
from ..compress.network.architecture import Architecture
from ..compress.network.files import TOKENS_FILE
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.trim import Trimmed
from ..core.console import status
from ..core.errors import InputError
from ..core.progress import Progress
from ..core.storage import replace_file
from ..export.exporter import export
from ..targets.cost_fit import refitted
from ..targets.cost_table import CostTable
from .bench_device import MeasureFiles, measure_at_device
from .latency_place import elsewhere, file_target
from .latency_table import shipped_artifact
from .masks_section import MasksSection
from .phases import RunContext
from .recipe import Recipe
from .token_step import token_record
from .trim_step import StageBars, latency_budget_ms, latency_cuts, show_latency

SCHEMA = "vitrim.latency/1"
LATENCY_FILE = "latency.json"
ROUNDS = 3
# A corrected budget aims this far below the latency; one that used less than this is enlarged.
MARGIN, USED = 0.99, 0.92
# Of all networks the solver finds one that the table underestimates, so that the first cut aims
# below the budget: by the table's excess, at most by the first of these; without it by twice the
# 95th percentile of random networks, at most by the second.
LARGEST_MARGIN, FIRST_MARGIN = 0.2, 0.07
# A measurement further above the prediction than this was disturbed, or the table is wrong: another
# one tells.
DISTURBED = 1.1
# Seconds of a measurement.
TIME_LIMIT_S = 20.0
PARITY_IMAGES = 64
Measure = Callable[[CompactModel], float]


@dataclass(frozen=True)
class Round:
    """One cut: the latency that the table had to predict at most, what it predicted, and measured.

    Attributes:
        budget_ms: The largest latency by the table.
        predicted_ms: That of the cut by the table.
        measured_ms: The p50 of the exported file.
    """

    budget_ms: float
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True)
class LatencyRecord:
    """How a cut came to its latency.

    Attributes:
        latency_ms: The budget.
        table: What the cost table is of.
        table_error: Median error of the table on whole networks; None if it was not checked.
        predicted_ms: The latency of the cut by the table.
        measured_ms: The p50 of its exported file; None if it was not measured.
        rounds: All cuts that were measured.
        estimated: Whether nothing was measured for the table, so that the budget is an estimate.
    """

    latency_ms: float
    table: str
    table_error: float | None
    predicted_ms: float
    measured_ms: float | None = None
    rounds: tuple[Round, ...] = ()
    estimated: bool = False

    @classmethod
    def of(
        cls,
        table: CostTable,
        latency_ms: float,
        predicted_ms: float,
        measured_ms: float | None = None,
        rounds: Sequence[Round] = (),
    ) -> LatencyRecord:
        """The record of a cut.

        Args:
            table: The cost table.
            latency_ms: The budget.
            predicted_ms: The latency of the cut by the table.
            measured_ms: The p50 of its exported file.
            rounds: All cuts that were measured.
        """
        error = None if table.whole is None else table.whole.median
        found = (latency_ms, table.title, error, predicted_ms, measured_ms, tuple(rounds))
        return cls(*found, estimated=table.estimated is not None)

    @property
    def met(self) -> bool | None:
        """Whether the measured latency is at or under the budget; None without a measurement."""
        return None if self.measured_ms is None else self.measured_ms <= self.latency_ms

    def text(self) -> str:
        """The outcome in one line."""
        budget, source = "budget", "the table"
        if self.estimated:
            budget, source = "estimated budget", f"an estimate ({self.table})"
        start = (
            f"latency: {budget} {self.latency_ms:.4g} ms, {self.predicted_ms:.4g} ms by {source}"
        )
        if self.measured_ms is None:
            return f"{start}, not measured"
        outcome = "met" if self.met else "NOT met"
        count = len(self.rounds)
        rounds = "the first cut" if count == 1 else f"{count} cuts"
        return f"{start}, measured {self.measured_ms:.4g} ms after {rounds}: {outcome}"

    def record(self) -> dict[str, Any]:
        """The contents of latency.json."""
        return {"schema": SCHEMA, **asdict(self), "met": self.met}


def cut_to_latency(
    cuts: LatencyCuts,
    latency_ms: float,
    measure: Measure | None = None,
    rounds: int = ROUNDS,
) -> tuple[LatencyCut, LatencyRecord]:
    """Cut a network to a latency, and correct the table's budget by what is measured.

    Args:
        cuts: The network.
        latency_ms: The largest latency in milliseconds.
        measure: Returns the latency of a network in milliseconds. None: the table's prediction is
            not checked.
        rounds: Largest number of cuts that are measured, at least 1.

    Returns:
        The cut of the largest measured latency within the budget; without one, the fastest. And
        how it was found.

    Raises:
        InputError: The budget cannot be met by the table.
    """
    table = cuts.table
    if measure is None:
        cut = cuts.cut(latency_ms)
        return cut, LatencyRecord.of(table, latency_ms, cut.latency_ms)
    found: list[tuple[LatencyCut, Round]] = []
    cut, budget_ms = _first_cut(cuts, latency_ms)
    try:
        for number in range(rounds):
            measured_ms = undisturbed_ms(measure, cut.model, cut.latency_ms)
            found.append((cut, Round(budget_ms, cut.latency_ms, measured_ms)))
            if USED * latency_ms <= measured_ms <= latency_ms or number + 1 == rounds:
                break
            predicted_ms = cut.latency_ms
            if len(found) > 1:
                # Networks of few tokens and of few channels may be off by different factors: one
                # factor alone moves the next cut from the one kind to the other and back.
                shapes = [network_shape(each.model.architecture) for each, _ in found]
                latencies = [step.measured_ms for _, step in found]
                cuts.table = refitted(table, list(zip(shapes, latencies, strict=True)))
                if cuts.table is not table:
                    predicted_ms = cuts.table.latency_ms(shapes[-1])
            budget_ms = MARGIN * predicted_ms * latency_ms / measured_ms
            try:
                cut = cuts.cut(budget_ms)
            except InputError:
                # The table has no smaller network; the record shows that the budget is not met.
                break
    finally:
        cuts.table = table
    cut, last = min(found, key=lambda each: _rank(each[1].measured_ms, latency_ms))
    steps = [each for _, each in found]
    return cut, LatencyRecord.of(table, latency_ms, last.predicted_ms, last.measured_ms, steps)


def undisturbed_ms(measure: Measure, model: CompactModel, predicted_ms: float) -> float:
    """The measured latency of a network; the smaller of two where one is far above its prediction.

    Args:
        measure: Returns the latency of a network in milliseconds.
        model: The network.
        predicted_ms: Its latency by the table.
    """
    measured_ms = measure(model)
    if measured_ms > DISTURBED * predicted_ms:
        measured_ms = min(measured_ms, measure(model))
    return measured_ms


def _first_cut(cuts: LatencyCuts, latency_ms: float) -> tuple[LatencyCut, float]:
    """The cut that is measured first, and its budget by the table."""
    margin = _first_margin(cuts.table)
    if margin:
        # The smallest network may be larger than that.
        with contextlib.suppress(InputError):
            return cuts.cut(latency_ms * (1 - margin)), latency_ms * (1 - margin)
    return cuts.cut(latency_ms), latency_ms


def _first_margin(table: CostTable) -> float:
    """The share by which the first cut aims below the budget."""
    if table.excess is not None:
        # Measured within a percent or two.
        over = max(0.0, table.excess) + 1 - MARGIN
        return min(over / (1 + over), LARGEST_MARGIN)
    return 0.0 if table.whole is None else min(2 * table.whole.p95, FIRST_MARGIN)


def _rank(measured_ms: float, latency_ms: float) -> tuple[bool, float]:
    """Within the budget the slowest comes first, and outside the fastest."""
    if measured_ms <= latency_ms:
        return False, -measured_ms
    return True, measured_ms


def trim_to_latency(
    baseline: CompactModel,
    images: Tensor,
    section: MasksSection,
    round_to: int,
    table: CostTable,
    context: RunContext,
) -> Trimmed:
    """Cut the baseline to the latency of `[masks]`; writes latency.json, and tokens.json.

    Args:
        baseline: The dense model.
        images: Unlabeled images, (images, channels, height, width), normalized.
        section: The latency, and how often the cut is measured.
        round_to: Kept widths are multiples of this.
        table: The cost table.
        context: The run.

    Returns:
        The cut and compensated model, and how it was cut.

    Raises:
        InputError: The budget is out of reach.
    """
    folder, quiet, target = context.folder.path, context.quiet, context.recipe.export.target
    measure = None
    if section.latency_rounds and not show_elsewhere(table, context.recipe, quiet=quiet):
        device = measure_at_device(context.recipe.bench, target)
        measure = file_measure(table, images[:PARITY_IMAGES], device, target=target)
    with StageBars(quiet=quiet) as bars:
        cuts = latency_cuts(baseline, images, section, round_to, table, bars)
        budget_ms = latency_budget_ms(baseline.architecture, section, table)
        found, record = cut_to_latency(cuts, budget_ms, measure, section.latency_rounds)
    show_latency(found, table, quiet=quiet)
    status(record.text(), quiet=quiet)
    replace_file(folder / LATENCY_FILE, latency_record(record))
    if found.tokens is not None:
        replace_file(folder / TOKENS_FILE, token_record(found.tokens))
    return found.trimmed


def show_elsewhere(table: CostTable, recipe: Recipe, *, quiet: bool) -> bool:
    """Print why files are not measured; whether that is so.

    Args:
        table: The cost table.
        recipe: The recipe, with the target of the files and the device.
        quiet: Print nothing.
    """
    reason = elsewhere(table, recipe.export.target, recipe.bench.on)
    if reason is not None:
        line = f"the cut is not measured: {reason}; bench.on names the device that measures it"
        status(escape(line), quiet=quiet)
    return reason is not None


def latency_record(record: LatencyRecord) -> str:
    """The contents of latency.json."""
    return json.dumps(record.record(), indent=1) + "\n"


def file_measure(
    table: CostTable,
    images: Tensor,
    measure: MeasureFiles | None = None,
    *,
    target: str | None = None,
    progress: Progress | None = None,
) -> Measure:
    """Measure networks as exported files of the table's runtime and precision.

    Args:
        table: The cost table.
        images: Normalized images for parity and calibration.
        measure: Measures {name: artifact folder}; by default this machine.
        target: The target of the files, a name or the path of a TOML; by default the table's.
        progress: Called with the share done (0 to 1) and a text. None: it is not.

    Returns:
        A function from a network to the p50 of its file in milliseconds.

    Raises:
        InputError: The table's target has no profile, and none is given.
    """
    report: Progress = progress or (lambda share, text: None)
    built_for = file_target(table, target)
    options = MeasureOptions(threads=table.threads, time_limit_s=TIME_LIMIT_S)

    def here(
        files: dict[str, Path], chosen: MeasureOptions, report_share: Progress
    ) -> dict[str, Measurement]:
        return measure_here(files, chosen, target=built_for, progress=report_share)

    def latency_ms(model: CompactModel) -> float:
        with tempfile.TemporaryDirectory(prefix="vitrim-latency-") as folder:
            file = Path(folder) / "compact"
            report(0.0, "exporting")
            export(
                model,
                file,
                target=built_for,
                runtime=table.runtime,
                precision=table.precision,  # type: ignore[arg-type]
                batch=table.batch,
                threads=table.threads,
                images=images,
            )
            found = (measure or here)({"compact": file}, options, report)["compact"]
        return 1e3 * found.summary().p50_s

    return latency_ms


def latency_entry(
    recipe: Recipe, dense: Architecture, folder: Path, measurements: Mapping[str, Measurement]
) -> dict[str, Any] | None:
    """The entry `latency` of report.json, from latency.json and the measurements of all artifacts.

    Args:
        recipe: The recipe.
        dense: The dense network.
        folder: The run folder.
        measurements: By the names of the artifacts.

    Returns:
        None where the budget is no latency.

    Raises:
        InputError: The cost table cannot be read.
    """
    path = folder / LATENCY_FILE
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = {key: value for key, value in record.items() if key != "schema"}
    name = shipped_artifact(recipe, dense)
    if name is None or name not in measurements:
        return found
    # The record is of the cut before fine-tuning, which is another file.
    p50_ms = 1e3 * measurements[name].summary().p50_s
    met = p50_ms <= record["latency_ms"]
    return {**found, "shipped": name, "shipped_ms": p50_ms, "shipped_met": met}
