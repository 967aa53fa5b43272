"""The first stages of every export: torch's own graph, and the same tidied, each held against
torch.
"""

from __future__ import annotations

import numpy as np
import onnx
from torch import nn

from ..manifest import Array, Parity
from ..parity import Probe, first_difference, first_unmatched_module, model_outputs, require
from ..request import ExportRequest
from ..stage_line import stage
from .torch_graph import MIN_OPSET, simplify, torch_to_onnx


def trace(
    model: nn.Module, order: ExportRequest, probe: Probe, stages: list[Parity], notes: list[str]
) -> tuple[onnx.ModelProto, Array]:
    """The tidied graph, and one batch of the probe's images to look inside with; stages and notes
    grow. Errors: InputError, ParityError.
    """
    batch, tolerance = order.batch, order.allowed["fp32"]
    stage("tracing")
    traced = torch_to_onnx(
        model, order.shape, batch=batch, opset=MIN_OPSET if order.opset is None else order.opset
    )
    first = one_batch(order, probe)
    stage("parity of the traced graph")
    parity = probe.compare(
        "onnx", model_outputs(traced, probe.images, batch=batch), tolerance=tolerance
    )
    stages.append(
        require(parity, lambda tolerance: first_unmatched_module(model, traced, first, tolerance))
    )
    stage("simplifying")
    tidy, reason = simplify(traced)
    if reason is not None:
        notes.append(reason)
        return tidy, first
    stage("parity of the simplified graph")
    parity = probe.compare(
        "simplified", model_outputs(tidy, probe.images, batch=batch), tolerance=tolerance
    )
    stages.append(
        require(parity, lambda tolerance: first_difference(traced, tidy, first, tolerance))
    )
    return tidy, first


def one_batch(order: ExportRequest, probe: Probe) -> Array:
    """The first images, as many as the graph takes at once."""
    if order.batch == "dynamic":
        return probe.images[:2]
    size = int(order.batch)
    return (
        probe.images[:size]
        if len(probe.images) >= size
        else np.repeat(probe.images[:1], size, axis=0)
    )
