"""The model that `vitrim compact` cuts, and the images that belong to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from .compact_options import ModelOptions, Selection
from .model_data import CARD, ModelData, model_data, read_card

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..compress.network.modules.model import CompactModel
    from ..pipeline.recipe_sections import ModelSection


@dataclass(frozen=True)
class Source:
    """The model to cut, with the card of its run or its recipe section, which name its images."""

    model: CompactModel
    card: dict[str, Any] | None = None
    section: ModelSection | None = None
    name: str = "the model"


def load_source(options: ModelOptions) -> Source:
    """Load the model of the options.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    from ..compress.lift import lift
    from ..pipeline.checkpoint_file import require_no_graph
    from ..pipeline.source_model import classes_in, load_folder, require_saved, source_model

    checkpoint = options.source or options.checkpoint
    if checkpoint is None and not options.pretrained:
        raise InputError("no model: name MODEL or --checkpoint, or --model with --pretrained")
    if checkpoint is not None and checkpoint.is_dir():
        require_saved(checkpoint)
        card = read_card(checkpoint.parent / CARD)
        return Source(load_folder(checkpoint), card, name=str(checkpoint))
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
    return Source(lift(source_model(section, classes)), section=section, name=options.model)


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


def data_of(source: Source, selection: Selection, option: str) -> ModelData:
    """The data set of `--data` or of the run that contains the model.

    Raises:
        InputError: There is neither; the message names `option`, which needs it.
    """
    from ..pipeline.source_model import EMBEDDED, preprocessing_of

    architecture = source.model.architecture
    data = model_data(source.card, selection.data, architecture.image, architecture.data)
    if data is None:
        raise InputError(
            f"{option} needs images: name them with --data, e.g. "
            "--data fashion-mnist or --data imagefolder:PATH"
        )
    section = source.section
    if section is None or not (section.pretrained or section.checkpoint == EMBEDDED):
        return data
    found = preprocessing_of(section, data.name, architecture.image)
    return replace(data, preprocessing=found)


def unlabeled_images(data: ModelData, selection: Selection) -> Tensor:
    """The images of `--data` and `--samples`, (images, channels, height, width), normalized."""
    from ..compress.data.loading import open_unlabeled

    return open_unlabeled(
        data.name,
        selection.samples,
        preprocessing=data.preprocessing,
        draw_seed=selection.seed,
        quiet=False,
        **data.division,
    ).floats()
