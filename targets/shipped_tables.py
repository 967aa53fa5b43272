"""Cost tables that ship with the package, for classes of processors that were measured."""

from __future__ import annotations

from pathlib import Path

from .catalog import ALIASES, targets_here
from .cost_table import CostTable

FOLDER = Path(__file__).parent / "cost_tables"


def shipped_table(
    target: str, *, runtime: str, precision: str, threads: int, folder: Path = FOLDER
) -> CostTable | None:
    """The shipped cost table of a target; None if there is none.

    Args:
        target: Name of a profile; for `host`, that of the most capable class of processors that
            this machine belongs to.
        runtime: The runtime.
        precision: Precision of the artifacts.
        threads: Threads of the runtime.
        folder: Where the tables are, `TARGET-RUNTIME-PRECISION-THREADS.json`.
    """
    name = ALIASES.get(target, target)
    if target == "host":
        # Later names of a family have more instruction sets: x86-64, x86-64-v3, x86-64-v4-vnni. The
        # table of a lesser class is of other code than the host's.
        name = max(targets_here(), default=target)
    path = folder / f"{name}-{runtime}-{precision}-{threads}.json"
    return CostTable.load(path) if path.is_file() else None
