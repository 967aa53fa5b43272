"""Buckets of a run: `masks.token_buckets`, calibrated behind fine-tuning, exported and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..bench.results.buckets import bucket_name, bucket_tables
from ..bench.results.measurement import Measurement
from ..compress.network.files import BUCKETS_FILE
from ..compress.network.modules.model import CompactModel
from ..compress.tokens.buckets import BucketedModel, bucketed, load_bucketed
from ..core.console import status, unit_count
from ..core.errors import InputError
from .artifacts import Planned
from .bucket_keys import BUCKET_KEYS
from .masks_section import MasksSection
from .phases import RunContext
from .recipe import Recipe
from .training_steps import COMPACT, drawn_images
from .trim_step import StageBars

STEP = "buckets"
_KEY = "masks.token_buckets"


def require_bucket_artifacts(recipe: Recipe) -> None:
    """Check, before any training, that the artifacts of a recipe with buckets can be exported.

    Raises:
        InputError: Artifacts with buckets have no such runtime, precision, batch, size or output;
            or single training images are not at hand. The message names the key.
    """
    if recipe.masks.token_buckets is None:
        return
    from ..export.buckets import PRECISIONS, RUNTIMES

    export = recipe.export
    for runtime in export.runtimes:
        if runtime not in RUNTIMES:
            raise InputError(
                f"export.runtimes: {runtime} runs no {_KEY}; use {', '.join(RUNTIMES)}"
            )
    for precision in export.precisions:
        if precision not in PRECISIONS:
            raise InputError(
                f"export.precisions: {precision} is not for {_KEY}; use {', '.join(PRECISIONS)}"
            )
    if export.batch != 1:
        raise InputError(
            f"export.batch = {export.batch}: {_KEY} gives every image a number of its own; use 1"
        )
    if export.image_size is not None:
        raise InputError(
            f"export.image_size: {_KEY} is for the size of training; leave image_size out"
        )
    if export.outputs != ("logits",):
        raise InputError(
            f'export.outputs: {_KEY} is for artifacts that return logits; write ["logits"]'
        )
    if recipe.data.streaming:
        raise InputError(
            f"data.streaming: {_KEY} is calibrated on single training images, which a stream does "
            "not have; leave streaming or token_buckets out"
        )


def bucket_mark(section: MasksSection) -> str:
    """What artifacts depend on where images have buckets; else nothing."""
    if section.token_buckets is None:
        return ""
    keys = section.model_dump(mode="json", include=set(BUCKET_KEYS), exclude_none=True)
    return f" buckets {json.dumps(keys, sort_keys=True)}"


def calibrated(
    compact: CompactModel, context: RunContext, fingerprint: str
) -> BucketedModel | None:
    """The step between fine-tuning and artifacts: buckets of the compact model, in compact/.

    Args:
        compact: The compact model, whose weights are shared.
        context: The run. Its folder receives compact/buckets.json, or loses it where the recipe
            has no buckets.
        fingerprint: That of the fine-tuning.

    Returns:
        The model with buckets; None if the recipe has none.
    """
    folder, section = context.folder, context.recipe.masks
    files = [f"{COMPACT}/{BUCKETS_FILE}"]
    if section.token_buckets is None:
        folder.forget(STEP, files)
        return None
    found, made = folder.step(
        STEP,
        context.recipe.fingerprint(previous=f"{fingerprint}{bucket_mark(section)}"),
        files,
        lambda _: _calibrate(compact, context),
        lambda: load_bucketed(folder / COMPACT),
    )
    _show(found, made=made, quiet=context.quiet)
    return found


def measurement_names(name: str, plan: Planned, section: MasksSection) -> tuple[str, ...]:
    """The names of the measurements of an artifact: one, or one of each bucket."""
    if section.token_buckets is None or plan.model != "compact":
        return (name,)
    return tuple(bucket_name(name, count) for count in section.token_buckets)


def bounds(
    plans: Mapping[str, Planned], measurements: Mapping[str, Measurement], section: MasksSection
) -> dict[str, Measurement]:
    """One measurement of each artifact: with buckets, that of the slowest and of all images."""
    found = {}
    for name, plan in plans.items():
        own = [measurements[each] for each in measurement_names(name, plan, section)]
        tables = bucket_tables(own)
        found[name] = tables[0].bound if tables else own[0]
    return found


def _calibrate(compact: CompactModel, context: RunContext) -> BucketedModel:
    section = context.recipe.masks
    assert section.token_buckets is not None
    images = drawn_images(section, context)
    with StageBars(quiet=context.quiet) as bars:
        model = bucketed(
            compact,
            section.token_buckets,
            coverage=section.token_coverage,
            images=images,
            mean_patches=section.token_mean_patches,
            rule=section.token_bucket_rule,
            progress=bars,
        )
    model.save_buckets(context.folder / COMPACT)
    return model


def _show(model: BucketedModel, *, made: bool, quiet: bool) -> None:
    found = model.calibration
    # A run calibrates on images, also with a given coverage.
    assert found is not None
    parts = [
        f"{count} patches {100 * share:.1f} %"
        for count, share in zip(found.counts, found.shares, strict=True)
    ]
    loaded = "" if made else "  (loaded from the run folder)"
    status(
        f"buckets of {found.images} training images: {', '.join(parts)}; "
        f"{model.buckets.described}; mean {unit_count(round(found.mean_macs))} MACs, at most "
        f"{unit_count(found.worst_macs)}{loaded}",
        quiet=quiet,
    )
