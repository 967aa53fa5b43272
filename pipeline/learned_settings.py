"""How `[masks]` learns masks: the settings of the training, and a latency that it can reach."""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape

from ..compress.network.live_latency import NS_PER_MS
from ..compress.network.modules.model import CompactModel
from ..compress.train.mask_freeze import least_masked_ms
from ..compress.train.mask_settings import MaskSettings
from ..core.console import status
from .budget_reach import slack
from .latency_table import recipe_table
from .latency_training import Trial, learned_budget
from .phases import RunContext
from .recipe import Recipe

# A budget is a share of a whole number of nanoseconds, and its target another one.
ROUNDED_NS = 3


def learned_settings(
    recipe: Recipe,
    baseline: CompactModel,
    start: CompactModel,
    round_to: int,
    latency_ms: float | None = None,
) -> MaskSettings:
    """The settings of the mask learning of `[masks]`.

    Args:
        recipe: The sections `[masks]` and `[train]`.
        baseline: The dense model; the budget is a share of it.
        start: The network whose masks are learned.
        round_to: Kept widths are multiples of this.
        latency_ms: The latency by the table, if it is not that of the recipe.
    """
    section = recipe.masks
    return MaskSettings(
        budget=learned_budget(recipe, baseline, start, latency_ms),
        lambda_=section.lambda_,
        sharing=section.sharing,
        fixed=section.fixed,
        tokens=section.tokens == "learned" and "token" not in section.fixed,
        lr=section.lr,
        score_lr=section.score_lr,
        weight_decay=section.weight_decay,
        label_smoothing=recipe.train.label_smoothing,
        optimizer=recipe.train.optimizer,
        size_patience_epochs=section.patience_epochs,
        round_to=round_to,
        attention_overhead_macs=section.attention_overhead_macs,
        ffn_overhead_macs=section.ffn_overhead_macs,
        file_mb=section.file_mb,
        peak_memory_mb=section.peak_memory_mb,
        file_precision=section.file_precision,
    )


def within_reach(
    trial: Trial | None,
    baseline: CompactModel,
    start: CompactModel,
    round_to: int,
    context: RunContext,
) -> Trial | None:
    """The trial, with the least latency of masks where a measurement corrected it below that.

    The run then ends with the fastest network, and a record that the budget was not met, if it
    is not.

    Args:
        trial: What was measured.
        baseline: The dense model.
        start: The network whose masks are learned.
        round_to: Kept widths are multiples of this.
        context: The run.
    """
    if trial is None:
        return None
    recipe, quiet = context.recipe, context.quiet or not context.writes
    table = recipe_table(recipe, baseline.architecture)
    settings = learned_settings(recipe, baseline, start, round_to)
    least_ms = least_masked_ms(start.architecture, settings) + ROUNDED_NS / NS_PER_MS
    if trial.rounds and trial.table_ms < least_ms:
        status(
            f"measured, the budget is {trial.table_ms:.4g} ms by the table, which is below the "
            f"smallest that learned masks can reach, {least_ms:.4g} ms: they are learned for that, "
            "and the budget may not be met",
            quiet=quiet,
        )
        return replace(trial, table_ms=least_ms)
    if start is baseline and not trial.rounds:
        # It was shown before the baseline was trained.
        return trial
    what = "the dense model" if start is baseline else "the network that they are learned from"
    named = f"the budget of masks, {trial.table_ms:.4g} ms by the table,"
    loose = slack(named, trial.table_ms, start.architecture, table, what)
    if loose is not None:
        status(escape(loose), quiet=quiet)
    return trial
