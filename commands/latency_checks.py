"""What `--latency-ms` needs of its cost table, checked before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.console import show
from ..core.errors import InputError
from .untrained_options import Untrained

if TYPE_CHECKING:
    from ..compress.network.architecture import Architecture
    from ..targets.cost_table import CostTable


def require_measurable(untrained: Untrained, table: CostTable) -> None:
    """Check that files of `--verify` can be exported, and measured where they are to be.

    Raises:
        InputError: They are for another device than the one that measures them, or for one that
            has no profile, or that does not respond.
    """
    from ..pipeline.latency_place import elsewhere, file_target

    if not untrained.verify:
        return
    if untrained.verify_on != "host":
        from ..bench.remote.reach import require_reachable

        file_target(table, untrained.device)
        require_reachable(untrained.verify_on, [table.runtime])
    elif (reason := elsewhere(table, untrained.device)) is not None:
        raise InputError(
            f"--verify: {reason}; measure on the device with --verify-on, or leave --verify out"
        )


def require_reach(dense: Architecture, untrained: Untrained, table: CostTable) -> None:
    """Check that costs are extrapolated only where `--verify` measures the cut; show which.

    Raises:
        InputError: The network is larger than those that the table measured.
    """
    from ..compress.latency.shapes import network_shape
    from ..pipeline.latency_table import extrapolation

    beyond = table.beyond(network_shape(dense))
    if beyond is None:
        return
    message = f"--cost-table {extrapolation(untrained.cost_table or '', beyond)}"
    if not untrained.verify:
        raise InputError(f"{message}, or measure the cut with --verify")
    show(f"{message}; the cut is measured")
