"""Where files of a cost table are measured: on this machine, or on the device that it names."""

from __future__ import annotations

from ..core.errors import InputError
from ..targets.catalog import fits_here, list_targets, load_target, targets_here
from ..targets.cost_table import CostTable


def elsewhere(table: CostTable, target: str | None = None, on: str | None = None) -> str | None:
    """Why files of a table are not measured; None where they are.

    Args:
        table: The cost table.
        target: The target of the files, a name or the path of a TOML. None: that of the table.
        on: The address of the device that measures them. None: this machine does.
    """
    name = target or table.target
    if name == "host":
        return None
    if target is None and name not in list_targets():
        return _no_profile(table)
    if on is not None:
        return None
    here = name in targets_here() if name in list_targets() else fits_here(load_target(name))
    return None if here else f"the files are for {table.target}, not for this machine"


def file_target(table: CostTable, target: str | None = None) -> str:
    """The target that files of a table are exported for.

    Args:
        table: The cost table.
        target: A name or the path of a TOML. None: that of the table.

    Raises:
        InputError: The table's has no profile.
    """
    if target is None and table.target != "host" and table.target not in list_targets():
        raise InputError(_no_profile(table))
    return target or table.target


def _no_profile(table: CostTable) -> str:
    return (
        f"the cost table is of {table.target}, which is no name of `vitrim targets list`, so files "
        "cannot be exported for it; give its profile with --target FILE.toml"
    )
