"""The embedded baseline: its card describes the file of weights correctly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import load_file
from vitrim.compress.data.embedded import WEIGHTS, embedded_card
from vitrim.compress.data.loading import open_dataset
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.train.evaluate import evaluate
from vitrim.core.errors import InputError
from vitrim.core.storage import sha256_file
from vitrim.pipeline.recipe import load_recipe


def test_the_card_describes_the_weights() -> None:
    card = embedded_card()
    assert WEIGHTS.stat().st_size <= 3 * 10**6
    assert sha256_file(WEIGHTS) == card["sha256"]
    model = timm.create_model(card["model"], **card["overrides"])
    model.load_state_dict(load_file(WEIGHTS))
    assert sum(parameter.numel() for parameter in model.parameters()) == card["params"]
    data = open_dataset(
        "quickstart", preprocessing=Preprocessing.model_validate(card["preprocessing"])
    )
    assert list(data.labels) == card["labels"]
    few = data.test.select(np.arange(600))
    # Within four standard deviations of the accuracy on all 3,000 in the card.
    assert abs(evaluate(model, few) / 100 - card["quickstart_test_top1"]) < 0.05
    assert card["test_top1"] >= 0.90


def test_the_recipes_in_the_card_exist() -> None:
    for name, epochs in zip(embedded_card()["recipes"], embedded_card()["epochs"], strict=True):
        assert load_recipe(name).baseline.epochs == epochs


def test_a_package_without_the_baseline_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "vitrim.compress.data.embedded.WEIGHTS", tmp_path / "quickstart_vit.safetensors"
    )
    with pytest.raises(InputError, match="the embedded baseline is missing; install vitrim again"):
        embedded_card()
