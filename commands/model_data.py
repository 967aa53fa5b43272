"""Which images belong to a saved model: those of the run that it lies in, or those that the command
line names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..core.errors import InputError

if TYPE_CHECKING:
    from ..compress.data.preprocessing import Preprocessing

CARD = "data.json"


@dataclass(frozen=True)
class ModelData:
    """A data set's name, how its pictures become the model's inputs, and `seed` and `validation` of
    its division where a run fixed them.
    """

    name: str
    preprocessing: Preprocessing
    division: dict[str, Any]


def read_card(path: Path) -> dict[str, Any] | None:
    """data.json of the run that a model lies in, if it lies in one. Errors: InputError naming the
    file.
    """
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); run the recipe again with --resume"
        ) from error
    if not isinstance(card, dict) or card.get("schema") != "vitrim.data/1":
        raise InputError(f"{path}: not a vitrim.data/1 file; run the recipe again with --resume")
    return card


def model_data(
    card: dict[str, Any] | None, named: str | None, image: tuple[int, int, int]
) -> ModelData | None:
    """The data set `named`, or else the run's own; None where neither is known. Errors: InputError
    for an unknown name or a broken card.
    """
    from ..compress.data.named_datasets import default_preprocessing
    from ..compress.data.preprocessing import Preprocessing

    name = named or (card["name"] if card else None)
    if name is None:
        return None
    if card is None or named not in (None, card["name"]):
        return ModelData(name, default_preprocessing(name, image), {})
    try:
        preprocessing = Preprocessing.model_validate(card["preprocessing"])
    except (ValidationError, KeyError) as error:
        raise InputError(
            f"{CARD}: its preprocessing cannot be read ({error}); run the recipe again with --resume"
        ) from error
    # The run's own division, so that images which it held out stay held out.
    return ModelData(
        name, preprocessing, {key: card[key] for key in ("seed", "validation") if key in card}
    )
