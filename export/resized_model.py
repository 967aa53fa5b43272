"""Exporting for another image size than the model was trained at: what changes beside the model
itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..compress.lift import read
from ..compress.network.architecture import Architecture, AttentionSpec
from ..compress.network.patch_grid import Size, format_image_size, largest_square, parse_image_size
from ..compress.surgery.image_size import at_image_size, resized
from ..core.errors import InputError
from .graphs.model_facts import name_of, weights_sha256
from .manifest import PreprocessingSpec

# The first words of the note.
IMAGE_SIZE = "image size"
RESIZED_FROM, SOURCE_SHA256 = "resized_from", "resized_from_weights_sha256"


@dataclass(frozen=True)
class AnotherSize:
    """The model to export instead; preprocessing and provenance that go with it; what the user
    should know.
    """

    model: nn.Module
    name: str
    preprocessing: PreprocessingSpec | None
    provenance: Mapping[str, str]
    notes: tuple[str, ...]


def another_size(
    model: nn.Module,
    image_size: int | str | Size,
    preprocessing: PreprocessingSpec | None,
    provenance: Mapping[str, str],
) -> AnotherSize:
    """The model for `image_size`. Errors: InputError for a size that does not work, or is not that
    of the preprocessing; UnsupportedModel.
    """
    size = parse_image_size(image_size)
    architecture = read(model).spec
    trained = architecture.image[1:]
    if preprocessing is not None:
        if (preprocessing.height, preprocessing.width) not in (trained, size):
            made = format_image_size((preprocessing.height, preprocessing.width))
            raise InputError(
                f"preprocessing: it makes images of {made}, the model is for {format_image_size(trained)} and goes to {format_image_size(size)}; give one of these two"
            )
        # Crop ratio, resizing and interpolation are shares and names, and stay.
        preprocessing = preprocessing.model_copy(update={"height": size[0], "width": size[1]})
    if size == trained:
        return AnotherSize(model, name_of(model), preprocessing, provenance, ())
    require_memory(at_image_size(architecture, size))
    origin = {RESIZED_FROM: format_image_size(trained), SOURCE_SHA256: weights_sha256(model)}
    return AnotherSize(
        resized(model, size),
        name_of(model),
        preprocessing,
        {**provenance, **origin},
        (untrained(trained, size),),
    )


def untrained(trained: Size, size: Size) -> str:
    """One line that no report of accuracy may be without."""
    return f"{IMAGE_SIZE} {format_image_size(size)}: the model was trained at {format_image_size(trained)}, not at this size; its accuracy here is another, and not yet measured"


def require_memory(architecture: Architecture) -> None:
    """Refuse a size whose attention this machine cannot hold, for every stage runs here. Errors:
    InputError with the largest square that works.
    """
    memory_bytes = int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    needed_bytes = attention_bytes(architecture)
    if needed_bytes <= memory_bytes:
        return
    tokens = math.isqrt(architecture.tokens**2 * memory_bytes // needed_bytes)
    raise InputError(
        f"image size {format_image_size(architecture.image[1:])}: its {architecture.tokens} tokens need {needed_bytes / 1e9:.0f} GB for attention, this machine has "
        f"{memory_bytes / 1e9:.0f} GB; {largest_square(architecture, tokens - architecture.prefix)}"
    )


def attention_bytes(architecture: Architecture) -> int:
    """Scores and their softmax in the widest attention, and the offsets' index of every relative
    bias: all that grows with the square of the tokens.
    """
    cores = [
        branch.core for branch in architecture.branches if isinstance(branch.core, AttentionSpec)
    ]
    scores = max((core.heads * core.parts for core in cores), default=0)
    indices = sum(core.bias is not None for core in cores)
    return architecture.tokens**2 * (2 * 4 * scores + 8 * indices)
