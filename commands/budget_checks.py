"""Whether the budgets of a cut without training can be met, before any image is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.console import show
from .untrained_options import Untrained

if TYPE_CHECKING:
    from ..compress.network.architecture import Architecture
    from ..targets.cost_table import CostTable

OPTIONS = {"macs": "--macs", "params": "--params", "file_mb": "--file-mb"}


def require_budgets(
    dense: Architecture, untrained: Untrained, round_to: int, table: CostTable | None
) -> None:
    """Check that the budgets can be met, the smallest ones of a front; show if one is loose.

    Args:
        dense: The dense network.
        untrained: The budgets.
        round_to: Kept widths are multiples of this.
        table: The cost table of a latency.

    Raises:
        InputError: One is below what can be reached; the message gives that.
    """
    if table is None:
        _, kind, amount = untrained.budget
        _require_alone(dense, untrained, "file_mb" if kind == "file" else kind, amount)
        return
    from ..compress.latency.solution import Limits, SolveOptions
    from ..pipeline.budget_reach import require_cut, slack

    limits = Limits(untrained.latency_ms, untrained.file_mb, untrained.peak_memory_mb)
    assert limits.latency_ms is not None
    named = {"latency_ms": f"--latency-ms {limits.latency_ms:g}"}
    if untrained.energy_mj is not None and limits.latency_ms == table.energy_latency_ms(
        untrained.energy_mj, "--energy-mj"
    ):
        named["latency_ms"] = f"--energy-mj {untrained.energy_mj:g} ({limits.latency_ms:.4g} ms)"
    if limits.file_mb is not None:
        named["file_mb"] = f"--file-mb {limits.file_mb:g}"
    if limits.peak_memory_mb is not None:
        named["peak_memory_mb"] = f"--peak-memory-mb {limits.peak_memory_mb:g}"
    precision: Any = untrained.file_precision
    options = SolveOptions(tokens=not untrained.keep_tokens, precision=precision)
    require_cut(dense, limits, table, round_to, options, named)
    loose = slack(named["latency_ms"], limits.latency_ms, dense, table)
    if loose is not None:
        show(loose)


def _require_alone(dense: Architecture, untrained: Untrained, key: str, amount: float) -> None:
    """Check a budget without a latency."""
    from ..pipeline.budget_reach import require_budget
    from ..pipeline.masks_section import MasksSection

    given: dict[str, Any] = {key: amount / 1e6 if key == "file_mb" else amount}
    given["file_precision"] = untrained.file_precision
    section = MasksSection(method="closed-form", **given)
    require_budget(dense, section, options=OPTIONS)


def files_table(
    dense: Architecture, untrained: Untrained, table: CostTable | None
) -> CostTable | None:
    """What the files of --verify are of: the cost table of a latency, else one of the device.

    Only its target, runtime, precision and threads are used then. None without --verify.

    Args:
        dense: The dense network.
        untrained: The options.
        table: The cost table of a latency.

    Raises:
        InputError: The device has no such runtime, or is not this machine.
    """
    if table is not None or not untrained.verify:
        return table
    from ..pipeline.latency_table import TableRequest
    from .latency_checks import require_measurable

    precision = untrained.file_precision or "fp32"
    request = TableRequest(None, untrained.device, untrained.runtime, precision)
    found = request.table(dense, "--runtime")
    require_measurable(untrained, found)
    return found
