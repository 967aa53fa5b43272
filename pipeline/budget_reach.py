"""Whether the budgets of a cut can be met, before any work: all of them, by their own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rich.markup import escape

from ..compress.latency.losses import Losses, uniform_losses
from ..compress.latency.problem import weight_precision
from ..compress.latency.search import require_limits
from ..compress.latency.shapes import network_shape
from ..compress.latency.solution import Limits, SolveOptions
from ..compress.network.architecture import Architecture
from ..compress.oneshot.allocation import network_cost, smallest_cost
from ..compress.oneshot.budgets import file_bytes
from ..compress.oneshot.choice import STREAM_SHARES
from ..compress.oneshot.stream_rotation import stream_obstacle
from ..compress.tokens.counts import STEM
from ..core.console import status
from ..core.errors import InputError
from ..targets.cost_table import CostTable
from .masks_section import MasksSection
from .recipe import Recipe
from .trim_step import latency_budget_ms, patches_may_leave

# The multiple of widths where neither the recipe nor a target has one.
ROUND_TO = 8


def require_budget(
    architecture: Architecture,
    section: MasksSection,
    table: CostTable | None = None,
    *,
    round_to: int | None = None,
    options: Mapping[str, str] | None = None,
) -> None:
    """Check that the budgets of a cut in closed form can be met.

    Args:
        architecture: The dense model.
        section: The budgets.
        table: The cost table of a latency.
        round_to: Kept widths are multiples of this (default: as in the section, or 8).
        options: The names of `macs`, `params` and `file_mb` in an error (default: as in a recipe).

    Raises:
        InputError: One is below what can be reached; the message gives that.
    """
    names = options or {key: f"masks.{key} =" for key in ("macs", "params", "file_mb")}
    if table is not None and section.has_latency:
        budget_ms = latency_budget_ms(architecture, section, table)
        limits = Limits(budget_ms, section.file_mb, section.peak_memory_mb)
        round_to = round_to or section.round_to or ROUND_TO
        named = {"latency_ms": _latency_text(section, budget_ms, table)}
        for key, text in limits.texts().items():
            named.setdefault(key, f"masks.{text}")
        tokens = patches_may_leave(section)
        how = SolveOptions(tokens=tokens, precision=section.file_precision)
        require_cut(architecture, limits, table, round_to, how, named)
        return
    if section.file_mb is not None:
        empty = architecture.model_copy(update={"steps": ()})
        least_mb = file_bytes(empty, weight_precision(None, section.file_precision)) / 1e6
        if section.file_mb <= least_mb:
            raise InputError(
                f"{names['file_mb']} {section.file_mb:g}: the stem and the head, which are not "
                f"cut, are {least_mb:.3f} MB; give a larger budget"
            )
        return
    kind, share = ("params", section.params) if section.params else ("macs", section.macs)
    least = smallest_cost(architecture, kind) / network_cost(architecture, kind)
    if share is None or share <= least:
        raise InputError(
            f"{names[kind]} {share}: the stem and the head, which are not cut, are {least:.3f} of "
            "this model; give a larger budget"
        )


def require_cut(
    architecture: Architecture,
    limits: Limits,
    table: CostTable,
    round_to: int,
    options: SolveOptions,
    named: Mapping[str, str],
) -> None:
    """Check that a cut in closed form can meet all budgets of a device.

    Args:
        architecture: The dense model.
        limits: The budgets.
        table: The cost table.
        round_to: Kept widths are multiples of this.
        options: Whether patches may leave, and the precision of the weights.
        named: The budgets as the user gave them, by their names in `Limits`.

    Raises:
        InputError: It cannot; the message names the budget, and the least that can be met.
    """
    losses = _losses(architecture, round_to)
    require_limits(architecture, losses, limits, table, options, named=named)


def _losses(architecture: Architecture, round_to: int) -> Losses:
    """What a cut in closed form chooses from; what it loses makes no difference."""
    rows = (STEM, *architecture.attention_steps())
    tokens = dict.fromkeys(rows, [0.0] * (architecture.tokens + 1))
    losses = replace(uniform_losses(architecture, round_to), tokens=tokens)
    if stream_obstacle(architecture):
        return losses
    widths = {int(share * architecture.embed) // round_to * round_to for share in STREAM_SHARES}
    # As `stream_widths`, which leaves out the narrowest ones.
    return replace(losses, embed={each: 0.0 for each in widths if each >= max(2, round_to)})


def _latency_text(section: MasksSection, budget_ms: float, table: CostTable) -> str:
    """The key of `[masks]` that sets the latency, with its value."""
    if section.energy_mj is not None and budget_ms == table.energy_latency_ms(
        section.energy_mj, "masks.energy_mj"
    ):
        return f"masks.energy_mj = {section.energy_mj:g} ({budget_ms:.4g} ms)"
    if section.latency is not None:
        return f"masks.latency = {section.latency:g} ({budget_ms:.4g} ms)"
    return f"masks.latency_ms = {budget_ms:g}"


def show_slack(recipe: Recipe, dense: Architecture, table: CostTable, *, quiet: bool) -> None:
    """Print that a latency is above the dense network's, so that nothing has to be cut.

    Args:
        recipe: The recipe.
        dense: The dense network.
        table: The cost table.
        quiet: Print nothing.
    """
    budget_ms = latency_budget_ms(dense, recipe.masks, table)
    text = slack(_latency_text(recipe.masks, budget_ms, table), budget_ms, dense, table)
    if text is not None:
        status(escape(text), quiet=quiet)


def slack(
    named: str,
    budget_ms: float,
    whole: Architecture,
    table: CostTable,
    what: str = "the dense model",
) -> str | None:
    """State that a latency is above that of the whole network; None where it is not.

    Args:
        named: The budget as the user gave it.
        budget_ms: Its milliseconds.
        whole: The network before a cut.
        table: The cost table.
        what: What the network is.
    """
    whole_ms = table.latency_ms(network_shape(whole))
    if budget_ms <= whole_ms:
        return None
    return (
        f"{named} is above the latency of {what}, {whole_ms:.4g} ms ({table.title}): nothing has "
        "to be cut"
    )
