"""Where a compiled network first differs from torch, located by its residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...compress.network.modules.model import CompactModel
from ...runtimes import EngineError
from ...runtimes.compiled_program import CompiledProgram
from ..parity import relative_error
from ..runtimes.runtime import Source

Array = NDArray[Any]
# Rows are padded to whole vectors, by fewer numbers than this.
PADDING = 64


@dataclass(frozen=True)
class Checkpoint:
    """The residual stream after a step.

    Attributes:
        written_by: The sub-layers of the step.
        stream: Shape (batch, tokens, embed).
    """

    written_by: str
    stream: Array


def first_difference(source: Source, library: Path, tolerance: float) -> str | None:
    """The first sub-layer that differs by more than `tolerance`, and the last kernel before it.

    Kernels combine layers, but each sub-layer ends with a kernel that writes the residual stream.
    The written stream may be padded to whole vectors, and contain only the tokens that the head
    reads.

    Args:
        source: What was compiled.
        library: The compiled network.
        tolerance: Relative to the largest value of the stream.

    Returns:
        A description, or None where nothing can be compared.
    """
    if source.compact is None:
        return None
    batch = 1 if source.batch == "dynamic" else source.batch
    images = np.resize(source.probe.images, (batch, *source.shape))
    try:
        program = CompiledProgram(str(library), [batch, *source.shape], source.threads)
        outputs = [
            (name, np.frombuffer(content, np.float32))
            for name, content in program.watch(images)
            if len(content) % 4 == 0
        ]
    except (EngineError, RuntimeError):
        return None
    if not outputs:
        return None
    pooled = source.compact.architecture.pooled_prefix
    last, position = "the images", 0
    for checkpoint in checkpoints(source.compact, images):
        errors = [stream_error(checkpoint.stream, found, pooled) for _, found in outputs[position:]]
        match = next((number for number, error in enumerate(errors) if error <= tolerance), None)
        if match is None:
            place = f"{checkpoint.written_by}, after {last}"
            least = min(errors, default=np.inf)
            return f"{place}, by {least:.2e} of its largest value" if np.isfinite(least) else place
        position += match + 1
        last = f"kernel {outputs[position - 1][0]}"
    return f"the head, after {last}"


def checkpoints(compact: CompactModel, images: Array) -> list[Checkpoint]:
    """The stream after the stem and after each step."""
    steps = compact.architecture.steps
    names = [
        "the stem",
        *(" and ".join(branch.name for branch in step) for step in steps),
    ]
    streams: list[Array] = []

    def record(module: Any, inputs: Any) -> None:
        streams.append(inputs[0].detach().float().numpy())

    hooks = [step[0].register_forward_pre_hook(record) for step in compact.steps]  # type: ignore[index]
    try:
        with torch.no_grad():
            streams.append(compact.features(torch.from_numpy(images)).float().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return [Checkpoint(name, stream) for name, stream in zip(names, streams, strict=True)]


def stream_error(stream: Array, found: Array, pooled: int) -> float:
    """The largest error of a kernel's output, relative to the largest value of a stream.

    Args:
        stream: Shape (batch, tokens, embed).
        found: The output, flat.
        pooled: How many tokens the head reads, the first ones; 0: all.

    Returns:
        Infinity if the output's size is not that of the stream.
    """
    batch, tokens, embed = stream.shape
    least = np.inf
    for rows in {tokens, min(pooled, tokens) or tokens}:
        width, rest = divmod(found.size, batch * rows)
        if rest or not embed <= width <= embed + PADDING:
            continue
        error = relative_error(stream[:, :rows], found.reshape(batch, rows, width)[..., :embed])
        least = min(least, float(np.nan_to_num(error, nan=np.inf).max()))
    return least
