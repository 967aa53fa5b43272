"""Cost tables that ship with the package, for classes of processors that were measured."""

from __future__ import annotations

from pathlib import Path

from .catalog import ALIASES, targets_here
from .cost_parts import NetworkShape
from .cost_table import CostTable

FOLDER = Path(__file__).parent / "cost_tables"


def shipped_table(
    target: str,
    network: NetworkShape,
    *,
    runtime: str,
    precision: str,
    threads: int,
    folder: Path = FOLDER,
) -> CostTable | None:
    """The shipped cost table of a target for networks of up to a size; None if there is none.

    Args:
        target: Name of a profile; for `host`, that of the most capable class of processors that
            this machine belongs to.
        network: The largest network. Of the tables that cover it, the smallest is taken: costs are
            fitted to the networks that were measured.
        runtime: The runtime.
        precision: Precision of the artifacts.
        threads: Threads of the runtime.
        folder: Where the tables are, `TARGET-RUNTIME-PRECISION-THREADS-SIZE.json`. SIZE is free.
    """
    name = ALIASES.get(target, target)
    if target == "host":
        # Later names of a family have more instruction sets: x86-64, x86-64-v3, x86-64-v4-vnni. The
        # table of a lesser class is of other code than the host's.
        name = max(targets_here(), default=target)
    pattern = f"{name}-{runtime}-{precision}-{threads}-*.json"
    tables = [CostTable.load(path) for path in sorted(folder.glob(pattern))]
    covering = [table for table in tables if table.covers(network)]
    # The costs of the largest measured network tell the size of a table.
    return min(covering, key=lambda table: table.largest_ms, default=None)
