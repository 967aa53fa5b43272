"""Export for another image size than the model was trained at: what changes besides the model."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from torch import nn

from ..compress.lift import read
from ..compress.network.architecture import Architecture, AttentionSpec
from ..compress.network.patch_grid import Size, format_image_size, largest_square, parse_image_size
from ..compress.surgery.image_size import at_image_size, resized
from ..core.errors import InputError
from .graphs.model_facts import name_of, weights_sha256
from .request import ManifestOptions

# First words of the note.
IMAGE_SIZE = "image size"
RESIZED_FROM, SOURCE_SHA256 = "resized_from", "resized_from_weights_sha256"


def resize_for_export(
    model: nn.Module, image_size: int | str | Size, manifest: ManifestOptions
) -> tuple[nn.Module, ManifestOptions]:
    """Return the model for another image size, and the manifest's fields with it.

    Raises:
        InputError: The size does not work, or is not that of the preprocessing.
        UnsupportedModel: The model cannot be resized.
    """
    size = parse_image_size(image_size)
    architecture = read(model).spec
    trained = architecture.image[1:]
    preprocessing = manifest.preprocessing
    if preprocessing is not None:
        prepared = (preprocessing.height, preprocessing.width)
        if prepared not in (trained, size):
            raise InputError(
                f"preprocessing: it makes images of {format_image_size(prepared)}, the model is "
                f"for {format_image_size(trained)} and is resized to {format_image_size(size)}; "
                "give one of these two"
            )
        # Crop ratio, resizing and interpolation do not depend on the size.
        preprocessing = preprocessing.model_copy(update={"height": size[0], "width": size[1]})
    manifest = replace(manifest, name=manifest.name or name_of(model), preprocessing=preprocessing)
    if size == trained:
        return model, manifest
    require_memory(at_image_size(architecture, size))
    origin = {RESIZED_FROM: format_image_size(trained), SOURCE_SHA256: weights_sha256(model)}
    manifest = replace(
        manifest,
        provenance={**manifest.provenance, **origin},
        notes=(*manifest.notes, untrained_note(trained, size)),
    )
    return resized(model, size), manifest


def untrained_note(trained: Size, size: Size) -> str:
    """Return the line that must accompany every report of accuracy."""
    return (
        f"{IMAGE_SIZE} {format_image_size(size)}: the model was trained at "
        f"{format_image_size(trained)}, not at this size; its accuracy here differs, and is not "
        "measured yet"
    )


def with_resampled_note(model: nn.Module, manifest: ManifestOptions) -> ManifestOptions:
    """Return the manifest's fields, with a note if the places of tokens are approximate.

    Args:
        model: The model as it is exported, perhaps resized before it was saved.
        manifest: The fields.
    """
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture) or not architecture.tokens_resampled:
        return manifest
    return replace(manifest, notes=(*manifest.notes, resampled_note(architecture.image[1:])))


def resampled_note(size: Size) -> str:
    """Return the line about a token mask that was made for another image size."""
    return (
        f"{IMAGE_SIZE} {format_image_size(size)}: the map of where patches leave was resampled "
        "from that of another size, which is approximate; a mask chosen at this size may keep "
        "better ones"
    )


def require_memory(architecture: Architecture) -> None:
    """Refuse a size whose attention does not fit this machine's memory, where every stage runs.

    Raises:
        InputError: The memory does not suffice; the message states the largest square that works.
    """
    memory_bytes = int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    needed_bytes = attention_bytes(architecture)
    if needed_bytes <= memory_bytes:
        return
    tokens = math.isqrt(architecture.tokens**2 * memory_bytes // needed_bytes)
    raise InputError(
        f"image size {format_image_size(architecture.image[1:])}: its {architecture.tokens} tokens "
        f"need {needed_bytes / 1e9:.0f} GB for attention, "
        f"this machine has {memory_bytes / 1e9:.0f} GB; "
        f"{largest_square(architecture, tokens - architecture.learned_tokens)}"
    )


def attention_bytes(architecture: Architecture) -> int:
    """Return the memory that grows with the square of the tokens.

    It holds scores and softmax of the widest attention, and the index of every relative bias.
    """
    cores = [
        branch.core for branch in architecture.branches if isinstance(branch.core, AttentionSpec)
    ]
    scores = max((core.heads * core.parts for core in cores), default=0)
    indices = sum(core.bias is not None for core in cores)
    return architecture.tokens**2 * (2 * 4 * scores + 8 * indices)
