"""Errors of a cut without training, its latency budget, and zeros, for both kinds of report."""

from __future__ import annotations

from . import wording
from .model import CutErrors, LatencyBudget, Zeros
from .table import NONE, Cell, Line

HEADING = "Errors of the cut"
REMARK = (
    "What each sub-layer's cut changes in the features before fine-tuning, as a share of their "
    "variance: predicted from the error curves, and measured on images held out from the fit."
)
COLUMNS = ("predicted", "measured", "cost left")


def lines(cut: CutErrors) -> list[Line]:
    """One line for each sub-layer, and one for the features."""
    found = [
        Line(
            row.name,
            (
                Cell(wording.share_error(row.predicted)),
                Cell("absorbed" if row.measured is None else wording.share_error(row.measured)),
                Cell(wording.percent(row.cost_share, 0)),
            ),
        )
        for row in cut.rows
    ]
    measured = "–" if cut.measured is None else wording.share_error(cut.measured)
    whole = (Cell(wording.share_error(cut.predicted)), Cell(measured), NONE)
    return [*found, Line("features", whole, remark=f"{cut.images} held-out images")]


LATENCY_HEADING = "Latency budget"
LATENCY_COLUMNS = ("budget of the table", "by the table", "measured")
ESTIMATED_COLUMNS = ("estimated budget", "estimate", "measured")


def latency_columns(budget: LatencyBudget) -> tuple[str, ...]:
    """The titles of the columns."""
    return ESTIMATED_COLUMNS if budget.estimated else LATENCY_COLUMNS


def latency_remark(budget: LatencyBudget) -> str:
    """The budget, what predicts it, and whether it is met."""
    outcome = {
        True: "The cut met it before fine-tuning.",
        False: "The cut did NOT meet it before fine-tuning.",
        None: "It was not measured.",
    }[budget.met]
    if budget.shipped_ms is not None:
        meets = "and meets it" if budget.shipped_met else "and does NOT meet it"
        outcome = f"The shipped file {budget.shipped} takes {_ms(budget.shipped_ms)} {meets}."
    error = ""
    if budget.table_error is not None:
        error = f", median error {wording.percent(budget.table_error, 1)} on whole networks"
    name = "Cost table"
    start = f"The budget is {budget.latency_ms:.4g} ms."
    if budget.estimated:
        name = "No cost table was measured for it; latencies are"
        start = f"The budget is an estimate of {budget.latency_ms:.4g} ms."
    found = f"{start} {outcome} {name}: {budget.table}{error}."
    if not budget.rounds:
        return found
    return (
        f"{found} Each cut was exported and its file measured; the table's budget was corrected by "
        "the measurement."
    )


def latency_lines(budget: LatencyBudget) -> list[Line]:
    """One line for each measured cut, or one without a measurement; then the shipped file."""
    shipped: list[Line] = []
    if budget.shipped_ms is not None:
        cells = (NONE, NONE, Cell(_ms(budget.shipped_ms)))
        shipped = [Line(f"{budget.shipped}, fine-tuned", cells)]
    rows = [
        (f"cut {number}", row.budget_ms, row.predicted_ms, row.measured_ms)
        for number, row in enumerate(budget.rounds, start=1)
    ]
    if rows:
        cuts = [Line(name, tuple(Cell(_ms(value)) for value in row)) for name, *row in rows]
        return [*cuts, *shipped]
    cells = (Cell(_ms(budget.latency_ms)), Cell(_ms(budget.predicted_ms)), NONE)
    return [Line("cut", cells), *shipped]


def shipped_text(budget: LatencyBudget) -> str | None:
    """Whether the shipped file meets the budget, in one line; None if it was not measured."""
    if budget.shipped_ms is None:
        return None
    outcome = "met" if budget.shipped_met else "NOT met"
    measured = f"{budget.shipped} measured {_ms(budget.shipped_ms)}"
    return f"latency: budget {_ms(budget.latency_ms)}, {measured}: {outcome}"


ZEROS_HEADING = "Zero weights"
ZEROS_COLUMNS = ("zeros", "dead")


def zeros_remark(zeros: Zeros) -> str:
    """How many weights are zero, and what that lets go exactly."""
    params = wording.percent(1.0 - zeros.params_exact / zeros.params, 2)
    macs = wording.percent(1.0 - zeros.macs_exact / zeros.macs, 2)
    return (
        f"{zeros.zeros:,} of {zeros.weights:,} weights of the pruned matrices are zero, "
        f"{wording.percent(zeros.sparsity, 2)}. Dead are heads and units that add nothing, or the "
        f"same for every token: their removal takes {params} of all parameters and {macs} of the "
        f"multiply-adds, with a largest relative error of {zeros.error:.1e}. The model `exact` is "
        "the one without them."
    )


def zeros_lines(zeros: Zeros) -> list[Line]:
    """One line for each sub-layer, and one for the residual stream."""
    rows = [
        Line(
            row.name,
            (
                Cell(wording.percent(row.zeros, 2)),
                Cell(f"{row.dead:,} of {row.units:,} {row.kind}"),
            ),
        )
        for row in zeros.rows
    ]
    stream = Cell(f"{zeros.channels_dead:,} of {zeros.channels:,} channels")
    return [*rows, Line("residual stream", (NONE, stream))]


def _ms(value: float) -> str:
    return f"{value:.4g} ms"
