"""The steps of `masks.method = "magnitude"`: zeros among weights, and what they let go exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..compress.masks.mask import StructuredMask
from ..compress.masks.weight_choice import WeightOptions, matrix_names, round_sparsities
from ..compress.masks.weight_mask import WeightMask, next_mask
from ..compress.network.architecture import Architecture, AttentionSpec, BranchSpec
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import save
from ..compress.network.modules.model import CompactModel
from ..compress.surgery.compactor import output_error
from ..compress.surgery.dead_weight import DeadWeight, find_dead
from ..compress.train.magnitude_task import MagnitudeTask
from ..compress.train.schedule import Schedule
from ..core.console import status, unit_count
from ..core.errors import InputError
from ..core.storage import replace_file
from ..core.written_kinds import json_object
from .masks_section import MasksSection
from .phases import (
    RunContext,
    dense_options,
    distillation,
    known_outputs,
    phase_settings,
    run_phase,
    size_metrics,
)
from .training_steps import PARITY_IMAGES, Cut, finetune, save_cut

WEIGHT_MASK = "weight-mask.safetensors"
# The fine-tuned network without what its zeros make dead, and the record of it.
EXACT, DEAD = "exact", "dead.json"
DEAD_SCHEMA = "vitrim.dead/1"


def weight_options(section: MasksSection, seed: int) -> WeightOptions:
    """How the weights of a run are chosen."""
    assert section.weight_sparsity is not None
    return WeightOptions(
        section.weight_sparsity,
        section.weight_granularity or "weight",
        section.weight_ranking or "global",
        section.weight_scope or "all",
        seed,
    )


def require_weights(architecture: Architecture, section: MasksSection) -> None:
    """Check that the network has matrices in the scope.

    Raises:
        InputError: It has none.
    """
    try:
        matrix_names(architecture, section.weight_scope or "all")
    except InputError as error:
        raise InputError(f"masks.weight_{error}") from None


def magnitude_cut(
    baseline: CompactModel, round_to: int, context: RunContext, *, resume: bool
) -> Cut:
    """Choose the mask of single weights, in rounds of training where the recipe has several.

    Args:
        baseline: The trained dense model; it is also the teacher.
        round_to: Not used: no unit is removed.
        context: The run. Its folder receives weight-mask.safetensors, cut/ and cut-parity.json.
        resume: Continue from the training checkpoint of an earlier attempt.

    Returns:
        The baseline with its zeros. Its mask of units keeps everything.
    """
    del round_to
    section, seed = context.recipe.masks, context.recipe.train.seed
    options = weight_options(section, seed)
    model = copy.deepcopy(baseline)
    if section.rounds == 1:
        mask = next_mask(model, options)
        mask.apply(model)
    else:
        mask = _in_rounds(model, baseline, options, context, resume=resume)
    status(
        f"{unit_count(mask.zeros)} of {unit_count(mask.total)} weights are zero, "
        f"{100 * mask.sparsity:.2f} %",
        quiet=context.quiet,
    )
    images = context.data.val.floats(slice(0, PARITY_IMAGES))
    error = output_error(mask.zeroed(model), model, images)
    cut = Cut(model.eval(), StructuredMask({}, scale="original"), error)
    if context.writes:
        mask.save(context.folder / WEIGHT_MASK)
        save_cut(cut, context.folder)
    return cut


def _in_rounds(
    model: CompactModel,
    baseline: CompactModel,
    options: WeightOptions,
    context: RunContext,
    *,
    resume: bool,
) -> WeightMask:
    """Prune and train the model in place, and return its last mask."""
    recipe, section = context.recipe, context.recipe.masks
    known = known_outputs(baseline, context, section.augmentation, model)
    task = MagnitudeTask(
        model,
        options,
        round_sparsities(options.sparsity, section.rounds),
        section.epochs,
        lr=section.lr,
        weight_decay=section.weight_decay,
        label_smoothing=recipe.train.label_smoothing,
        distillation=distillation(baseline, recipe, known),
        metrics=size_metrics(model),
        optimizer=recipe.train.optimizer,
        options=dense_options(recipe.train, model),
    )
    schedule = Schedule("restarts", restart_epochs=section.epochs, rewind=section.weight_rewind)
    epochs = section.round_epochs
    settings = phase_settings(context, epochs, section.augmentation, schedule, None)
    run_phase(task, context, settings, resume)
    return task.mask


def finetune_zeroed(
    cut: CompactModel, baseline: CompactModel, context: RunContext, *, resume: bool
) -> CompactModel:
    """Train a copy of the network with its zeros, which stay, as `finetune`.

    Args:
        cut: The result of `magnitude_cut`.
        baseline: The dense model, used as the teacher.
        context: The run. Its folder receives compact/, exact/ and dead.json.
        resume: Continue from the training checkpoint of an earlier attempt.

    Returns:
        The model of unchanged shapes in eval mode.
    """
    mask = WeightMask.load(context.folder / WEIGHT_MASK)
    model = finetune(cut, baseline, context, resume=resume, weights=mask)
    if context.writes:
        _save_exact(model, mask, context)
    return model


def _save_exact(compact: CompactModel, mask: WeightMask, context: RunContext) -> None:
    """Remove the dead weight of the fine-tuned network; writes exact/ and dead.json."""
    dead = find_dead(compact)
    save(dead.compact.eval(), context.folder / EXACT, overwrite=True)
    record = dead_record(compact, dead, mask)
    replace_file(context.folder / DEAD, json.dumps(record, indent=1) + "\n")
    status(
        f"removed exactly: {record['params'] - record['params_exact']:,} of "
        f"{record['params']:,} parameters, {record['heads_dead']} of {record['heads']} heads",
        quiet=context.quiet,
    )


def dead_record(compact: CompactModel, dead: DeadWeight, mask: WeightMask) -> dict[str, Any]:
    """The contents of dead.json.

    Args:
        compact: The network with its zeros.
        dead: Its dead weight.
        mask: The mask of its weights.

    Returns:
        `sparsity` and `zeros` of `weights` in scope, `params` and `macs` before and after the exact
        removal (`_exact`), dead `heads`, `units` of FFNs and `channels` of the stream with their
        totals, the `error` of the removal, `rows` (one for each sub-layer) and `note`, how the mask
        was chosen.
    """
    before, after = compact.architecture, dead.compact.architecture
    rows = [
        _row(branch, f"steps.{number}.{position}.", mask, dead)
        for number, step in enumerate(before.steps)
        for position, branch in enumerate(step)
    ]
    embed = dead.mask.get("embed", "head.in")
    return {
        "schema": DEAD_SCHEMA,
        "weights": mask.total,
        "zeros": mask.zeros,
        "sparsity": mask.sparsity,
        "params": count_params(before),
        "params_exact": count_params(after),
        "macs": count_macs(before),
        "macs_exact": count_macs(after),
        "heads": sum(row["units"] for row in rows if row["kind"] == "heads"),
        "heads_dead": sum(row["dead"] for row in rows if row["kind"] == "heads"),
        "units": sum(row["units"] for row in rows if row["kind"] == "units"),
        "units_dead": sum(row["dead"] for row in rows if row["kind"] == "units"),
        "channels": before.embed,
        "channels_dead": 0 if embed is None else int((~embed).sum()),
        "error": dead.error,
        "rows": rows,
        "note": dict(mask.note),
    }


def _row(branch: BranchSpec, prefix: str, mask: WeightMask, dead: DeadWeight) -> dict[str, Any]:
    """The zeros of a sub-layer, and its dead heads or units."""
    inside = [keep for name, keep in mask.kept.items() if name.startswith(prefix)]
    total = sum(keep.numel() for keep in inside)
    zeros = total - sum(int(keep.sum()) for keep in inside)
    core, attention = branch.core, isinstance(branch.core, AttentionSpec)
    units = core.heads if isinstance(core, AttentionSpec) else getattr(core, "hidden", 0)
    gone = dead_units(dead.mask, branch.name, heads=attention)
    return {
        "name": branch.name,
        "kind": "heads" if attention else "units",
        "zeros": zeros / total if total else 0.0,
        "units": units,
        "dead": len(gone),
        # The numbers of heads are few, and shown.
        **({"heads": gone} if attention else {}),
    }


def dead_units(mask: StructuredMask, site: str, *, heads: bool) -> list[int]:
    """The dead heads of an attention, or dead units of an FFN, by number."""
    keep = mask.get("head" if heads else "ffn", site)
    return [] if keep is None else [place for place, kept in enumerate(keep.tolist()) if not kept]


def read_dead(folder: Path) -> dict[str, Any] | None:
    """The contents of dead.json of a run folder; None where there is none."""
    path = folder / DEAD
    if not path.is_file():
        return None
    record = json_object(path)
    if record is None or record.get("schema") != DEAD_SCHEMA:
        raise InputError(
            f"{path}: not a record of dead weight (expected schema {DEAD_SCHEMA!r}); run again "
            "with --resume after deleting it"
        )
    return record
