"""Where a compiled network first goes wrong: what each kernel wrote, held against torch's residual
stream between the sub-layers.
"""

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
# Rows are padded to whole vectors, the longest of which hold fewer numbers than this.
PADDING = 64


@dataclass(frozen=True)
class Checkpoint:
    """The residual stream (batch, tokens, embed) where some sub-layers have written to it."""

    written_by: str
    stream: Array


def first_kernel(source: Source, library: Path, tolerance: float) -> str | None:
    """The sub-layer whose kernels are the first to differ by more than `tolerance`, and the last
    kernel before them; None where nothing can be compared.

    Kernels compute several layers at once and in orders of their own, but each sub-layer ends with
    one that writes the residual stream. The stream may be padded to whole vectors, and hold only
    the tokens that the head reads.
    """
    if source.compact is None:
        return None
    batch = 1 if source.batch == "dynamic" else source.batch
    images = np.resize(source.probe.images, (batch, *source.shape))
    try:
        program = CompiledProgram(str(library), [batch, *source.shape], source.threads)
        wrote = [
            (name, np.frombuffer(content, np.float32))
            for name, content in program.watch(images)
            if len(content) % 4 == 0
        ]
    except (EngineError, RuntimeError):
        return None
    if not wrote:
        return None
    asked = source.compact.architecture.pooled_prefix
    last, behind = "the images", 0
    for checkpoint in checkpoints(source.compact, images):
        errors = [stream_error(checkpoint.stream, found, asked) for _, found in wrote[behind:]]
        match = next((number for number, error in enumerate(errors) if error <= tolerance), None)
        if match is None:
            least = min(errors, default=np.inf)
            if not np.isfinite(least):
                return f"{checkpoint.written_by}, behind {last}"
            return f"{checkpoint.written_by}, behind {last}, by {least:.2e} of its largest value"
        behind += match + 1
        last = f"kernel {wrote[behind - 1][0]}"
    return f"the head, behind {last}"


def checkpoints(compact: CompactModel, images: Array) -> list[Checkpoint]:
    """The stream behind the stem and behind each step."""
    architecture = compact.architecture
    names = [
        "the stem",
        *(" and ".join(branch.name for branch in step) for step in architecture.steps),
    ]
    streams: list[Array] = []

    def keep(module: Any, inputs: Any) -> None:
        streams.append(inputs[0].detach().float().numpy())

    hooks = [step[0].register_forward_pre_hook(keep) for step in compact.steps]  # type: ignore[index]
    try:
        with torch.no_grad():
            streams.append(compact.features(torch.from_numpy(images)).float().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return [Checkpoint(name, stream) for name, stream in zip(names, streams, strict=True)]


def stream_error(stream: Array, found: Array, asked: int) -> float:
    """How far what a kernel wrote is from a stream, over the stream's largest value; infinite if by
    its size it cannot be that stream.

    asked: the first so many tokens are what the head reads, 0 for all.
    """
    batch, tokens, embed = stream.shape
    least = np.inf
    for rows in {tokens, min(asked, tokens) or tokens}:
        width, rest = divmod(found.size, batch * rows)
        if rest or not embed <= width <= embed + PADDING:
            continue
        error = relative_error(stream[:, :rows], found.reshape(batch, rows, width)[..., :embed])
        least = min(least, float(np.nan_to_num(error, nan=np.inf).max()))
    return least
