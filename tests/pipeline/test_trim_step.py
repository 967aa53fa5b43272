"""The chain with `masks.method = "closed-form"`: no mask is learned, and the cut is compensated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vitrim
from photo_folder import write_photos, write_recipe
from tiny_models import relative_error
from vitrim.compress.network.count import count_params
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import run

CLOSED_FORM = ['masks.method="closed-form"', "masks.round_to=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("closed-form")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", "")
    recipe = load_recipe(folder / "tiny.toml", CLOSED_FORM)
    run(recipe, folder / "run", until="finetune", quiet=True)
    return folder / "run"


def test_the_budget_is_met_without_an_epoch_of_mask_learning(finished: Path) -> None:
    dense, cut = vitrim.load(finished / "baseline"), vitrim.load(finished / "cut")
    share = load_recipe(finished / "recipe.toml").masks.params
    assert share is not None
    assert count_params(cut.architecture) <= share * count_params(dense.architecture)
    phases = {json.loads(line)["phase"] for line in (finished / "history.jsonl").open()}
    assert phases == {"baseline", "finetune"}


def test_the_rotated_network_equals_the_baseline_and_the_mask_fits_it(finished: Path) -> None:
    dense, rotated = vitrim.load(finished / "baseline"), vitrim.load(finished / "rotated")
    images = torch.randn(4, *dense.architecture.image)
    with torch.no_grad():
        assert relative_error(rotated.eval()(images), dense.eval()(images)) < 1e-4
    mask = vitrim.StructuredMask.load(finished / "mask.safetensors")
    cut, exact = vitrim.load(finished / "cut"), vitrim.compact(rotated, mask)
    assert [branch.core.kind for branch in cut.architecture.branches] == [
        branch.core.kind for branch in exact.architecture.branches
    ]
    parity = json.loads((finished / "cut-parity.json").read_text())
    assert parity["max_relative_error"] < 1e-5


def test_the_record_names_prediction_check_and_every_refit(finished: Path) -> None:
    record = json.loads((finished / "trim.json").read_text())
    assert record["schema"] == "vitrim.trim/1"
    assert record["predicted_error"] > 0
    assert record["check"]["images"] >= 1
    assert all(fit["after"] <= fit["before"] for fit in record["fits"])
    cut = vitrim.load(finished / "cut")
    assert {fit["branch"] for fit in record["fits"]} == {
        branch.name for branch in cut.architecture.branches if branch.core.kind != "constant"
    }


def test_a_budget_below_stem_and_head_is_refused_before_any_training(finished: Path) -> None:
    recipe = load_recipe(finished.parent / "tiny.toml", [*CLOSED_FORM, "masks.params=0.01"])
    with pytest.raises(InputError, match=r"masks.params = 0.01: the stem and the head"):
        run(recipe, finished.parent / "refused", quiet=True)
    assert not (finished.parent / "refused").exists()


def test_a_closed_form_needs_a_budget(finished: Path) -> None:
    with pytest.raises(InputError, match=r'"closed-form" needs a budget'):
        load_recipe(finished.parent / "tiny.toml", [*CLOSED_FORM, "masks.lambda=1e-7"])
