"""Cost tables that ship with the package, for classes of processors that were measured."""

from __future__ import annotations

from pathlib import Path

from .catalog import ALIASES, list_targets, shipped_targets, targets_here
from .cost_parts import NetworkShape
from .cost_table import CostTable
from .instruction_sets import machine_name

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
    tables = tables_of(target, runtime=runtime, precision=precision, threads=threads, folder=folder)
    covering = [table for table in tables if table.covers(network)]
    # The size of a table is that of its slowest network.
    return min(covering, key=lambda table: table.largest_ms, default=None)


def tables_of(
    target: str, *, runtime: str, precision: str, threads: int, folder: Path = FOLDER
) -> list[CostTable]:
    """All shipped cost tables of a target, of which `shipped_table` takes one by a network's size.

    Args:
        target: As in `shipped_table`.
        runtime: The runtime.
        precision: Precision of the artifacts.
        threads: Threads of the runtime.
        folder: Where the tables are.
    """
    name = host_class() if target == "host" else ALIASES.get(target, target)
    if name not in list_targets():
        # Also the path of a profile, which is of another device than any that ships.
        return []
    pattern = f"{name}-{runtime}-{precision}-{threads}-*.json"
    return [CostTable.load(path) for path in sorted(folder.glob(pattern))]


def host_class() -> str | None:
    """The most capable class of x86 processors that this machine belongs to; None without one.

    The table of a lesser class is of other code than the host's. Profiles of other architectures
    are single devices: another one with the same instruction sets has another speed.
    """
    here = targets_here()
    classes = [
        profile
        for profile in shipped_targets()
        if profile.name in here and machine_name(profile.architecture) == "x86_64"
    ]
    largest = max(classes, key=lambda profile: len(profile.features), default=None)
    return None if largest is None else largest.name
