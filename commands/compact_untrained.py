"""`vitrim compact --without-training`: one cut, or a front of sizes, from unlabeled images."""

from __future__ import annotations

from dataclasses import replace

from ..core.console import show
from .compact_options import Output, Selection
from .compact_output import kept_table, save_compact, show_sizes
from .compact_source import Source, data_of

# Runtimes are fastest at multiples of 16, and lose little at multiples of 8.
DEFAULT_ROUND_TO = 8


def cut_without_training(source: Source, selection: Selection, output: Output) -> None:
    """Cut a model in closed form, show how near it comes to the dense one, and save it."""
    from ..compress.data.loading import open_unlabeled
    from ..pipeline.recipe_sections import MasksSection
    from ..pipeline.trim_step import (
        exact_cut_error,
        require_budget,
        show_fits,
        trim_baseline,
        trim_record,
    )

    architecture = source.model.architecture
    section = MasksSection(method="closed-form", macs=selection.macs, params=selection.params)
    require_budget(architecture, section, options=("--macs", "--params"))
    data = data_of(source, selection, "--without-training")
    images = open_unlabeled(
        data.name,
        selection.samples,
        preprocessing=data.preprocessing,
        draw_seed=selection.seed,
        quiet=False,
        **data.division,
    ).floats()
    show(f"{len(images)} images of {data.name}, without labels")
    round_to = selection.round_to or DEFAULT_ROUND_TO
    found = trim_baseline(source.model, images, section, round_to, quiet=False)
    error = exact_cut_error(found.rotated, found.mask, images[:2])
    show(f"masked against compact, before compensation: largest relative error {error:.1e}")
    if output.explain:
        show(kept_table(source.model, found.model))
        show_fits(found)
    show_sizes(source.model, found.model)
    check = found.check
    agreement = "" if check.agreement is None else f", same class on {100 * check.agreement:.1f} %"
    show(
        f"{check.images} held-out images: cosine to the dense features {check.cosine:.4f}, of the "
        f"patches {check.patch_cosine:.4f}{agreement}"
    )
    note = {"data": data.name, "images": str(len(images)), "seed": str(selection.seed)}
    mask = replace(found.mask, note={**found.mask.note, **note})
    save_compact(found.model, mask, output, record=trim_record(found))
