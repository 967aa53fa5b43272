"""The predicted beside the measured errors of a cut without training, for both kinds of report."""

from __future__ import annotations

from . import wording
from .model import CutErrors
from .table import Cell, Line

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
    whole = (Cell(wording.share_error(cut.predicted)), Cell(measured), Cell("–"))
    return [*found, Line("features", whole, remark=f"{cut.images} held-out images")]
