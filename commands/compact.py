"""`vitrim compact`: cut a model by a mask, by a saliency of its units, or by what is dead in it
already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.console import show, unit_count
from ..core.errors import InputError
from .model_data import CARD, model_data, read_card

if TYPE_CHECKING:
    from rich.table import Table

    from ..compress.masks.mask import StructuredMask
    from ..compress.masks.saliency import Scores
    from ..compress.network.modules.model import CompactModel
    from ..pipeline.recipe_sections import ModelSection
    from .saliency_images import SaliencyImages

FROM_IMAGES = ("taylor", "head")
MASK = "mask.safetensors"


def compact(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A folder that vitrim saved, or a .safetensors or .pth file.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="The same, as an option.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="timm name of the model in a checkpoint file.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="KEY=VALUE",
            help="Keyword for timm.create_model, e.g. img_size=32. May be repeated.",
        ),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="timm's published weights instead of a checkpoint.")
    ] = False,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="A mask that vitrim saved.", show_default=False)
    ] = None,
    keep_ratio: Annotated[
        float | None,
        typer.Option(
            "--keep-ratio",
            help="Without a mask: keep this share of each dimension. With --saliency alone: 0.5.",
            show_default=False,
        ),
    ] = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            "--saliency",
            help="What stays first. From the weights alone: l1, l2 (the default), random. From images: taylor (what the loss would lose with a unit, "
            "to first order), head (how much the loss feels each attention head; cuts heads only).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images for taylor and head: fashion-mnist, cifar10, imagefolder:PATH, parquet:PATH, ... Absent: those of the run that MODEL lies in.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            min=1,
            help="How many of its training images, every class in its own share.",
        ),
    ] = 256,
    scope: Annotated[
        str,
        typer.Option(
            "--scope", help="Where --keep-ratio compares units: layer, global or isomorphic."
        ),
    ] = "layer",
    sharing: Annotated[
        str, typer.Option("--sharing", help="residual, full or unshared.")
    ] = "residual",
    round_to: Annotated[
        int | None,
        typer.Option(
            "--round-to", min=1, help="Snap kept widths to multiples of this.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Seed of --saliency random, and of which images are drawn."
        ),
    ] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say for each module what was cut, from what to what.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the smaller model and its mask. Absent: nothing is saved.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in --out.")
    ] = False,
) -> None:
    """Make a smaller model that computes exactly what the masked one does, and prove it on noise
    images.

    Without a mask, a keep ratio and a saliency, what is dead in the model already goes: rows,
    columns, heads and channels of zeros that unstructured pruning left behind, where that provably
    changes nothing. The rest of the zeros is told.

    Beside the model lies mask.safetensors: what was kept, and in its note how that was chosen
    (saliency, scope, images, seed, rounding).

    [bold]Examples[/bold]

      vitrim compact runs/quickstart/baseline --mask runs/quickstart/mask.safetensors --explain
      --out small

      vitrim compact pruned_elsewhere.pth --model deit_small_patch16_224 --out small

      vitrim compact deit.pth --model deit_small_patch16_224 --keep-ratio 0.5 --round-to 8 --out
      small

      vitrim compact runs/quickstart/baseline --saliency taylor --keep-ratio 0.7 --out small

      vitrim compact deit.pth --model deit_small_patch16_224 --saliency taylor --data
      imagefolder:photos --samples 1024 --scope global --out small
    """
    from ..core.storage import require_empty

    if out is not None:
        require_empty(out, overwrite=overwrite)
    if source is not None and checkpoint is not None:
        raise InputError(f"two models: {source} and --checkpoint {checkpoint}; name one")
    if mask is not None and keep_ratio is not None:
        raise InputError("--mask and --keep-ratio both say what stays; keep one")
    if mask is not None and saliency is not None:
        raise InputError("--mask and --saliency both say what stays; keep one")
    if saliency is not None:
        _require_saliency(saliency)
    if data is not None and saliency not in FROM_IMAGES:
        raise InputError(
            f"--data {data}: images are asked by --saliency taylor and head only; add one of them, or leave --data out"
        )
    given = _source(source or checkpoint, model, overrides or [], pretrained)
    if mask is None and keep_ratio is None and saliency is None:
        if round_to is not None:
            raise InputError(
                "--round-to snaps a mask; name --mask or --keep-ratio with it, dead weight alone is not rounded"
            )
        _cut_dead(given.model, explain, out, overwrite)
        return
    if mask is not None:
        chosen, scores = _read_mask(mask, given.model), None
    else:
        images = (
            _images(given, saliency, data, samples, seed)
            if saliency is not None and saliency in FROM_IMAGES
            else None
        )
        chosen, scores = _by_saliency(
            given.model,
            saliency or "l2",
            0.5 if keep_ratio is None else keep_ratio,
            scope,
            sharing,
            seed,
            images,
        )
    if round_to is not None:
        chosen = _rounded(given.model, chosen, scores, round_to)
    _cut(given.model, chosen, explain, out, overwrite)


@dataclass(frozen=True)
class _Given:
    """The model to cut, and what is known of its images."""

    model: CompactModel
    card: dict[str, Any] | None = None
    section: ModelSection | None = None


def _require_saliency(name: str) -> None:
    from ..compress.masks.saliency import require_criterion

    require_criterion(name)


def _source(
    checkpoint: Path | None, name: str | None, overrides: list[str], pretrained: bool
) -> _Given:
    from ..compress.lift import lift
    from ..compress.network.files import load
    from ..pipeline.recipe import parse_value
    from ..pipeline.recipe_sections import ModelSection
    from ..pipeline.source_model import classes_in, source_model

    if checkpoint is None and not pretrained:
        raise InputError("which model? name --checkpoint, or --model with --pretrained")
    if checkpoint is not None and checkpoint.is_dir():
        return _Given(load(checkpoint), read_card(checkpoint.parent / CARD))
    if name is None:
        raise InputError(
            f"{checkpoint}: a checkpoint file holds tensors only; say what they are with --model NAME (and --override KEY=VALUE)"
        )
    settings = dict(parse_value(item, "--override") for item in overrides)
    section = ModelSection(
        name=name,
        overrides=settings,
        pretrained=pretrained,
        checkpoint=None if checkpoint is None else str(checkpoint),
    )
    classes = settings.get("num_classes") or (
        classes_in(checkpoint) if checkpoint is not None else 1000
    )
    return _Given(lift(source_model(section, int(classes))), section=section)


def _read_mask(path: Path, model: CompactModel) -> StructuredMask:
    from ..compress.masks.mask import StructuredMask

    found = StructuredMask.load(path)
    found.check(model.architecture)
    return found


def _images(
    given: _Given, saliency: str, data: str | None, samples: int, seed: int
) -> SaliencyImages:
    from ..pipeline.source_model import preprocessing_of
    from .saliency_images import SaliencyImages

    architecture = given.model.architecture
    if architecture.head is None:
        raise InputError(
            f"--saliency {saliency} asks the classifier's loss, and this model has no classifier; use l1 or l2"
        )
    found = model_data(given.card, data, architecture.image)
    if found is None:
        raise InputError(
            f"--saliency {saliency} needs images: name them with --data, e.g. --data fashion-mnist or --data imagefolder:PATH"
        )
    if given.section is not None:
        found = replace(
            found, preprocessing=preprocessing_of(given.section, found.name, architecture.image)
        )
    return SaliencyImages(found, samples, seed, architecture.classes, f"{saliency} saliency")


def _by_saliency(
    model: CompactModel,
    saliency: str,
    keep_ratio: float,
    scope: str,
    sharing: str,
    seed: int,
    images: SaliencyImages | None,
) -> tuple[StructuredMask, Scores | None]:
    from ..compress.masks.mask import StructuredMask, mask_and_scores
    from ..compress.masks.saliency import SaliencyOptions

    if saliency == "random":
        return StructuredMask.random(model, keep_ratio, sharing, seed), None  # type: ignore[arg-type]
    # Words of the command line; what is none of the known ones is refused there.
    options = SaliencyOptions(keep_ratio, scope, sharing, images)  # type: ignore[arg-type]
    chosen, scores = mask_and_scores(model, saliency, options)  # type: ignore[arg-type]
    if images is None:
        return chosen, scores
    show(
        f"{saliency} saliency over {images.note['images']} training images of {images.note['data']}"
    )
    return replace(chosen, note={**chosen.note, **images.note}), scores


def _rounded(
    model: CompactModel, mask: StructuredMask, scores: Scores | None, round_to: int
) -> StructuredMask:
    from ..compress.surgery.rounding import snap
    from ..compress.masks.saliency import saliency as score

    # By what the mask was chosen by; magnitudes for dimensions that it left whole, and for masks
    # that came without scores.
    return snap(
        mask,
        model.architecture,
        round_to,
        saliency={**score(model, "l2", sharing=mask.sharing), **(scores or {})},
    )


def _cut(
    source: CompactModel, mask: StructuredMask, explain: bool, out: Path | None, overwrite: bool
) -> None:
    import torch

    from ..compress.masks.masked import masked
    from ..compress.surgery.compactor import compact as cut
    from ..compress.surgery.stream_form import choose_stream_form

    form = choose_stream_form(cut(source, mask))
    small = form.model
    before = source.architecture
    images = torch.randn(2, *before.image, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, found = masked(source, mask).eval()(images), small.eval()(images)
    error = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if explain:
        from ..compress.surgery.explain import explain as told

        show(_table(source, small))
        show("")
        show(told(source, mask).table())
    _counts(source, small)
    if form.choices:
        # Masks that are not shared: each reader and writer of the residual stream goes by index or
        # as dense rows, whichever the cost model finds cheaper.
        dense = sum(choice.form == "dense" for choice in form.choices)
        show(
            f"residual stream: {dense} of {len(form.choices)} readers and writers as dense rows, {len(form.choices) - dense} by index"
        )
    show(
        f"masked against compact: largest relative error {error:.1e} over {len(images)} noise images"
    )
    if out is not None:
        _save(small, mask, out, overwrite)


def _save(small: CompactModel, mask: StructuredMask, out: Path, overwrite: bool) -> None:
    from ..compress.network.files import save
    from ..core.storage import replace_folder

    with replace_folder(out, overwrite=overwrite) as aside:
        save(small, aside)
        mask.save(aside / MASK)
    show(f"saved: {out}")


def _cut_dead(source: CompactModel, explain: bool, out: Path | None, overwrite: bool) -> None:
    from ..compress.surgery.dead_weight import find_dead

    dead = find_dead(source)
    for row in dead.removed:
        how = ", constant ones folded into a bias" if row.folded else ""
        show(f"{row.site}: {row.removed} of {row.total} {row.dimension} units are dead{how}")
    if not dead.removed:
        show("no row, column, head or channel is dead: nothing to remove")
    for left in dead.left:
        show(f"{left.site}: {left.count} more are zero and stay ({left.why})")
    if explain:
        from ..compress.surgery.explain import explain as told

        show(_table(source, dead.compact))
        show("")
        show(told(source, dead.mask).table())
        for part in dead.sparsity:
            show(f"{part.tensor} {list(part.shape)}: {100 * part.zeros:.1f} % zeros stay")
    elif dead.sparsity:
        zeros = sum(part.zeros * math.prod(part.shape) for part in dead.sparsity)
        show(
            f"zeros that stay: {unit_count(round(zeros))} in {len(dead.sparsity)} matrices (--explain lists them)"
        )
    _counts(source, dead.compact)
    show(f"before against after: largest relative error {dead.error:.1e} over 2 noise images")
    if out is not None:
        _save(dead.compact, dead.mask, out, overwrite)


def _counts(source: CompactModel, small: CompactModel) -> None:
    from ..compress.network.count import count_macs, count_params

    for name, count in (("parameters", count_params), ("MACs", count_macs)):
        old, new = count(source.architecture), count(small.architecture)
        show(f"{name}: {unit_count(old)} -> {unit_count(new)} ({100 * new / old:.1f} %)")


def _table(source: CompactModel, small: CompactModel) -> Table:
    from rich.table import Table

    from ..compress.network.count import branch_macs, branch_tokens
    from ..pipeline.kept_units import kept_branches

    def macs(model: CompactModel) -> dict[str, int]:
        embed = model.architecture.embed
        return {
            branch.name: branch_macs(branch, embed, seen, asked)
            for branch, seen, asked in branch_tokens(model.architecture)
        }

    table = Table(show_edge=False, pad_edge=False)
    for column in ("module", "kind", "kept of total", "MACs"):
        table.add_column(column, justify="right" if column == "MACs" else "left", no_wrap=True)
    before, after = macs(source), macs(small)
    for entry in kept_branches(source.architecture, small.architecture):
        name = entry["branch"]
        kept = "  ".join(
            f"{dimension} {left}/{total}" for dimension, (left, total) in entry["dims"].items()
        )
        table.add_row(
            name,
            entry["kind"],
            kept,
            f"{unit_count(before[name])} -> {unit_count(after.get(name, 0))}",
        )
    return table
