"""The chain: data, baseline, masks, cut, fine-tuning, artifacts, measurements, report.

Each step is f(previous value, recipe) -> value. Its value is saved in the run folder. A resumed run
skips a step if its files are complete and made from the same recipe.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..compress.data.loading import open_dataset
from ..compress.data.preprocessing import Preprocessing
from ..compress.data.splits import DataSplits
from ..compress.lift import lift
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import load
from ..compress.network.modules.model import CompactModel
from ..compress.network.named_outputs import output_specs
from ..compress.network.patch_grid import format_image_size
from ..compress.surgery.image_size import at_image_size
from ..compress.train.processes import require_shares
from ..core.console import status, unit_count
from ..core.errors import InputError
from ..core.staging import only_writer
from ..core.storage import replace_file
from ..targets.catalog import load_target
from .artifacts import require_processor, require_runtimes
from .bench_device import require_device
from .bucket_step import bucket_mark, calibrated, require_bucket_artifacts
from .budget_reach import require_budget, show_slack
from .final_table import show_final_table
from .latency_table import optional_table, show_reach, table_mark
from .magnitude_step import (
    DEAD,
    EXACT,
    WEIGHT_MASK,
    finetune_zeroed,
    magnitude_cut,
    require_weights,
)
from .masks_section import RANKING
from .phases import HISTORY, RunContext
from .recipe import Recipe
from .run_folder import RunFolder
from .saliency_step import require_ranking
from .selection_step import require_counts, require_selections
from .selection_training import learn_selections
from .shipping_steps import (
    ARTIFACTS,
    MEASUREMENTS,
    TrainedModels,
    export_all,
    load_artifacts,
    load_measurements,
    measure_all,
    write_report,
)
from .source_model import (
    image_of,
    preprocessing_of,
    require_trained_head,
    source_model,
    weights_digest,
    with_last_queries,
    with_preprocessing,
)
from .token_step import require_tokens
from .training_host import followed, tracked, training_host
from .training_steps import (
    BASELINE,
    COMPACT,
    CUT,
    CUT_PARITY,
    MASK,
    Cut,
    finetune,
    learn_masks,
    load_cut,
    mask_task,
    seed_weights,
    train_baseline,
)
from .trim_step import start_section

Step = Literal["baseline", "masks", "finetune", "export", "bench", "report"]
STEPS: tuple[Step, ...] = ("baseline", "masks", "finetune", "export", "bench", "report")
DATA = "data.json"


@dataclass(frozen=True)
class Prepared:
    """What a run needs before it writes any file; everything in the recipe has been validated."""

    recipe: Recipe
    data: DataSplits
    dense: CompactModel
    round_to: int


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    until: Step = "report",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    recipe_file: Path | None = None,
    json_progress: bool = False,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
) -> RunFolder:
    """Run the chain. Of several processes of a launcher, all train and the main one does the rest.

    Args:
        recipe: All settings.
        out: The run folder; it is created.
        until: The last step to run.
        resume: Continue the run in the folder; complete steps are loaded.
        overwrite: Delete the run in the folder and start again.
        quiet: Print the final table only.
        recipe_file: The file of the recipe, which the run must not overwrite. A resumed run may
            use the recipe in its own folder.
        json_progress: Write one JSON line for each epoch to standard output, in place of the table.
        on_epoch: Called after each epoch with its line in history.jsonl; an exception ends the
            run there, with its checkpoint written.

    Returns:
        The run folder.

    Raises:
        InputError: The recipe, the data and the model do not fit together, the folder contains
            something else, or another process runs in it. Nothing is written then.
    """
    out = Path(out)
    with contextlib.ExitStack() as locks:
        inputs = {**recipe.inputs(), "the recipe": None if resume else recipe_file}
        host = training_host(recipe, json_progress=json_progress)
        processes, quiet = host.processes, quiet or not host.processes.is_main
        # The main process reports what is wrong, and others read what it decoded.
        with processes.main_first():
            there = processes.is_main and out.is_dir()
            if there:
                locks.enter_context(only_writer(out))
            if processes.is_main:
                RunFolder.check(out, resume=resume, overwrite=overwrite, inputs=inputs)
            prepared = prepare(recipe, quiet=quiet)
            require_shares(recipe.train.batch_size, len(prepared.data.train), processes.count)
            marks = fingerprints(prepared)
            if processes.is_main:
                require_device(recipe, until, out if resume else None, marks, quiet=quiet)
            folder = RunFolder.open(out, resume=resume, overwrite=overwrite, processes=processes)
            if processes.is_main and not there:
                locks.enter_context(only_writer(out))
            if processes.is_main:
                replace_file(folder / "recipe.toml", recipe.toml())
                replace_file(folder / DATA, data_card(prepared.data, recipe))
        if host.note is not None:
            status(host.note, quiet=quiet)
        host = tracked(host, recipe, folder.path, folder / HISTORY)
        host = followed(host, on_epoch)
        context = RunContext(recipe, prepared.data, folder, quiet, host)
        try:
            models = _train_steps(prepared, context, until, marks)
            processes.close()
        finally:
            host.finish()
        if models is not None and processes.is_main:
            _ship_steps(models, context, until, marks, show_table=not json_progress)
        return folder


def _train_steps(
    prepared: Prepared, context: RunContext, until: Step, marks: dict[str, str]
) -> TrainedModels | None:
    """The three trainings; None if the run ends with one of them."""
    baseline = _baseline(prepared, context, marks["baseline"])
    if until == "baseline":
        return None
    cut = _cut(baseline, prepared.round_to, context, marks["masks"])
    if until == "masks":
        return None
    require_counts(cut.model.architecture, context.recipe.masks)
    compact = _compact(cut, baseline, context, marks["finetune"])
    buckets = calibrated(compact, context, marks["finetune"])
    if until == "finetune":
        return None
    exact = None
    if context.recipe.masks.method == "magnitude":
        exact = load(context.folder / EXACT)
        _report_model("exact", exact, made=True, quiet=context.quiet)
    return TrainedModels(baseline, compact, cut.max_relative_error, exact, buckets)


def _ship_steps(
    models: TrainedModels,
    context: RunContext,
    until: Step,
    marks: dict[str, str],
    *,
    show_table: bool,
) -> None:
    """Artifacts, measurements and the report."""
    recipe, folder = context.recipe, context.folder
    context = _at_export_size(context, models.baseline)
    artifacts, _ = folder.step(
        "export",
        marks["export"],
        [ARTIFACTS],
        lambda _: export_all(models, context),
        lambda: load_artifacts(recipe, folder),
    )
    if until == "export":
        return
    measurements, _ = folder.step(
        "bench",
        marks["bench"],
        [MEASUREMENTS],
        lambda _: measure_all(artifacts, context),
        lambda: load_measurements(recipe, folder),
    )
    if until == "bench":
        return
    # Rendering is cheap and its code changes, so the report is always written again.
    write_report(models, artifacts, measurements, context)
    if show_table:
        show_final_table(folder)


def _baseline(prepared: Prepared, context: RunContext, fingerprint: str) -> CompactModel:
    folder = context.folder
    baseline, made = folder.step(
        "baseline",
        fingerprint,
        [BASELINE],
        lambda resume: train_baseline(prepared.dense, context, resume=resume),
        lambda: load(folder / BASELINE),
        by_all=True,
    )
    _report_model("baseline", baseline, made, context.quiet)
    _remove_checkpoints(folder, "baseline")
    return baseline


def _cut(baseline: CompactModel, round_to: int, context: RunContext, fingerprint: str) -> Cut:
    folder, section = context.folder, context.recipe.masks
    learn, files = learn_masks, [MASK, CUT, CUT_PARITY]
    if section.method == "magnitude":
        learn, files = magnitude_cut, [*files, WEIGHT_MASK]
    elif section.selects_tokens:
        learn = learn_selections
    cut, made = folder.step(
        "masks",
        fingerprint,
        files,
        lambda resume: learn(baseline, round_to, context, resume=resume),
        lambda: load_cut(folder),
        by_all=section.trains_widths or section.rounds > 1,
    )
    _report_model("cut", cut.model, made, context.quiet)
    for phase in ("tokens", "masks"):
        _remove_checkpoints(folder, phase)
    return cut


def _compact(
    cut: Cut, baseline: CompactModel, context: RunContext, fingerprint: str
) -> CompactModel:
    folder = context.folder
    zeroed = context.recipe.masks.method == "magnitude"
    train = finetune_zeroed if zeroed else finetune
    files = [COMPACT, EXACT, DEAD] if zeroed else [COMPACT]
    compact, made = folder.step(
        "finetune",
        fingerprint,
        files,
        lambda resume: train(cut.model, baseline, context, resume=resume),
        lambda: load(folder / COMPACT),
        by_all=True,
    )
    _report_model("compact", compact, made, context.quiet)
    _remove_checkpoints(folder, "finetune")
    return compact


def prepare(recipe: Recipe, *, quiet: bool = False) -> Prepared:
    """Open the data, build the dense model and check the budget.

    Raises:
        InputError: Something in the recipe does not fit together.
    """
    require_trained_head(recipe.model, recipe.baseline.epochs)
    target = load_target(recipe.export.target)
    require_bucket_artifacts(recipe)
    require_runtimes(recipe.export)
    require_processor(recipe.export)
    preprocessing = preprocessing_of(
        recipe.model, recipe.data.name, image_of(recipe.model), recipe.data.resize
    )
    data = _open_data(recipe, preprocessing, quiet=quiet)
    seed_weights(recipe)
    dense = with_last_queries(lift(source_model(recipe.model, data.classes)))
    dense = with_preprocessing(dense, preprocessing)
    if recipe.export.image_size is not None:
        at_image_size(dense.architecture, recipe.export.image_size)
    output_specs(dense.architecture, recipe.export.outputs, "export.outputs")
    round_to = recipe.masks.round_to or target.round_to
    require_tokens(dense.architecture, recipe.masks)
    start = require_selections(dense, recipe)
    table = optional_table(recipe, dense.architecture)
    if table is not None:
        show_reach(recipe, dense.architecture, table, quiet=quiet)
        show_slack(recipe, dense.architecture, table, quiet=quiet)
    if recipe.masks.method == "closed-form":
        require_budget(dense.architecture, recipe.masks, table, round_to=round_to)
    elif recipe.masks.method == "magnitude":
        require_weights(dense.architecture, recipe.masks)
    elif recipe.masks.method in RANKING:
        require_ranking(dense.architecture, recipe.masks)
    elif recipe.masks.width_epochs:
        # Creating the task checks the budget; mask learning creates another one.
        mask_task(dense, data, recipe, round_to, start=start)
        if recipe.masks.start == "one-shot":
            require_budget(dense.architecture, start_section(recipe.masks))
    return Prepared(recipe, data, dense, round_to)


def _open_data(recipe: Recipe, preprocessing: Preprocessing, *, quiet: bool) -> DataSplits:
    section, masks = recipe.data, recipe.masks
    chosen = masks.chooses_tokens
    if section.streaming and (chosen or masks.method == "closed-form" or masks.start == "one-shot"):
        raise InputError(
            "data.streaming: a closed-form cut and a choice of tokens read single training images, "
            "which a stream does not have; leave streaming out, or learn the masks from the dense "
            "network"
        )
    return open_dataset(
        section.name,
        preprocessing=preprocessing,
        seed=section.seed,
        validation=section.validation,
        limit=section.limit,
        cache_gb=section.cache_gb,
        streaming=section.streaming,
        on_error=section.on_error,
        quiet=quiet,
    )


def _at_export_size(context: RunContext, baseline: CompactModel) -> RunContext:
    """The context with the data resized to the artifacts, which are measured at their size."""
    recipe, quiet, size = context.recipe, context.quiet, context.recipe.export.image_size
    if size is None:
        return context
    trained = format_image_size(baseline.architecture.image[1:])
    status(f"artifacts at {format_image_size(size)}, trained at {trained}", quiet=quiet)
    resized = {"height": size[0], "width": size[1]}
    preprocessing = context.data.preprocessing.model_copy(update=resized)
    return replace(context, data=_open_data(recipe, preprocessing, quiet=quiet))


def fingerprints(prepared: Prepared) -> dict[str, str]:
    """Hash what each step depends on.

    That is its sections of the recipe, the files named there, and the step before.
    """
    return recipe_fingerprints(prepared.recipe, prepared.round_to)


def recipe_fingerprints(
    recipe: Recipe, round_to: int | None = None, weights: str | None = None
) -> dict[str, str]:
    """The hashes of `fingerprints` without opening the data.

    Args:
        recipe: All settings.
        round_to: Kept widths are multiples of this (default: as in the recipe, or the target's).
        weights: `weights_digest` of the model (default: computed).

    Returns:
        Step -> hash. Runs with equal hashes of a step have the same result of it.

    Raises:
        InputError: The checkpoint or the target cannot be read.
    """
    sections: dict[Step, tuple[str, ...]] = {
        "baseline": ("data", "model", "baseline", "train"),
        "masks": ("masks", "distill"),
        "finetune": ("finetune",),
        "export": ("export",),
        "bench": ("bench",),
    }
    target = load_target(recipe.export.target)
    round_to = round_to or recipe.masks.round_to or target.round_to
    # The target's preferred multiple may determine the widths, so it counts even where the recipe
    # does not set it; `host` is another target on every machine.
    other = {
        "baseline": weights_digest(recipe.model) if weights is None else weights,
        "masks": f"round_to {round_to}{table_mark(recipe)}",
        "export": " ".join(target.features) + bucket_mark(recipe.masks),
    }
    marks: dict[str, str] = {}
    previous = ""
    for step, names in sections.items():
        previous = recipe.fingerprint(*names, previous=f"{previous} {other.get(step, '')}")
        marks[step] = previous
    return marks


def data_card(data: DataSplits, recipe: Recipe) -> str:
    """The contents of data.json: inputs and labels of the run's models, for later commands."""
    card = {
        "schema": "vitrim.data/1",
        "name": data.name,
        "labels": list(data.labels),
        "seed": recipe.data.seed,
        "validation": recipe.data.validation,
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "preprocessing": data.preprocessing.model_dump(mode="json"),
    }
    return json.dumps(card, indent=1) + "\n"


def _report_model(name: str, model: CompactModel, made: bool, quiet: bool) -> None:
    params, macs = count_params(model.architecture), count_macs(model.architecture)
    loaded = "" if made else "  (loaded from the run folder)"
    status(
        f"[bold]{name}[/bold]  {unit_count(params)} parameters, {unit_count(macs)} MACs{loaded}",
        quiet=quiet,
    )


def _remove_checkpoints(folder: RunFolder, phase: str) -> None:
    if not folder.processes.is_main:
        return
    # The step's value is saved; its checkpoints are many times larger and no longer needed.
    shutil.rmtree(folder / f"training/{phase}", ignore_errors=True)
    with contextlib.suppress(OSError):
        # Fails unless the folder is empty.
        (folder / "training").rmdir()
