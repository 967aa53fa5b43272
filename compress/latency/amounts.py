"""What the options of a sub-layer take at each pair of token levels: time, bytes, memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...targets.cost_table import CostTable
from ..network.architecture import Architecture, SelectSpec
from ..network.cost import predictor_params
from ..network.select_specs import SelectWidths, select_macs, select_widths
from ..oneshot.budgets import SUB_LAYER_BYTES, Precision
from .problem import Choices, Grid
from .programme import Numbers
from .shapes import ends_ms

WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def milliseconds(
    architecture: Architecture, choices: Choices, grid: Grid, table: CostTable, embed: int
) -> Numbers:
    """The latency of each option at each pair, (pairs, options).

    With the stem that of the call and the head counts, too.

    Args:
        architecture: The network.
        choices: The sub-layer.
        grid: Its token numbers.
        table: The cost table.
        embed: Channels of the stream.
    """
    if choices.embeds:
        counts = grid.computed[:, 0].tolist()
        return np.array([[ends_ms(table, architecture, embed, count)] for count in counts])
    if choices.selection is not None:
        return _select_ms(architecture, choices.selection, grid, table, embed)
    if choices.mixes:
        return table.attention_ms(embed, grid.read, grid.computed, *choices.sizes)
    found = table.ffn_ms(embed, grid.computed, *choices.sizes)
    return np.broadcast_to(found, grid.possible.shape)


def _select_ms(
    architecture: Architecture, select: SelectSpec, grid: Grid, table: CostTable, embed: int
) -> Numbers:
    """The latency of a selection at each pair; a scoring attention counts as it is before a cut.

    Where only the tokens that the head reads are left, nothing is selected.
    """
    widths = _select_widths(architecture, select, embed)
    before = architecture.step_inputs(last_queries=False)[select.at - 1] if select.at else 0
    macs = select_macs(architecture, select, widths, before, grid.read)
    reads = widths.reads if select.norm is not None else 0
    macs = np.broadcast_to(np.asarray(macs, dtype=np.int64), grid.read.shape)
    found = table.select_ms(embed, grid.read, grid.computed, macs, reads)
    return np.where(grid.read > grid.computed, found, 0.0)


def _select_widths(architecture: Architecture, select: SelectSpec, embed: int) -> SelectWidths:
    """The numbers of a selection at a width of the stream."""
    widths = select_widths(architecture, select)
    return replace(widths, reads=min(widths.reads, embed), stream=embed)


def weight_bytes(
    architecture: Architecture, choices: Choices, grid: Grid, embed: int, precision: Precision
) -> Numbers:
    """The bytes of the weights of each option in a file, estimated, (pairs, options).

    Args:
        architecture: The network.
        choices: The sub-layer.
        grid: Its token numbers, which make no difference.
        embed: Channels of the stream.
        precision: Of the weights.
    """
    select = choices.selection
    if select is not None:
        widths = _select_widths(architecture, select, embed)
        params = 0 if select.predictor is None else predictor_params(select, widths)
        return np.full(grid.possible.shape, 4.0 * params)
    if choices.embeds:
        return np.zeros(grid.possible.shape)
    if choices.mixes:
        heads, qk, v = choices.sizes
        outputs = heads * (2 * qk + v) + embed
        numbers = embed * heads * (2 * qk + 2 * v)
    else:
        outputs = choices.sizes[0] + embed
        numbers = 2 * embed * choices.sizes[0]
    each = WEIGHT_BYTES[precision]
    # Biases and norms beside the matrices; in int8 a scale and a zero point for each output.
    beside = (2 if precision == "fp16" else 4) * (outputs + 2 * embed)
    beside = beside + (5 * outputs if precision == "int8" else 0)
    total = np.where(choices.gone, 0.0, each * numbers + beside + SUB_LAYER_BYTES)
    return np.broadcast_to(total, grid.possible.shape).astype(np.float64)


def peak_numbers(choices: Choices, grid: Grid, embed: int) -> Numbers:
    """The numbers that each option has in memory at most, (pairs, options).

    The residual stream, and the inputs and outputs of one operator at a time.

    Args:
        choices: The sub-layer.
        grid: Its token numbers.
        embed: Channels of the stream.
    """
    n, m = grid.read, grid.computed
    if choices.embeds:
        return np.zeros(grid.possible.shape)
    if choices.selection is not None:
        return np.asarray((2 * n + m) * embed, dtype=np.float64)
    if choices.mixes:
        heads, qk, v = choices.sizes
        inputs = (n + m) * heads * qk + n * heads * v
        scores = heads * m * n
        rows = (
            n * embed + inputs,
            inputs + scores,
            scores + (n + m) * heads * v,
            m * heads * v + m * embed,
        )
        peak = np.maximum.reduce(rows)
    else:
        peak = m * embed + m * choices.sizes[0]
    return np.where(choices.gone, 0.0, n * embed + peak).astype(np.float64)
