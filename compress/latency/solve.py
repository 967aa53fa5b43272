"""The most accurate network within milliseconds of a device, a file size and a peak of memory."""

from __future__ import annotations

from torch import nn

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ..lift import lift
from ..masks.groups import architecture_of
from ..masks.magnitude import magnitude
from ..network.architecture import Architecture
from .losses import Losses, scored_losses, uniform_losses
from .search import solve_architecture
from .shapes import network_shape
from .solution import DEFAULTS, Limits, Solution, SolveOptions


def solve(
    model: nn.Module | Architecture,
    latency_ms: float | None,
    table: CostTable | None = None,
    *,
    losses: Losses | None = None,
    file_mb: float | None = None,
    peak_memory_mb: float | None = None,
    options: SolveOptions = DEFAULTS,
) -> Solution:
    """Choose tokens, widths and depth of least loss within budgets of a device.

    For each width of the residual stream, a dynamic programme runs over the sub-layers with the
    state (tokens, quantised time). Times are rounded up, so the table's latency never exceeds the
    budget.

    Args:
        model: A supported Vision Transformer, a `CompactModel`, or an `Architecture`.
        latency_ms: The latency of the network in milliseconds, by `table`. None: no limit.
        table: The cost table of the target, runtime and precision.
        losses: What each choice loses; see `compress.latency.losses`. None: the squared magnitudes
            of a model's weights; of an architecture, the square of the share that is removed.
        file_mb: Largest size of the weights in a file, in megabytes (10^6 bytes). None: no limit.
        peak_memory_mb: Largest memory of weights and activations, in megabytes, at the batch of
            the table, or of one image. None: no limit.
        options: See `SolveOptions`.

    Returns:
        The choice. `Solution.mask()` is its mask; `vitrim.trim` and `vitrim compact --latency-ms`
        carry it out with a refit.

    Raises:
        InputError: No budget is given, one is not above 0, or one cannot be met; the message has
            the smallest value that can. Or the network is larger than those that the table
            measured, so that its costs would be extrapolated.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Frantar and Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees".
        Shen et al. 2022, "Structural Pruning via Latency-Saliency Knapsack".
    """
    architecture = architecture_of(model)
    limits = Limits(latency_ms, file_mb, peak_memory_mb)
    if latency_ms is not None and table is None:
        raise InputError(
            "latency_ms needs a cost table; measure one with `vitrim bench --cost-table FILE`"
        )
    if latency_ms is not None and table is not None:
        beyond = table.beyond(network_shape(architecture))
        if beyond is not None:
            raise InputError(
                f"the cost table of {table.title} extrapolates to {beyond}; measure one of this "
                "network with `vitrim bench --cost-table FILE --like MODEL`"
            )
    if losses is None:
        losses = _own_losses(model, architecture, options.round_to)
    return solve_architecture(architecture, losses, limits, table, options)


def _own_losses(model: nn.Module | Architecture, architecture: Architecture, step: int) -> Losses:
    if isinstance(model, Architecture):
        return uniform_losses(architecture, step)
    source = lift(model)
    scores = magnitude(architecture, dict(source.named_parameters()), 2, "residual")
    return scored_losses(architecture, scores, step)
