"""The trained baseline that ships with the package: which model it is, and how it was made.
Torch-free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.errors import InputError

WEIGHTS = Path(__file__).with_name("quickstart_vit.safetensors")
CARD = Path(__file__).with_name("quickstart_vit.json")


def embedded_card() -> dict[str, Any]:
    """The card beside the weights: `model` (timm name), `overrides`, `preprocessing`, `recipes`,
    `val_top1`, `test_top1` (shares of one, measured from the stored file), where and how it was
    made.

    Errors: InputError if the package lacks them.
    """
    if not WEIGHTS.is_file():
        raise InputError(f"{WEIGHTS}: the shipped baseline is missing; install vitrim again")
    try:
        card = json.loads(CARD.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{CARD}: the shipped baseline's card cannot be read ({error}); install vitrim again"
        ) from error
    if not isinstance(card, dict):
        raise InputError(
            f"{CARD}: the shipped baseline's card is not a table; install vitrim again"
        )
    return card
