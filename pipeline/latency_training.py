"""Masks that are learned for a latency: the budget of the training, and the measured files.

Before training a network of about the wanted sizes is measured, which corrects the budget by the
table; after it, the masks become smaller while the file of the cut is too slow.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import cast

import torch

from ..compress.latency.shapes import network_shape
from ..compress.latency.trial import trial_network
from ..compress.masks.budget import Budget
from ..compress.network.cost import CostKind
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost
from ..compress.train.mask_task import MaskTask
from ..core.console import status
from ..core.errors import InputError
from ..core.storage import replace_file
from ..targets.cost_table import CostTable
from .bench_device import measure_at_device
from .latency_loop import (
    LATENCY_FILE,
    MARGIN,
    PARITY_IMAGES,
    LatencyRecord,
    Measure,
    Round,
    file_measure,
    latency_record,
    show_elsewhere,
    undisturbed_ms,
)
from .latency_table import is_measured, recipe_table
from .phases import RunContext
from .recipe import Recipe
from .trim_step import latency_budget_ms

# The budget by the table is corrected by at most these factors before training.
LEAST, MOST = 0.5, 2.0


def learned_budget(
    recipe: Recipe,
    baseline: CompactModel,
    start: CompactModel,
    latency_ms: float | None = None,
) -> Budget | None:
    """The budget of mask learning as a share of the network that it starts from.

    Args:
        recipe: The budget of `[masks]`; shares are those of the baseline.
        baseline: The dense model.
        start: The network whose masks are learned.
        latency_ms: The latency by the table that replaces that of the recipe.

    Returns:
        The budget; None with a lambda.

    Raises:
        InputError: There is no cost table for a latency.
    """
    section = recipe.masks
    if section.has_latency:
        table = recipe_table(recipe, baseline.architecture)
        budget_ms = latency_ms or latency_budget_ms(baseline.architecture, section, table)
        start_ms = table.latency_ms(network_shape(start.architecture))
        return Budget("latency", min(1.0, budget_ms / start_ms), table)
    for kind, size in (("params", section.params), ("macs", section.macs)):
        if size is not None:
            counted = cast("CostKind", kind)
            sizes = [network_cost(each.architecture, counted) for each in (baseline, start)]
            return Budget(counted, min(1.0, size * sizes[0] / sizes[1]))
    return None


@dataclass(frozen=True)
class Trial:
    """What is known about a latency before masks are learned for it.

    Attributes:
        table_ms: The latency by the table that they are learned for.
        rounds: The measured network of similar sizes, if there is one.
    """

    table_ms: float
    rounds: tuple[Round, ...] = ()


def measured_trial(
    baseline: CompactModel, start: CompactModel, round_to: int, context: RunContext, *, resume: bool
) -> Trial | None:
    """Measure a network of about the wanted sizes, and correct the budget by the table.

    Which units it keeps is not learned: latency depends on sizes only. Writes latency.json.

    Args:
        baseline: The dense model; shares of a latency are those of it.
        start: The network whose masks are learned.
        round_to: Kept widths are multiples of this.
        context: The run.
        resume: Use the measurement of an earlier attempt.

    Returns:
        The latency to learn masks for; None if the budget is no latency.
    """
    recipe, processes = context.recipe, context.host.processes
    if not recipe.masks.has_latency:
        return None
    table = recipe_table(recipe, baseline.architecture)
    budget_ms = latency_budget_ms(baseline.architecture, recipe.masks, table)
    if not is_measured(recipe, table):
        return Trial(budget_ms)
    found: list[dict[str, float]] = []
    if processes.is_main:
        path = context.folder / LATENCY_FILE
        if resume and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))["rounds"][:1]
        if not found:
            small = trial_network(
                start, budget_ms, table, round_to, tokens=recipe.masks.tokens == "learned"
            )
            if small is not None:
                images = context.data.val.floats(slice(0, PARITY_IMAGES))
                measure = _file_measure(table, images, recipe)
                predicted_ms = table.latency_ms(network_shape(small.architecture))
                measured_ms = undisturbed_ms(measure, small, predicted_ms)
                found = [asdict(Round(budget_ms, predicted_ms, measured_ms))]
    rounds = tuple(Round(**each) for each in processes.from_main(found))
    if not rounds:
        return Trial(budget_ms)
    first = rounds[0]
    if context.writes:
        record = LatencyRecord.of(table, budget_ms, first.predicted_ms, None, rounds)
        replace_file(context.folder / LATENCY_FILE, latency_record(record))
    factor = MARGIN * first.predicted_ms / first.measured_ms
    return Trial(budget_ms * min(MOST, max(LEAST, factor)), rounds)


def _file_measure(table: CostTable, images: torch.Tensor, recipe: Recipe) -> Measure:
    """What measures networks as files, on this machine or on the device of `bench.on`."""
    target = recipe.export.target
    return file_measure(table, images, measure_at_device(recipe.bench, target), target=target)


def verified(task: MaskTask, baseline: CompactModel, context: RunContext, trial: Trial) -> None:
    """Measure the file of learned masks, and round them again while it is too slow.

    Weights and units are those of the end of mask learning; fine-tuning follows. Writes
    latency.json. Without measurements, it has the latency by the table.

    Args:
        task: The finished mask learning; its masks may become smaller.
        baseline: The dense model; shares of a latency are those of it.
        context: The run.
        trial: What was measured before.
    """
    recipe, processes = context.recipe, context.host.processes
    table = recipe_table(recipe, baseline.architecture)
    budget_ms = latency_budget_ms(baseline.architecture, recipe.masks, table)
    steps: list[Round] = []
    budgets: list[float] = []
    record = LatencyRecord.of(table, budget_ms, task.latency_ms())
    if recipe.masks.latency_rounds:
        show_elsewhere(table, recipe, quiet=context.quiet)
    if is_measured(recipe, table):
        if processes.is_main:
            images = context.data.val.floats(slice(0, PARITY_IMAGES))
            measure = _file_measure(table, images, recipe)
            steps, budgets = tightened(
                task, budget_ms, trial.table_ms, measure, recipe.masks.latency_rounds
            )
        # All processes continue with the same masks.
        budgets = processes.from_main(budgets)
        if not processes.is_main:
            for smaller in budgets:
                task.tighten(smaller)
        elif steps:
            last, every = steps[-1], (*trial.rounds, *steps)
            record = LatencyRecord.of(table, budget_ms, last.predicted_ms, last.measured_ms, every)
    if context.writes:
        status(record.text(), quiet=context.quiet)
        replace_file(context.folder / LATENCY_FILE, latency_record(record))


def tightened(
    task: MaskTask, budget_ms: float, table_ms: float, measure: Measure, rounds: int
) -> tuple[list[Round], list[float]]:
    """Measure the cut, and tighten its masks until the file is within the budget.

    Args:
        task: The finished mask learning.
        budget_ms: The latency.
        table_ms: The latency by the table that the masks were learned for.
        measure: Returns the latency of a network in milliseconds.
        rounds: Largest number of cuts that are measured, at least 1.

    Returns:
        All cuts that were measured, and the latencies by the table that masks were tightened to.
    """
    found: list[Round] = []
    budgets: list[float] = []
    latest_ms = table_ms
    for number in range(rounds):
        predicted_ms = task.latency_ms()
        measured_ms = undisturbed_ms(measure, task.result(), predicted_ms)
        found.append(Round(latest_ms, predicted_ms, measured_ms))
        if measured_ms <= budget_ms or number + 1 == rounds:
            break
        latest_ms = MARGIN * predicted_ms * budget_ms / measured_ms
        try:
            task.tighten(latest_ms)
        except InputError:
            # No smaller network is left to round to; the record shows that the budget is not met.
            break
        budgets.append(latest_ms)
    return found, budgets
