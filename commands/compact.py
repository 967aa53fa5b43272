"""`vitrim compact`: cut a model by a mask or by a saliency, or remove its dead weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.console import show, unit_count
from ..core.errors import InputError
from ..core.storage import require_output_folder, require_separate
from .bucket_options import BucketOptions, make_buckets
from .compact_options import (
    DEFAULT_KEEP_RATIO,
    ModelOptions,
    Output,
    Selection,
)
from .compact_output import kept_table, save_compact, show_sizes
from .compact_source import Source, data_of, load_source
from .compact_tokens import TokenCut, choose_tokens_of
from .compact_untrained import cut_without_training, require_resume
from .model_data import SaliencyImages
from .option_groups import with_option_groups
from .select_options import SelectOptions
from .token_options import TokenOptions
from .untrained_options import Untrained, check_options

if TYPE_CHECKING:
    from pathlib import Path

    from ..compress.masks.mask import StructuredMask
    from ..compress.masks.saliency import Scores
    from ..compress.network.architecture import Architecture
    from ..compress.network.modules.model import CompactModel
    from ..compress.surgery.stream_form import StreamForm


@with_option_groups
def compact(
    *,
    model: ModelOptions,
    selection: Selection,
    untrained: Untrained,
    tokens: TokenOptions,
    select: SelectOptions,
    buckets: BucketOptions,
    output: Output,
) -> None:
    """Cut a model and verify on noise images that the result equals the masked model.

    Without --mask, --keep-ratio, --saliency, --without-training and --tokens, only dead weight is
    removed: rows, columns, heads and channels of zeros, left by unstructured pruning, whose removal
    provably changes nothing. The zeros that remain are counted.

    With --without-training widths are chosen and weights refitted in closed form from unlabeled
    images, for a budget or for a front of sizes; an interrupted cut continues with --resume.

    With --tokens patches leave the network at fixed places, the same for every image: chosen from
    unlabeled images, for a share of the multiply-adds (--macs) or with given counts. It takes no
    training. With --saliency or --keep-ratio, too, widths are cut after the tokens.

    With --select patches are chosen for each image while the network runs, a constant number in
    each stage, by the attention of the network itself. With --buckets the last stage keeps one of
    several numbers, which depends on the image.

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

      vitrim compact runs/quickstart/baseline --without-training --front 8 --out sizes

      vitrim compact deit.pth --model deit_small_patch16_224 --tokens patch-slimming --macs 0.6 \
        --data images:photos --out small

      vitrim compact runs/quickstart/baseline --tokens radial --token-counts 50,40,30,1

      vitrim compact deit.pth --model deit_small_patch16_224 --select class-attention \
        --select-ratio 0.7 --select-stages 3,6,9 --out small

      vitrim compact small --buckets 30,45,67 --mean-patches 50 --data images:photos --out bucketed

    Args:
        model: The model to cut.
        selection: What is kept of it.
        untrained: A cut without training: its budget and its check.
        tokens: Which tokens are dropped, and how many.
        select: Which patches are chosen for each image, and how many.
        buckets: Of how many numbers of patches each image keeps one.
        output: What is printed and saved.
    """
    tokens.check(selection, untrained)
    select.check(tokens, untrained)
    buckets.check(selection, tokens, untrained)
    budget = untrained.macs
    if tokens.selected:
        # The budget is that of the tokens.
        untrained = replace(untrained, macs=None)
    uses_images = tokens.uses_images or buckets.selected
    check_options(selection, untrained, output, uses_images=uses_images)
    if untrained.selected:
        require_resume(untrained, output)
    if output.out is not None:
        _require_output(model, selection, untrained, output)
    source = load_source(model)
    before = source.model.architecture
    if select.selected:
        source = replace(source, model=select.applied(source.model, selection.seed))
    if buckets.selected:
        make_buckets(source, selection, buckets, output)
        return
    if tokens.selected:
        _cut_tokens(selection, choose_tokens_of(source, selection, tokens, budget), output)
        return
    if untrained.selected:
        cut_without_training(source, selection, untrained, output)
        return
    if selection.only_dead:
        if selection.round_to is not None:
            raise InputError(
                "--round-to rounds a mask; add --mask or --keep-ratio "
                "(the removal of dead weight is not rounded)"
            )
        _cut_dead(source.model, output, before)
        return
    _cut(source.model, _widths(source, selection), output, before=before)


def _cut_tokens(selection: Selection, cut: TokenCut, output: Output) -> None:
    """Cut the tokens, and widths of what is left if these were selected."""
    mask = cut.choice.mask
    if not selection.only_dead:
        mask = cut.with_widths(_widths(cut.cut_source, selection))
    _cut(cut.source.model, mask, output, cut.record())


def _widths(source: Source, selection: Selection) -> StructuredMask:
    """The mask of the options, rounded."""
    if selection.mask is not None:
        mask, scores = _read_mask(selection.mask, source.model), None
    else:
        mask, scores = _choose(source, selection)
    if selection.round_to is None:
        return mask
    return _rounded(source.model, mask, scores, selection.round_to)


def _require_output(
    model: ModelOptions, selection: Selection, untrained: Untrained, output: Output
) -> None:
    from ..compress.data.named_datasets import path_of
    from ..compress.network.files import MODEL

    inputs = {
        "the model": model.source or model.checkpoint,
        "the mask": selection.mask,
        "the data set": path_of(selection.data or ""),
    }
    assert output.out is not None
    kind = MODEL
    if untrained.front is not None:
        from ..pipeline.front import FRONT, FRONT_FILE

        kind = FRONT
        if untrained.resume and (output.out / FRONT_FILE).is_file():
            require_separate(output.out, inputs)
            return
    require_output_folder(output.out, kind, overwrite=output.overwrite, inputs=inputs)


def _read_mask(path: Path, model: CompactModel) -> StructuredMask:
    from ..compress.masks.mask import StructuredMask

    mask = StructuredMask.load(path)
    mask.check(model.architecture)
    return mask


def _choose(source: Source, selection: Selection) -> tuple[StructuredMask, Scores | None]:
    """The mask of a saliency, and the scores behind it, which a random mask has not."""
    from ..compress.masks.mask import StructuredMask, mask_and_scores
    from ..compress.masks.saliency import SaliencyOptions

    model, scope, sharing = source.model, selection.scope, selection.sharing
    saliency = selection.criterion
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


def _images(source: Source, selection: Selection, saliency: str) -> SaliencyImages:
    architecture = source.model.architecture
    if architecture.head is None:
        raise InputError(
            f"--saliency {saliency} needs the loss of a classifier, and this model has none; "
            "use l1 or l2"
        )
    data = data_of(source, selection, f"--saliency {saliency}")
    title, classes = f"{saliency} saliency", architecture.classes
    return SaliencyImages(data, selection.samples, selection.seed, classes, title)


def _rounded(
    model: CompactModel, mask: StructuredMask, scores: Scores | None, round_to: int
) -> StructuredMask:
    from ..compress.masks.saliency import saliency
    from ..compress.surgery.rounding import snap

    # By the scores that chose the mask; by magnitudes for masks without scores and for dimensions
    # that were kept whole.
    magnitudes = saliency(model, "l2", sharing=mask.sharing)
    return snap(mask, model.architecture, round_to, saliency={**magnitudes, **(scores or {})})


def _cut(
    source: CompactModel,
    mask: StructuredMask,
    output: Output,
    tokens: str | None = None,
    before: Architecture | None = None,
) -> None:
    """Cut a model, verify and save it; `before`: the model whose sizes are compared."""
    from ..compress.surgery.compactor import compact as cut
    from ..compress.surgery.stream_form import choose_stream_form

    form = choose_stream_form(cut(source, mask))
    error, images = _relative_error(source, mask, form.model)
    if output.explain:
        _explain(source, form.model, mask)
    show_sizes(before or source.architecture, form.model.architecture)
    _show_stream_form(form)
    show(f"masked against compact: largest relative error {error:.1e} on {images} noise images")
    save_compact(form.model, mask, output, tokens=tokens)


def _relative_error(
    source: CompactModel, mask: StructuredMask, small: CompactModel
) -> tuple[float, int]:
    """Largest difference of the outputs over the largest output, and the number of noise images."""
    import torch

    from ..compress.masks.masked import masked
    from ..compress.surgery.compactor import output_error

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *source.architecture.image, generator=generator)
    return output_error(masked(source, mask), small, images), len(images)


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


def _cut_dead(source: CompactModel, output: Output, before: Architecture) -> None:
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
    show_sizes(before, dead.compact.architecture)
    show(f"before against after: largest relative error {dead.error:.1e} on 2 noise images")
    save_compact(dead.compact, dead.mask, output)


def _explain(source: CompactModel, small: CompactModel, mask: StructuredMask) -> None:
    from ..compress.surgery.explain import explain

    show(kept_table(source, small))
    show("")
    show(explain(source, mask).table())
