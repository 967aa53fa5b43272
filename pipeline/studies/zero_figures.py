"""The figures of a run with zeros among single weights, from its dead.json."""

from __future__ import annotations

from pathlib import Path

from ..magnitude_step import read_dead
from .expansion import Cell
from .table import Column

# In the table of a study that has such runs; those of the exact model beside them.
COLUMNS = (
    Column("sparsity", "figure", "REAL", "share of zeros among the weights in scope, 0 to 1"),
    Column("params_nonzero", "figure", "INTEGER", "parameters of the compact model but its zeros"),
    Column("heads", "figure", "INTEGER", "heads of all attentions"),
    Column("heads_dead", "figure", "INTEGER", "heads that add nothing, or a constant", True),
    Column("units_dead", "figure", "INTEGER", "the same of hidden units of FFNs", True),
    Column("channels_dead", "figure", "INTEGER", "removable channels of the stream", True),
    Column("params_exact", "figure", "INTEGER", "parameters without what is dead"),
    Column("macs_exact", "figure", "INTEGER", "multiply-adds without what is dead"),
    Column("top1_exact", "figure", "REAL", "test accuracy of the model without it, 0 to 1", True),
)


def zero_figures(run_folder: Path) -> tuple[dict[str, Cell], list[Column]]:
    """The figures of a run and their columns; none where no single weights are zero.

    Args:
        run_folder: A finished run, measured or not.

    Returns:
        Values by column, and the columns.

    Raises:
        InputError: dead.json is damaged.
    """
    record = read_dead(run_folder)
    if record is None:
        return {}, []
    names = ("sparsity", "heads", "heads_dead", "units_dead", "channels_dead")
    found: dict[str, Cell] = {name: record[name] for name in names}
    found |= {name: record[name] for name in ("params_exact", "macs_exact")}
    found["params_nonzero"] = record["params"] - record["zeros"]
    return found, list(COLUMNS)
