"""Where OpenVINO's model first goes wrong: it keeps the names of the graph's values, so these can
be asked for and held against the graph's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..parity import first_apart, inner_values
from .runtime import Source


def first_node(source: Source, model: Path, tolerance: float) -> str | None:
    """The first node of the graph whose value differs by more than `tolerance`, in words; None
    where none can be compared or all agree.
    """
    batch = 2 if source.batch == "dynamic" else source.batch
    images = np.ascontiguousarray(np.resize(source.probe.images, (batch, *source.shape)))
    names = [output for node in source.graph.graph.node for output in node.output if output]
    try:
        found = _values(model, set(names), images)
    except (
        Exception
    ):  # OpenVINO's errors share no type; without inner values the stage's figure still stands
        return None
    return first_apart(
        source.graph, names, inner_values(source.graph, names, images), found, tolerance
    )


def _values(path: Path, wanted: set[str], images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What the model computes inside, by the graph's names."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    shown = {
        name
        for operation in model.get_ordered_ops()
        for value in operation.outputs()
        for name in value.get_names() & wanted
    }
    already = {name for value in model.outputs for name in value.get_names()}
    model.add_outputs(sorted(shown - already))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = compiled([images])
    return {
        name: np.asarray(answers[value])
        for value in compiled.outputs
        for name in value.get_names() & wanted
    }
