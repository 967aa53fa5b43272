"""`vitrim compact`: cut a model by a mask or by a saliency, or remove its dead weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.console import show, unit_count
from ..core.errors import InputError
from ..core.storage import replace_file, replace_folder, require_output_folder
from .compact_options import (
    DEFAULT_KEEP_RATIO,
    DEFAULT_SALIENCY,
    ModelOptions,
    Output,
    Selection,
)
from .model_data import CARD, ModelData, SaliencyImages, model_data, read_card
from .option_groups import with_option_groups

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from ..compress.masks.mask import StructuredMask
    from ..compress.masks.saliency import Scores
    from ..compress.network.modules.model import CompactModel
    from ..compress.surgery.stream_form import StreamForm
    from ..pipeline.recipe_sections import ModelSection

# Runtimes are fastest at multiples of 16, and lose little at multiples of 8.
DEFAULT_ROUND_TO = 8


@with_option_groups
def compact(*, model: ModelOptions, selection: Selection, output: Output) -> None:
    """Cut a model and verify on noise images that the result equals the masked model.

    Without --mask, --keep-ratio and --saliency, only dead weight is removed: rows, columns, heads
    and channels of zeros, left by unstructured pruning, whose removal provably changes nothing. The
    zeros that remain are counted.

    The output folder contains the model and mask.safetensors. The note of the mask records how it
    was chosen (saliency, scope, images, seed, rounding).

    [bold]Examples[/bold]

      vitrim compact runs/quickstart/baseline --mask runs/quickstart/mask.safetensors --out small

      vitrim compact pruned_elsewhere.pth --model deit_small_patch16_224 --explain

      vitrim compact deit.pth --model deit_small_patch16_224 --keep-ratio 0.5 --round-to 8

      vitrim compact runs/quickstart/baseline --saliency taylor --keep-ratio 0.7 --out small

      vitrim compact small --saliency taylor --data imagefolder:photos --samples 1024 --scope global

      vitrim compact deit.pth --model deit_small_patch16_224 --without-training --macs 0.7 \
        --data images:photos --out small

    Args:
        model: The model to cut.
        selection: What is kept of it.
        output: What is printed and saved.
    """
    if output.out is not None:
        _require_output(model, selection, output)
    source = _load(model)
    if selection.without_training:
        _cut_without_training(source, selection, output)
        return
    if selection.only_dead:
        if selection.round_to is not None:
            raise InputError(
                "--round-to rounds a mask; add --mask or --keep-ratio "
                "(the removal of dead weight is not rounded)"
            )
        _cut_dead(source.model, output)
        return
    if selection.mask is not None:
        mask, scores = _read_mask(selection.mask, source.model), None
    else:
        mask, scores = _choose(source, selection)
    if selection.round_to is not None:
        mask = _rounded(source.model, mask, scores, selection.round_to)
    _cut(source.model, mask, output)


def _require_output(model: ModelOptions, selection: Selection, output: Output) -> None:
    from ..compress.data.named_datasets import path_of
    from ..compress.network.files import MODEL

    inputs = {
        "the model": model.source or model.checkpoint,
        "the mask": selection.mask,
        "the data set": path_of(selection.data or ""),
    }
    assert output.out is not None
    require_output_folder(output.out, MODEL, overwrite=output.overwrite, inputs=inputs)


@dataclass(frozen=True)
class _Source:
    """The model to cut, with the card of its run or its recipe section, which name its images."""

    model: CompactModel
    card: dict[str, Any] | None = None
    section: ModelSection | None = None


def _load(options: ModelOptions) -> _Source:
    from ..compress.lift import lift
    from ..compress.network.files import load
    from ..pipeline.checkpoint_file import require_no_graph
    from ..pipeline.source_model import classes_in, require_saved, source_model

    checkpoint = options.source or options.checkpoint
    if checkpoint is None and not options.pretrained:
        raise InputError("no model: name MODEL or --checkpoint, or --model with --pretrained")
    if checkpoint is not None and checkpoint.is_dir():
        require_saved(checkpoint)
        return _Source(load(checkpoint), read_card(checkpoint.parent / CARD))
    if checkpoint is not None:
        require_no_graph(checkpoint)
    if options.model is None:
        raise InputError(
            f"{checkpoint}: a checkpoint file contains tensors only; name their model with "
            "--model NAME (and --override KEY=VALUE)"
        )
    section = _section(options, checkpoint)
    classes = section.overrides.get("num_classes")
    if classes is None:
        classes = 1000 if checkpoint is None else classes_in(section)
    return _Source(lift(source_model(section, classes)), section=section)


def _section(options: ModelOptions, checkpoint: Path | None) -> ModelSection:
    """The options as the section `[model]` of a recipe.

    Raises:
        InputError: Two options exclude each other, or an override has another form.
    """
    from pydantic import ValidationError

    from ..pipeline.recipe import parse_value
    from ..pipeline.recipe_keys import first_error
    from ..pipeline.recipe_sections import ModelSection

    overrides = dict(parse_value(item, "--override") for item in options.overrides or ())
    given = {
        "name": options.model,
        "overrides": overrides,
        "pretrained": options.pretrained,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    try:
        return ModelSection.model_validate(given)
    except ValidationError as error:
        raise InputError(f"--model {options.model}: {first_error(error, ModelSection)}") from None


def _read_mask(path: Path, model: CompactModel) -> StructuredMask:
    from ..compress.masks.mask import StructuredMask

    mask = StructuredMask.load(path)
    mask.check(model.architecture)
    return mask


def _choose(source: _Source, selection: Selection) -> tuple[StructuredMask, Scores | None]:
    """The mask of a saliency, and the scores behind it, which a random mask has not."""
    from ..compress.masks.mask import StructuredMask, mask_and_scores
    from ..compress.masks.saliency import SaliencyOptions

    model, scope, sharing = source.model, selection.scope, selection.sharing
    saliency = selection.saliency or DEFAULT_SALIENCY
    ratio = DEFAULT_KEEP_RATIO if selection.keep_ratio is None else selection.keep_ratio
    # The command line's strings; unknown ones are refused in there.
    if saliency == "random":
        mask = StructuredMask.random(model, ratio, sharing, selection.seed)  # type: ignore[arg-type]
        return mask, None
    images = _images(source, selection, saliency) if selection.uses_images else None
    options = SaliencyOptions(ratio, scope, sharing, images)  # type: ignore[arg-type]
    mask, scores = mask_and_scores(model, saliency, options)  # type: ignore[arg-type]
    if images is None:
        return mask, scores
    note = images.note
    show(f"{saliency} saliency on {note['images']} training images of {note['data']}")
    return replace(mask, note={**mask.note, **note}), scores


def _images(source: _Source, selection: Selection, saliency: str) -> SaliencyImages:
    architecture = source.model.architecture
    if architecture.head is None:
        raise InputError(
            f"--saliency {saliency} needs the loss of a classifier, and this model has none; "
            "use l1 or l2"
        )
    data = _data(source, selection, f"--saliency {saliency}")
    title, classes = f"{saliency} saliency", architecture.classes
    return SaliencyImages(data, selection.samples, selection.seed, classes, title)


def _data(source: _Source, selection: Selection, option: str) -> ModelData:
    from ..pipeline.source_model import preprocessing_of

    image = source.model.architecture.image
    data = model_data(source.card, selection.data, image)
    if data is None:
        raise InputError(
            f"{option} needs images: name them with --data, e.g. "
            "--data fashion-mnist or --data imagefolder:PATH"
        )
    if source.section is None:
        return data
    return replace(data, preprocessing=preprocessing_of(source.section, data.name, image))


def _cut_without_training(source: _Source, selection: Selection, output: Output) -> None:
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
    data = _data(source, selection, "--without-training")
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
        show(_kept_table(source.model, found.model))
        show_fits(found)
    _show_sizes(source.model, found.model)
    check = found.check
    agreement = "" if check.agreement is None else f", same class on {100 * check.agreement:.1f} %"
    show(
        f"{check.images} held-out images: cosine to the dense features {check.cosine:.4f}, of the "
        f"patches {check.patch_cosine:.4f}{agreement}"
    )
    note = {"data": data.name, "images": str(len(images)), "seed": str(selection.seed)}
    mask = replace(found.mask, note={**found.mask.note, **note})
    _save(found.model, mask, output, record=trim_record(found))


def _rounded(
    model: CompactModel, mask: StructuredMask, scores: Scores | None, round_to: int
) -> StructuredMask:
    from ..compress.masks.saliency import saliency
    from ..compress.surgery.rounding import snap

    # By the scores that chose the mask; by magnitudes for masks without scores and for dimensions
    # that were kept whole.
    magnitudes = saliency(model, "l2", sharing=mask.sharing)
    return snap(mask, model.architecture, round_to, saliency={**magnitudes, **(scores or {})})


def _cut(source: CompactModel, mask: StructuredMask, output: Output) -> None:
    from ..compress.surgery.compactor import compact as cut
    from ..compress.surgery.stream_form import choose_stream_form

    form = choose_stream_form(cut(source, mask))
    error, images = _relative_error(source, mask, form.model)
    if output.explain:
        _explain(source, form.model, mask)
    _show_sizes(source, form.model)
    _show_stream_form(form)
    show(f"masked against compact: largest relative error {error:.1e} on {images} noise images")
    _save(form.model, mask, output)


def _relative_error(
    source: CompactModel, mask: StructuredMask, small: CompactModel
) -> tuple[float, int]:
    """Largest difference of the outputs over the largest output, and the number of noise images."""
    import torch

    from ..compress.masks.masked import masked

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *source.architecture.image, generator=generator)
    with torch.inference_mode():
        expected, found = masked(source, mask).eval()(images), small.eval()(images)
    error = (expected - found).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float(error), len(images)


def _show_stream_form(form: StreamForm) -> None:
    """Show how the readers and writers of the residual stream select their channels.

    Where masks are not shared, each does it by index or with zero rows, whichever the cost model
    estimates to be cheaper.
    """
    total = len(form.choices)
    if total:
        dense = sum(choice.form == "dense" for choice in form.choices)
        show(
            f"residual stream: {dense} of {total} readers and writers with dense rows, "
            f"{total - dense} by index"
        )


def _cut_dead(source: CompactModel, output: Output) -> None:
    from ..compress.surgery.dead_weight import find_dead

    dead = find_dead(source)
    for row in dead.removed:
        folded = ", constant ones folded into a bias" if row.folded else ""
        show(f"{row.site}: {row.removed} of {row.total} {row.dimension} units are dead{folded}")
    if not dead.removed:
        show("no row, column, head or channel is dead: nothing to remove")
    for zero in dead.remaining:
        show(f"{zero.site}: {zero.count} more are zero and remain ({zero.why})")
    if output.explain:
        _explain(source, dead.compact, dead.mask)
        for part in dead.sparsity:
            show(f"{part.tensor} {list(part.shape)}: {100 * part.zeros:.1f} % zeros remain")
    elif dead.sparsity:
        zeros = sum(part.zeros * math.prod(part.shape) for part in dead.sparsity)
        show(
            f"zeros that remain: {unit_count(round(zeros))} in {len(dead.sparsity)} matrices "
            "(--explain lists them)"
        )
    _show_sizes(source, dead.compact)
    show(f"before against after: largest relative error {dead.error:.1e} on 2 noise images")
    _save(dead.compact, dead.mask, output)


def _save(
    small: CompactModel, mask: StructuredMask, output: Output, record: str | None = None
) -> None:
    from ..compress.network.files import MASK_FILE, MODEL, TRIM_FILE, save

    if output.out is None:
        return
    with replace_folder(output.out, MODEL, overwrite=output.overwrite) as temporary:
        save(small, temporary)
        mask.save(temporary / MASK_FILE)
        if record is not None:
            replace_file(temporary / TRIM_FILE, record)
    show(f"saved: {output.out}")


def _explain(source: CompactModel, small: CompactModel, mask: StructuredMask) -> None:
    from ..compress.surgery.explain import explain

    show(_kept_table(source, small))
    show("")
    show(explain(source, mask).table())


def _show_sizes(source: CompactModel, small: CompactModel) -> None:
    from ..compress.network.count import count_macs, count_params

    for name, count in (("parameters", count_params), ("MACs", count_macs)):
        old, new = count(source.architecture), count(small.architecture)
        show(f"{name}: {unit_count(old)} -> {unit_count(new)} ({100 * new / old:.1f} %)")


def _kept_table(source: CompactModel, small: CompactModel) -> Table:
    from rich.table import Table

    from ..pipeline.kept_units import kept_branches

    table = Table(show_edge=False, pad_edge=False)
    for column in ("module", "kind", "kept of total", "MACs"):
        table.add_column(column, justify="right" if column == "MACs" else "left", no_wrap=True)
    before, after = _branch_macs(source), _branch_macs(small)
    for entry in kept_branches(source.architecture, small.architecture):
        name = entry["branch"]
        dims = [f"{dimension} {kept}/{total}" for dimension, (kept, total) in entry["dims"].items()]
        macs = f"{unit_count(before[name])} -> {unit_count(after.get(name, 0))}"
        table.add_row(name, entry["kind"], "  ".join(dims), macs)
    return table


def _branch_macs(model: CompactModel) -> dict[str, int]:
    from ..compress.network.count import branch_macs, branch_tokens

    embed = model.architecture.embed
    return {
        branch.name: branch_macs(branch, embed, tokens, queries)
        for branch, tokens, queries in branch_tokens(model.architecture)
    }
