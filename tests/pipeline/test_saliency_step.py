"""The chain with widths by a ranking of weights, at random, and by control coefficients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vitrim
from photo_folder import write_photos, write_recipe
from vitrim.compress.network.count import count_params
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import run


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranked")
    write_photos(folder / "photos")
    return write_recipe(folder / "tiny.toml", folder / "photos", masks_epochs=1)


@pytest.mark.parametrize("method", ["l1", "random", "vtp"])
def test_the_budget_is_met_and_the_cut_is_exact(recipe_file: Path, method: str) -> None:
    folder = recipe_file.parent / method
    sets = (f'masks.method="{method}"', "masks.params=0.5", "masks.round_to=2")
    run(load_recipe(recipe_file, sets), folder, until="finetune", quiet=True)
    dense, cut = vitrim.load(folder / "baseline"), vitrim.load(folder / "cut")
    spent = count_params(cut.architecture) / count_params(dense.architecture)
    assert 0.4 < spent <= 0.5
    assert json.loads((folder / "cut-parity.json").read_text())["max_relative_error"] < 1e-5
    mask = vitrim.StructuredMask.load(folder / "mask.safetensors")
    assert mask.scale == "original"
    phases = [json.loads(line)["phase"] for line in (folder / "history.jsonl").open()]
    assert phases == ["baseline"] * 2 + ["masks"] * (method == "vtp") + ["finetune"]
    if method != "vtp":
        # Exactly the units of the baseline, so that its weights are the criterion.
        assert torch.isin(cut.state_dict()["head.weight"], dense.state_dict()["head.weight"]).all()


def test_a_budget_of_everything_keeps_the_network(recipe_file: Path) -> None:
    sets = ('masks.method="l2"', "masks.params=1.0", "finetune.epochs=0")
    folder = recipe_file.parent / "whole"
    run(load_recipe(recipe_file, sets), folder, until="finetune", quiet=True)
    dense, compact = (vitrim.load(folder / name) for name in ("baseline", "compact"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(dense(images), compact(images))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (['masks.method="l1"', "masks.params=0.0001"], "not feasible"),
        (['masks.method="l2"', "masks.lambda=1e-7"], 'method = "l2" needs a budget'),
        (['masks.method="vtp"', 'masks.sharing="unshared"'], 'method = "vtp" needs sharing ='),
        (["masks.sparsity=0.1"], 'sparsity is of method = "vtp"; "learned" has none'),
        (
            ['masks.method="vtp"', 'masks.tokens="evit"'],
            'method = "vtp" chooses widths alone; leave `tokens` out',
        ),
    ],
)
def test_what_does_not_fit_is_refused(recipe_file: Path, sets: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(load_recipe(recipe_file, sets), recipe_file.parent / "refused", quiet=True)
    assert message in str(caught.value)
