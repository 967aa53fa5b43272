"""The patches that the selections of a compiled network choose, for a comparison with torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtimes.compiled_program import CompiledProgram

# The first part of the name of the kernels that write places.
CHOICE_KERNEL = "choose_patches"


def bucket_choices(
    library: Path, images: NDArray[Any], *, threads: int = 1
) -> tuple[NDArray[np.float32], list[list[NDArray[np.int64]]]]:
    """Run a compiled network with buckets on each image, in the bucket that its scores choose.

    Args:
        library: `model.so`, for a processor like this one.
        images: Shape (count, channels, height, width).
        threads: How many threads are requested.

    Returns:
        Logits (count, classes); and for each image the chosen places (1, kept) of each selection
        whose choice depends on the image.

    Raises:
        EngineError: The library cannot be loaded or is of another size.
        RuntimeError: A kernel failed.
    """
    program = CompiledProgram(str(library), [1, *images.shape[1:]], threads)
    program.force(0)
    logits, chosen = [], []
    for place in range(len(images)):
        image = np.ascontiguousarray(images[place : place + 1], np.float32)
        logits.append(program.infer(image))
        chosen.append(_chosen(program, image))
    return np.concatenate(logits), chosen


def program_choices(
    library: Path,
    names: Sequence[str],
    images: NDArray[Any],
    *,
    batch: int = 1,
    threads: int = 1,
) -> tuple[NDArray[np.int64], ...] | None:
    """Read from a compiled network itself which patches its selections choose.

    Args:
        library: `model.so`, for a processor like this one.
        names: One name for each selection whose choice depends on the image, in their order.
        images: Shape (count, channels, height, width).
        batch: The batch size that it was compiled for.
        threads: How many threads are requested.

    Returns:
        For each name the chosen places among the patches that the stream carries there, increasing:
        shape (count, kept). None: the program has another number of selections.

    Raises:
        EngineError: The library cannot be loaded or is of another size.
        RuntimeError: A kernel failed.
    """
    shape = (batch, *images.shape[1:])
    program = CompiledProgram(str(library), list(shape), threads)
    found: list[list[NDArray[np.int64]]] = []
    for start in range(0, len(images), batch):
        filled = np.resize(images[start : start + batch], shape).astype(np.float32)
        chosen = _chosen(program, np.ascontiguousarray(filled))
        if len(chosen) != len(names):
            return None
        found.append([places[: len(images) - start] for places in chosen])
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _chosen(program: CompiledProgram, images: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    """The places (images, kept) that each selection chooses, in order."""
    return [
        np.frombuffer(content, np.int32).reshape(len(images), -1).astype(np.int64)
        for name, content in program.watch(images)
        if CHOICE_KERNEL in name
    ]
