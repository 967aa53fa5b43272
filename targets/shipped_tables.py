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
    names = [ALIASES.get(target, target)]
    if target == "host":
        # Later names of a family have more instruction sets: x86-64, x86-64-v3, x86-64-v4-vnni.
        names = sorted(targets_here(), reverse=True)
    for name in names:
        path = folder / f"{name}-{runtime}-{precision}-{threads}.json"
        if path.is_file():
            return CostTable.load(path)
    return None
