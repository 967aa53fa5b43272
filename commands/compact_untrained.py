"""`vitrim compact --without-training`: one cut, or a front of sizes, from unlabeled images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.console import show
from ..core.errors import InputError
from ..core.storage import clear_folder, require_output_folder
from .budget_checks import files_table, require_budgets
from .compact_options import Output, Selection
from .compact_output import kept_table, save_compact, show_sizes
from .compact_source import Source, data_of, unlabeled_images
from .latency_checks import require_measurable, require_reach
from .untrained_options import LARGEST_SHARE, Untrained

if TYPE_CHECKING:
    from torch import Tensor

    from ..bench.local.options import MeasureOptions
    from ..bench.report.front import Size
    from ..bench.results.measurement import Measurement
    from ..compress.latency.cut import LatencyCut, LatencyCuts
    from ..compress.oneshot.trim import Trimmed, TrimOptions
    from ..core.progress import Progress
    from ..pipeline.front import Cutter
    from ..pipeline.latency_loop import LatencyRecord, Measure
    from ..pipeline.quality import LabelledImages, Quality
    from ..pipeline.trim_step import StageBars
    from ..targets.cost_table import CostTable
    from .model_data import ModelData

# Runtimes are fastest at multiples of 16, and lose little at multiples of 8.
DEFAULT_ROUND_TO = 8
# With fewer images least squares fit the images rather than the network.
ENOUGH_IMAGES = 256


@dataclass(frozen=True)
class _Job:
    """What is cut, from which images, how, and where finished parts are saved."""

    source: Source
    images: Tensor
    labelled: LabelledImages | None
    selection: Selection
    untrained: Untrained
    output: Output
    options: TrimOptions
    state: Path | None
    table: CostTable | None = None
    # What the files of --verify are of.
    files: CostTable | None = None


def cut_without_training(
    source: Source, selection: Selection, untrained: Untrained, output: Output
) -> None:
    """Cut a model in closed form, show how near it comes to the dense one, and save it.

    Args:
        source: The model, and the run or recipe section that it comes from.
        selection: The data set, the number of images, the seed and the rounding.
        untrained: The budget, and what is checked.
        output: What is printed and saved.

    Raises:
        InputError: The budget is out of reach, the images do not fit, or the output folder has the
            state of another cut.
    """
    untrained, table = _with_table(source, untrained)
    options = _options(source, selection, untrained, table)
    files = files_table(source.model.architecture, untrained, table)
    data = data_of(source, selection, "--without-training")
    images = unlabeled_images(data, selection)
    if len(images) < 2:
        raise InputError(
            f"{data.name}: one image, and a cut without training needs {ENOUGH_IMAGES} or more to "
            "fit weights and to check them; add images, or raise --samples"
        )
    show(f"{len(images)} images of {data.name}, without labels")
    if len(images) < ENOUGH_IMAGES:
        show(
            "these are few: predicted errors are too low and refits worse than with "
            f"{ENOUGH_IMAGES} images or more"
        )
    labelled = _labelled(source, data, selection, untrained)
    with _state(output, resume=untrained.resume) as state:
        given = source, images, labelled, selection, untrained, output, options, state
        job = _Job(*given, table, files)
        if untrained.front is None:
            _one_size(job)
        else:
            _front(job)


def _with_table(source: Source, untrained: Untrained) -> tuple[Untrained, CostTable | None]:
    """The cost table of --latency-ms, and the options with the latency that --energy-mj allows."""
    if untrained.latency_ms is None:
        return untrained, None
    from ..pipeline.latency_table import TableRequest

    table = TableRequest(
        untrained.cost_table,
        untrained.device,
        untrained.runtime,
        untrained.file_precision or "fp32",
    ).table(source.model.architecture, "--runtime")
    if table.estimated is not None:
        show(f"no cost table was measured, so the latency is an estimate: {table.title}")
    require_measurable(untrained, table)
    require_reach(source.model.architecture, untrained, table)
    if untrained.energy_mj is None:
        return untrained, table
    most_ms = table.energy_latency_ms(untrained.energy_mj, "--energy-mj")
    return replace(untrained, latency_ms=min(untrained.latency_ms, most_ms)), table


def _options(
    source: Source, selection: Selection, untrained: Untrained, table: CostTable | None
) -> TrimOptions:
    """The options of the cut; a budget that cannot be met is an error."""
    from ..compress.latency.problem import weight_precision
    from ..compress.oneshot.trim import TrimOptions

    round_to = selection.round_to or DEFAULT_ROUND_TO
    require_budgets(source.model.architecture, untrained, round_to, table)
    precision: Any = untrained.file_precision
    return TrimOptions(round_to=round_to, precision=weight_precision(table, precision))


def _labelled(
    source: Source, data: ModelData, selection: Selection, untrained: Untrained
) -> LabelledImages | None:
    from ..pipeline.quality import open_labelled

    architecture = source.model.architecture
    return open_labelled(
        data.name,
        untrained.check_images,
        preprocessing=data.preprocessing,
        head_classes=None if architecture.head is None else architecture.classes,
        division=data.division,
        seed=selection.seed,
    )


def require_resume(untrained: Untrained, output: Output) -> None:
    """Check that no cut to `--out` was interrupted, unless it is continued or replaced.

    Raises:
        InputError: There is one.
    """
    if output.out is None or untrained.resume or output.overwrite:
        return
    folder = _state_folder(output.out)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{folder}: an interrupted cut to {output.out}; --resume continues it, --overwrite "
            "starts again"
        )


def _state_folder(out: Path) -> Path:
    place = out if out.name else out.resolve()
    return place.with_name(f"{place.name}.partial")


@contextmanager
def _state(output: Output, *, resume: bool) -> Iterator[Path | None]:
    """A folder beside `--out` for finished parts of the cut; it is deleted at the end."""
    from ..compress.oneshot.saved_state import STATE
    from ..pipeline.trim_step import STATE_FOLDER

    if output.out is None:
        yield None
        return
    folder = _state_folder(output.out)
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        require_output_folder(folder, STATE_FOLDER, overwrite=True)
        clear_folder(folder, STATE)
    yield folder
    if folder.is_dir():
        clear_folder(folder, STATE)
        folder.rmdir()


def _trimmed(job: _Job) -> Trimmed:
    from ..compress.oneshot.trim import trim
    from ..pipeline.trim_step import StageBars

    _, kind, amount = job.untrained.budget
    with StageBars(quiet=False) as bars:
        return trim(
            job.source.model,
            job.images,
            budget=amount,
            kind=kind,
            options=job.options,
            resume=job.state,
            progress=bars,
        )


def _latency_cut(job: _Job) -> tuple[LatencyCut, LatencyRecord]:
    """The cut to --latency-ms; with --verify measured and corrected."""
    from ..pipeline.latency_loop import cut_to_latency
    from ..pipeline.trim_step import StageBars, show_latency

    _, _, latency_ms = job.untrained.budget
    with StageBars(quiet=False) as bars:
        cuts = _latency_cuts(job, bars)
        found, record = cut_to_latency(cuts, latency_ms, _measure(job))
    show_latency(found, cuts.table)
    show(record.text())
    return found, record


def _latency_cuts(job: _Job, bars: StageBars) -> LatencyCuts:
    from ..compress.latency.cut import LatencyCuts, LatencyOptions

    untrained = job.untrained
    assert job.table is not None
    latency = LatencyOptions(
        tokens=not untrained.keep_tokens,
        candidates=untrained.candidates,
        seed=job.selection.seed,
        file_mb=untrained.file_mb,
        peak_memory_mb=untrained.peak_memory_mb,
    )
    return LatencyCuts(
        job.source.model,
        job.images,
        job.table,
        options=job.options,
        latency=latency,
        resume=job.state,
        progress=bars,
    )


def _measure(job: _Job) -> Measure | None:
    """Measures a network as an exported file, with --verify."""
    from ..pipeline.latency_loop import PARITY_IMAGES, file_measure
    from ..pipeline.latency_place import file_target

    if not job.untrained.verify:
        return None
    assert job.files is not None
    images, address = job.images[:PARITY_IMAGES], job.untrained.verify_on
    target = file_target(job.files, job.untrained.device)
    if address == "host":
        return file_measure(job.files, images, target=target)
    from ..bench.remote.measure import measure_at

    def on_device(
        files: dict[str, Path], chosen: MeasureOptions, progress: Progress
    ) -> dict[str, Measurement]:
        return measure_at(address, files, chosen, target=target, progress=progress)

    return file_measure(job.files, images, on_device, target=target)


def _one_size(job: _Job) -> None:
    from ..compress.oneshot.choice import priced
    from ..pipeline.trim_step import exact_cut_error, show_fits, trim_record

    source = job.source
    _, kind, amount = job.untrained.budget
    more: dict[str, Any] = {"budget": {"kind": kind, "amount": amount}}
    if job.table is None:
        found = _trimmed(job)
        mask = found.mask
    else:
        cut, record = _latency_cut(job)
        found, mask = cut.trimmed, cut.mask
        more["latency"] = record.record()
    error = exact_cut_error(found.rotated, found.mask, job.images[:2])
    show(f"masked against compact, before compensation: largest relative error {error:.1e}")
    show(found.table())
    if job.output.explain:
        show(kept_table(source.model, found.model))
        show_fits(found)
    # As exported: the last block of the dense model also computes only what the head reads.
    show_sizes(priced(source.model.architecture), priced(found.model.architecture))
    check = found.check
    agreement = "" if check.agreement is None else f", same class on {100 * check.agreement:.1f} %"
    patches = "" if check.patch_cosine is None else f", of the patches {check.patch_cosine:.4f}"
    show(
        f"{check.images} held-out images: cosine to the dense features {check.cosine:.4f}"
        f"{patches}{agreement}"
    )
    if job.labelled is not None:
        more["quality"] = _qualities(source, found.model, job.labelled)
    mask = replace(mask, note={**mask.note, **_note(job)})
    save_compact(found.model, mask, job.output, record=trim_record(found, **more))


def _note(job: _Job) -> dict[str, str]:
    """Entries for the note of a mask."""
    found = {"images": str(len(job.images)), "seed": str(job.selection.seed)}
    return found if job.selection.data is None else {"data": job.selection.data, **found}


def _qualities(source: Source, small: Any, labelled: LabelledImages) -> dict[str, Any]:
    """Show the accuracies before and after, and return them for trim.json."""
    from ..pipeline.quality import measure_quality, predicted_classes

    dense = source.model
    classes = None if dense.architecture.head is None else predicted_classes(dense, labelled)
    before = measure_quality(dense, labelled, title="checking the dense model")
    after = measure_quality(
        small, labelled, title="checking the compact model", dense_classes=classes
    )
    names = {"top1": "top-1", "knn": "nearest neighbours", "linear": "linear probe"}
    parts = [
        f"{title} {_percent(before, name)} -> {_percent(after, name)}"
        for name, title in names.items()
        if getattr(after, name) is not None
    ]
    if after.agreement is not None:
        parts.append(f"same class on {_percent(after, 'agreement')}")
    show(f"{after.images} validation images: {', '.join(parts)}")
    return {"dense": asdict(before), "compact": asdict(after)}


def _percent(quality: Quality, name: str) -> str:
    return f"{100 * getattr(quality, name):.2f} %"


def _front(job: _Job) -> None:
    from ..pipeline.front import (
        FRONT,
        FRONT_FILE,
        PICTURE_FILE,
        FrontRequest,
        front_amounts,
        front_fingerprint,
        make_front,
    )
    from ..pipeline.trim_step import StageBars

    model, images, options = job.source.model, job.images, job.options
    selection, untrained, output = job.selection, job.untrained, job.output
    assert output.out is not None
    assert untrained.front is not None
    _, kind, smallest = untrained.budget
    amounts, shares = front_amounts(
        model, kind, smallest, untrained.front, LARGEST_SHARE, job.table, options.precision
    )
    data = selection.data or "its run"
    request = FrontRequest(kind, amounts, shares, job.source.name, data, _note(job), job.table)
    parts: tuple[object, ...] = (
        *(options.round_to, options.precision, selection.seed, untrained.check_images),
        *(untrained.keep_tokens, untrained.candidates, untrained.verify, untrained.peak_memory_mb),
        *(untrained.file_mb, untrained.verify_on, untrained.device),
        None if job.files is None else job.files.title,
    )
    if job.table is not None:
        parts = (*parts, job.table.costs_ms, job.table.correction.model_dump())
    if output.overwrite and (output.out / FRONT_FILE).is_file() and not untrained.resume:
        require_output_folder(output.out, FRONT, overwrite=True)
        clear_folder(output.out, FRONT_FILE)
    with StageBars(quiet=False) as bars:
        measure = _measure(job)
        known = (output.out / FRONT_FILE).is_file()
        front = make_front(
            partial(_cutter, job, bars, measure),
            request,
            output.out,
            dense=model,
            fingerprint=front_fingerprint(model, images, request, parts),
            labelled=job.labelled,
            dense_ms=None if measure is None or known else measure(model),
            show=_show_size,
        )
    show(_front_table(front))
    show(f"saved: {output.out}, picture: {output.out / PICTURE_FILE}")


def _cutter(job: _Job, bars: StageBars, measure: Measure | None) -> Cutter:
    """What cuts to each budget of a front."""
    from ..compress.oneshot.trim import predict, trim_to
    from ..pipeline.front import FrontCut
    from ..pipeline.latency_loop import cut_to_latency

    if job.table is not None:
        cuts = _latency_cuts(job, bars)

        def to_latency(amount: float) -> FrontCut:
            found, record = cut_to_latency(cuts, amount, measure)
            return FrontCut(found.trimmed, found.mask, record.measured_ms)

        return to_latency
    _, kind, _ = job.untrained.budget
    prediction = predict(
        job.source.model, job.images, options=job.options, resume=job.state, progress=bars
    )

    def to_budget(amount: float) -> FrontCut:
        found = trim_to(prediction, budget=amount, kind=kind, progress=bars)
        measured_ms = None if measure is None else measure(found.model)
        return FrontCut(found, found.mask, measured_ms)

    return to_budget


def _show_size(size: Size) -> None:
    name = size.folder or "dense"
    top1 = "" if size.top1 is None else f", top-1 {100 * size.top1:.2f} %"
    show(f"{name}: cosine to the dense features {size.cosine:.4f}{top1}")


def _front_table(front: Any) -> Any:
    from rich.table import Table

    from ..bench.report.front import columns

    table = Table(show_edge=False, pad_edge=False)
    shown = columns(front)
    for number, title in enumerate(shown):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for size in front.sizes:
        table.add_row(*(write(size) for write in shown.values()))
    return table
