"""TVM as it comes: the ONNX front end and the default pipeline, untuned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from ...core.errors import InputError
from ...targets.profile import TargetProfile
from .built import Built
from .targets import tvm_target

if TYPE_CHECKING:
    from tvm import IRModule


def default_network(graph: onnx.ModelProto, profile: TargetProfile, *, threads: int = 1) -> Built:
    """A graph through TVM's own pipeline: for CPUs without any schedule, for GPUs with dlight's.

    graph: fixed shapes, the standard's own operators up to opset 22. Errors: InputError with the
    operator that the front end does not read.
    """
    from tvm import relax

    target = tvm_target(profile)
    module = from_graph(graph)
    gpu = "gpu" in target.keys
    pipeline = relax.get_default_pipeline(target) if gpu else relax.get_pipeline("default")
    note = (
        f"dlight's schedules for {target.kind.name}; it runs where such a device is"
        if gpu
        else "TVM's own pipeline, untuned"
    )
    return Built(module, target, pipeline, "default", threads, (note,))


def from_graph(graph: onnx.ModelProto) -> IRModule:
    """The Relax module of a graph, with its weights inside. Errors: InputError naming what the
    front end does not read.
    """
    from tvm.relax.frontend.onnx import from_onnx

    try:
        return from_onnx(graph, keep_params_in_input=False)
    except Exception as error:  # the front end raises whatever its own code meets
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        raise InputError(
            f"TVM's ONNX front end does not read this graph: {reason}; take another form of the graph"
        ) from None
