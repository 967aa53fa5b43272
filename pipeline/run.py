"""The one chain: data, baseline, masks, cut, fine-tuning, artifacts, measurements, report.

Each step is f(previous value, recipe) -> value, saved in the run folder and skipped on resume when
it is whole and made from the same recipe.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..compress.data.loading import open_dataset
from ..compress.data.preprocessing import Preprocessing
from ..compress.data.splits import DataSplits
from ..compress.lift import lift
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import load
from ..compress.network.modules.model import CompactModel, build
from ..compress.network.patch_fit import shown
from ..compress.surgery.image_size import at_image_size
from ..core.console import status, unit_count
from ..core.storage import replace_file
from ..targets.catalog import load_target
from .artifacts import require_runtimes
from .final_table import final_table
from .recipe import Recipe
from .run_folder import RunFolder
from .shipping_steps import (
    ARTIFACTS,
    MEASUREMENTS,
    export_all,
    load_artifacts,
    load_measurements,
    measure_all,
    write_report,
)
from .source_model import image_of, preprocessing_of, source_model, weights_digest
from .training_steps import (
    BASELINE,
    COMPACT,
    CUT,
    CUT_PARITY,
    MASK,
    finetune,
    learn_masks,
    load_cut,
    mask_task,
    seed_weights,
    train_baseline,
)

Step = Literal["baseline", "masks", "finetune", "export", "bench", "report"]
STEPS: tuple[Step, ...] = ("baseline", "masks", "finetune", "export", "bench", "report")
DATA = "data.json"


@dataclass(frozen=True)
class Prepared:
    """What a run holds before it touches the disk: everything in the recipe that can be wrong has
    been tried.
    """

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
) -> RunFolder:
    """Run the chain up to and including the step `until`, in the folder `out`.

    Errors: InputError for anything in the recipe, the data or the model that cannot work, found
    before the folder is made.
    """
    last = STEPS.index(until)
    RunFolder.check(Path(out), resume=resume, overwrite=overwrite)
    prepared = prepare(recipe, quiet=quiet)
    folder = RunFolder.open(Path(out), resume=resume, overwrite=overwrite)
    replace_file(folder / "recipe.toml", recipe.toml())
    replace_file(folder / DATA, data_card(prepared.data, recipe))
    data, marks = prepared.data, fingerprints(prepared)

    baseline, made = folder.step(
        "baseline",
        marks["baseline"],
        [BASELINE],
        lambda again: train_baseline(
            prepared.dense, data, recipe, folder, resume=again, quiet=quiet
        ),
        lambda: load(folder / BASELINE),
    )
    _tell("baseline", baseline, made, quiet)
    _clear_checkpoints(folder, "baseline")
    if last < STEPS.index("masks"):
        return folder

    cut, made = folder.step(
        "masks",
        marks["masks"],
        [MASK, CUT, CUT_PARITY],
        lambda again: learn_masks(
            baseline, data, recipe, prepared.round_to, folder, resume=again, quiet=quiet
        ),
        lambda: load_cut(folder),
    )
    _tell("cut", cut.model, made, quiet)
    _clear_checkpoints(folder, "masks")
    if last < STEPS.index("finetune"):
        return folder

    compact, made = folder.step(
        "finetune",
        marks["finetune"],
        [COMPACT],
        lambda again: finetune(
            cut.model, baseline, data, recipe, folder, resume=again, quiet=quiet
        ),
        lambda: load(folder / COMPACT),
    )
    _tell("compact", compact, made, quiet)
    _clear_checkpoints(folder, "finetune")
    if last < STEPS.index("export"):
        return folder

    if recipe.export.image_size is not None:
        status(
            f"artifacts at {shown(recipe.export.image_size)}, trained at {shown(baseline.architecture.image[1:])}",
            quiet=quiet,
        )
        data = _data_of(recipe, _at_export_size(data.preprocessing, recipe), quiet=quiet)
    artifacts, _ = folder.step(
        "export",
        marks["export"],
        [ARTIFACTS],
        lambda _: export_all(baseline, compact, data, recipe, folder, quiet=quiet),
        lambda: load_artifacts(recipe, folder),
    )
    if last < STEPS.index("bench"):
        return folder

    measurements, _ = folder.step(
        "bench",
        marks["bench"],
        [MEASUREMENTS],
        lambda _: measure_all(artifacts, data, recipe, folder, quiet=quiet),
        lambda: load_measurements(recipe, folder),
    )
    # Cheap, and it follows the code that renders it, so it is always made anew.
    write_report(baseline, compact, cut, artifacts, measurements, data, recipe, folder)
    final_table(folder)
    return folder


def prepare(recipe: Recipe, *, quiet: bool = False) -> Prepared:
    """Open the data, build the dense model, and try the budget. Errors: InputError for whatever
    does not fit together.
    """
    target = load_target(recipe.export.target)
    require_runtimes(recipe.export)
    preprocessing = preprocessing_of(recipe.model, recipe.data.name, image_of(recipe.model))
    data = _data_of(recipe, preprocessing, quiet=quiet)
    seed_weights(recipe)
    dense = skipping(lift(source_model(recipe.model, data.classes)))
    if recipe.export.image_size is not None:
        at_image_size(dense.architecture, recipe.export.image_size)
    round_to = recipe.masks.round_to or target.round_to
    # Making the task tries the budget; the task itself is made again when its turn comes.
    mask_task(copy.deepcopy(dense), dense, data, recipe, round_to)
    return Prepared(recipe, data, dense, round_to)


def _data_of(recipe: Recipe, preprocessing: Preprocessing, *, quiet: bool) -> DataSplits:
    section = recipe.data
    return open_dataset(
        section.name,
        preprocessing=preprocessing,
        seed=section.seed,
        validation=section.validation,
        limit=section.limit,
        quiet=quiet,
    )


def _at_export_size(preprocessing: Preprocessing, recipe: Recipe) -> Preprocessing:
    """For the artifacts: what is measured on them is measured at their size."""
    height, width = recipe.export.image_size or preprocessing.image[1:]
    return preprocessing.model_copy(update={"height": height, "width": width})


def skipping(model: CompactModel) -> CompactModel:
    """The same network with `last_queries`: what the head cannot see is not computed. Exact, and
    what every artifact does, so MACs compare.
    """
    architecture = model.architecture.model_copy(
        update={"last_queries": model.architecture.pooled_prefix > 0}
    )
    return build(architecture, model.state_dict())


def fingerprints(prepared: Prepared) -> dict[str, str]:
    """What each step's value depends on: its sections of the recipe, the files named there, and the
    step before.
    """
    recipe = prepared.recipe
    marks: dict[str, str] = {}
    sections: dict[Step, tuple[str, ...]] = {
        "baseline": ("data", "model", "baseline", "train"),
        "masks": ("masks", "distill"),
        "finetune": ("finetune",),
        "export": ("export",),
        "bench": ("bench",),
    }
    # The target's good multiple may be what decides the widths, so it counts even where the recipe
    # does not name it.
    other = {"baseline": weights_digest(recipe.model), "masks": f"round_to {prepared.round_to}"}
    previous = ""
    for step, names in sections.items():
        previous = marks[step] = recipe.fingerprint(
            *names, previous=f"{previous} {other.get(step, '')}"
        )
    return marks


def data_card(data: DataSplits, recipe: Recipe) -> str:
    """data.json: what the run's models read and answer, for whoever exports or measures them
    later.
    """
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


def _tell(name: str, model: CompactModel, made: bool, quiet: bool) -> None:
    params, macs = count_params(model.architecture), count_macs(model.architecture)
    before = "" if made else "  (kept from before)"
    status(
        f"[bold]{name}[/bold]  {unit_count(params)} parameters, {unit_count(macs)} MACs{before}",
        quiet=quiet,
    )


def _clear_checkpoints(folder: RunFolder, phase: str) -> None:
    # The step's value is saved; its checkpoints are many times as large and have done their work.
    shutil.rmtree(folder / f"training/{phase}", ignore_errors=True)
    with contextlib.suppress(OSError):
        # Only once it is empty.
        (folder / "training").rmdir()
