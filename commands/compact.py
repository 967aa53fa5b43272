"""`vitrim compact`: cut a model by a mask, by magnitudes, or by what is dead in it already."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..terminal_lines import show, unit_count

if TYPE_CHECKING:
    from rich.table import Table

    from ..compress.mask import StructuredMask
    from ..compress.vit.model import CompactModel


def compact(
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A folder that vitrim saved, or a .safetensors or .pth file.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="timm name of the model in a checkpoint file.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--override", metavar="KEY=VALUE", help="Keyword for timm.create_model, e.g. img_size=32. May be repeated."),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's published weights instead of a checkpoint.")] = False,
    mask: Annotated[Path | None, typer.Option("--mask", help="A mask that vitrim saved.", show_default=False)] = None,
    keep_ratio: Annotated[
        float | None, typer.Option("--keep-ratio", help="Without a mask: keep this share of each dimension.", show_default=False)
    ] = None,
    saliency: Annotated[str, typer.Option("--saliency", help="What --keep-ratio keeps first: l1, l2 or random.")] = "l2",
    scope: Annotated[str, typer.Option("--scope", help="Where --keep-ratio compares units: layer, global or isomorphic.")] = "layer",
    sharing: Annotated[str, typer.Option("--sharing", help="residual, full or unshared.")] = "residual",
    round_to: Annotated[
        int | None, typer.Option("--round-to", min=1, help="Snap kept widths to multiples of this.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of --saliency random.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Say for each module what was cut, from what to what.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the smaller model. Absent: nothing is saved.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
) -> None:
    """Make a smaller model that computes exactly what the masked one does, and prove it on noise images.

    Without a mask and without a keep ratio, what is dead in the model already goes: rows, columns, heads and channels of zeros that unstructured
    pruning left behind, where that provably changes nothing. The rest of the zeros is told.

    [bold]Examples[/bold]

      vitrim compact --checkpoint runs/quickstart/baseline --mask runs/quickstart/mask.safetensors --explain --out small

      vitrim compact --checkpoint pruned_elsewhere.pth --model deit_small_patch16_224 --out small

      vitrim compact --checkpoint deit.pth --model deit_small_patch16_224 --keep-ratio 0.5 --round-to 8 --out small
    """
    from ..storage import require_empty

    if out is not None:
        require_empty(out, overwrite=overwrite)
    if mask is not None and keep_ratio is not None:
        raise InputError("--mask and --keep-ratio both say what stays; keep one")
    source = _source(checkpoint, model, overrides or [], pretrained)
    if mask is None and keep_ratio is None:
        if round_to is not None:
            raise InputError("--round-to snaps a mask; name --mask or --keep-ratio with it, dead weight alone is not rounded")
        _cut_dead(source, explain, out, overwrite)
        return
    chosen = _mask(source, mask, keep_ratio, saliency, scope, sharing, seed)
    if round_to is not None:
        from ..compress.rounding import snap
        from ..compress.saliency import saliency as score

        chosen = snap(chosen, source.architecture, round_to, saliency=score(source, "l2", sharing=chosen.sharing))
    _cut(source, chosen, explain, out, overwrite)


def _source(checkpoint: Path | None, name: str | None, overrides: list[str], pretrained: bool) -> CompactModel:
    from ..compress.files import load
    from ..compress.lift import lift
    from ..recipe import ModelSection, parse_value
    from ..source_model import classes_in, source_model

    if checkpoint is None and not pretrained:
        raise InputError("which model? name --checkpoint, or --model with --pretrained")
    if checkpoint is not None and checkpoint.is_dir():
        return load(checkpoint)
    if name is None:
        raise InputError(
            f"{checkpoint}: a checkpoint file holds tensors only; say what they are with --model NAME (and --override KEY=VALUE)"
        )
    settings = dict(parse_value(item, "--override") for item in overrides)
    section = ModelSection(name=name, overrides=settings, pretrained=pretrained, checkpoint=None if checkpoint is None else str(checkpoint))
    classes = settings.get("num_classes") or (classes_in(checkpoint) if checkpoint is not None else 1000)
    return lift(source_model(section, int(classes)))


def _mask(
    source: CompactModel, path: Path | None, keep_ratio: float | None, saliency: str, scope: str, sharing: str, seed: int
) -> StructuredMask:
    from ..compress.mask import StructuredMask

    if path is not None:
        found = StructuredMask.load(path)
        found.check(source.architecture)
        return found
    assert keep_ratio is not None, "without either, only what is dead goes"
    if saliency == "random":
        return StructuredMask.random(source, keep_ratio, sharing, seed)  # type: ignore[arg-type]
    # Words of the command line; what is none of the known ones is refused there.
    return StructuredMask.from_saliency(source, saliency, keep_ratio=keep_ratio, scope=scope, sharing=sharing)  # type: ignore[arg-type]


def _cut(source: CompactModel, mask: StructuredMask, explain: bool, out: Path | None, overwrite: bool) -> None:
    import torch

    from ..compress.compactor import compact as cut
    from ..compress.files import save
    from ..compress.masked import masked
    from ..compress.stream_form import choose_stream_form

    form = choose_stream_form(cut(source, mask))
    small = form.model
    before = source.architecture
    images = torch.randn(2, *before.image, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, found = masked(source, mask).eval()(images), small.eval()(images)
    error = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if explain:
        from ..compress.explain import explain as told

        show(_table(source, small))
        show("")
        show(told(source, mask).table())
    _counts(source, small)
    if form.choices:
        # Masks that are not shared: each reader and writer of the residual stream goes by index or as dense rows, whichever the cost model finds cheaper.
        dense = sum(choice.form == "dense" for choice in form.choices)
        show(f"residual stream: {dense} of {len(form.choices)} readers and writers as dense rows, {len(form.choices) - dense} by index")
    show(f"masked against compact: largest relative error {error:.1e} over {len(images)} noise images")
    if out is not None:
        save(small, out, overwrite=overwrite)
        show(f"saved: {out}")


def _cut_dead(source: CompactModel, explain: bool, out: Path | None, overwrite: bool) -> None:
    from ..compress.dead_weight import find_dead
    from ..compress.files import save

    dead = find_dead(source)
    for row in dead.removed:
        how = ", constant ones folded into a bias" if row.folded else ""
        show(f"{row.site}: {row.removed} of {row.total} {row.dimension} units are dead{how}")
    if not dead.removed:
        show("no row, column, head or channel is dead: nothing to remove")
    for left in dead.left:
        show(f"{left.site}: {left.count} more are zero and stay ({left.why})")
    if explain:
        from ..compress.explain import explain as told

        show(_table(source, dead.compact))
        show("")
        show(told(source, dead.mask).table())
        for part in dead.sparsity:
            show(f"{part.tensor} {list(part.shape)}: {100 * part.zeros:.1f} % zeros stay")
    elif dead.sparsity:
        zeros = sum(part.zeros * math.prod(part.shape) for part in dead.sparsity)
        show(f"zeros that stay: {unit_count(round(zeros))} in {len(dead.sparsity)} matrices (--explain lists them)")
    _counts(source, dead.compact)
    show(f"before against after: largest relative error {dead.error:.1e} over 2 noise images")
    if out is not None:
        save(dead.compact, out, overwrite=overwrite)
        show(f"saved: {out}")


def _counts(source: CompactModel, small: CompactModel) -> None:
    from ..compress.count import count_macs, count_params

    for name, count in (("parameters", count_params), ("MACs", count_macs)):
        old, new = count(source.architecture), count(small.architecture)
        show(f"{name}: {unit_count(old)} -> {unit_count(new)} ({100 * new / old:.1f} %)")


def _table(source: CompactModel, small: CompactModel) -> Table:
    from rich.table import Table

    from ..compress.count import branch_macs, branch_tokens
    from ..kept_branches import kept_branches

    def macs(model: CompactModel) -> dict[str, int]:
        embed = model.architecture.embed
        return {branch.name: branch_macs(branch, embed, seen, asked) for branch, seen, asked in branch_tokens(model.architecture)}

    table = Table(show_edge=False, pad_edge=False)
    for column in ("module", "kind", "kept of total", "MACs"):
        table.add_column(column, justify="right" if column == "MACs" else "left", no_wrap=True)
    before, after = macs(source), macs(small)
    for entry in kept_branches(source.architecture, small.architecture):
        name = entry["branch"]
        kept = "  ".join(f"{dimension} {left}/{total}" for dimension, (left, total) in entry["dims"].items())
        table.add_row(name, entry["kind"], kept, f"{unit_count(before[name])} -> {unit_count(after.get(name, 0))}")
    return table
