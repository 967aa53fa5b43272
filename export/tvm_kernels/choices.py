"""The patches that the selections of a compiled network choose, for a comparison with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compress.network.modules.model import CompactModel
from ...compress.network.modules.select import first_places
from ...runtimes.compiled_program import CompiledProgram

# The first part of the name of the kernel that writes places.
CHOICE_KERNEL = "choose_patches"


def program_choices(
    compact: CompactModel,
    library: Path,
    images: NDArray[Any],
    *,
    batch: int = 1,
    threads: int = 1,
) -> list[NDArray[np.int64]]:
    """Read the choices of a compiled network from the very file that ships.

    They compare with those of torch: `vitrim.chosen_tokens(compact, images)`.

    Args:
        compact: The network that was compiled.
        library: `model.so`, for a processor like this one.
        images: Shape (count, channels, height, width).
        batch: The batch size that it was compiled for.
        threads: How many threads are requested.

    Returns:
        For each selection the chosen places among the patches that the stream carries there,
        increasing: shape (count, kept).

    Raises:
        EngineError: The library cannot be loaded or is of another size.
        RuntimeError: A kernel failed.
    """
    selects = compact.architecture.selects
    found: list[list[NDArray[np.int64]]] = [[] for _ in selects]
    program = CompiledProgram(str(library), [batch, *images.shape[1:]], threads)
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.resize(part, (batch, *images.shape[1:])).astype(np.float32)
        written = iter(
            np.frombuffer(content, np.int32)
            for name, content in program.watch(np.ascontiguousarray(filled))
            if CHOICE_KERNEL in name
        )
        for number, select in enumerate(selects):
            if select.scorer == "random":
                # Equal for all images, and a constant of the program.
                places = compact.selects[number].places
                constant = first_places(places[None], select.patches).numpy()  # type: ignore[index]
                chosen = np.repeat(constant, batch, axis=0)
            else:
                chosen = next(written).reshape(batch, select.patches)
            found[number].append(chosen[: len(part)].astype(np.int64))
    return [np.concatenate(parts) for parts in found]
