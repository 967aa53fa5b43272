"""The chain with `masks.tokens`: tokens are chosen before widths, or alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import vitrim
from photo_folder import write_photos, write_recipe
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.tokens.choose import METHODS
from vitrim.core.errors import InputError
from vitrim.pipeline.masks_section import SELECTING, TokenMethod
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import run, with_last_queries

TOKENS = ('masks.tokens="patch-slimming"', "masks.token_macs=0.7")
CLOSED_FORM = ('masks.method="closed-form"', "masks.round_to=2")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", "")
    return folder / "tiny.toml"


def trained(recipe_file: Path, name: str, *sets: str) -> Path:
    folder = recipe_file.parent / name
    run(load_recipe(recipe_file, sets), folder, until="finetune", quiet=True)
    return folder


def macs(folder: Path) -> int:
    return count_macs(with_last_queries(vitrim.load(folder)).architecture)


def test_tokens_alone_keep_every_parameter_but_positions(recipe_file: Path) -> None:
    folder = trained(recipe_file, "alone", *TOKENS, *CLOSED_FORM, "masks.params=1.0")
    dense, cut = vitrim.load(folder / "baseline"), vitrim.load(folder / "cut")
    assert macs(folder / "cut") <= 0.7 * macs(folder / "baseline")
    lost = count_params(dense.architecture) - count_params(cut.architecture)
    gone = dense.architecture.patches - cut.architecture.patches
    assert lost == gone * dense.architecture.embed
    record = json.loads((folder / "tokens.json").read_text())
    assert record["method"] == "patch-slimming"
    assert json.loads((folder / "cut-parity.json").read_text())["max_relative_error"] < 1e-5
    assert vitrim.load(folder / "compact").architecture == cut.architecture
    mask = vitrim.StructuredMask.load(folder / "mask.safetensors")
    assert set(mask.kept) == {"token"}


def test_widths_are_cut_after_the_tokens(recipe_file: Path) -> None:
    folder = trained(recipe_file, "both", *TOKENS, *CLOSED_FORM, "masks.params=0.6")
    dense, start = vitrim.load(folder / "baseline"), vitrim.load(folder / "start")
    cut = vitrim.load(folder / "cut")
    assert start.architecture.drops_tokens
    assert cut.architecture.order == start.architecture.order
    assert cut.architecture.final_tokens == start.architecture.final_tokens
    assert count_params(cut.architecture) <= 0.6 * count_params(dense.architecture)


def test_widths_are_learned_after_the_tokens(recipe_file: Path) -> None:
    folder = trained(recipe_file, "learned", *TOKENS, "masks.macs=0.5")
    cut = vitrim.load(folder / "cut")
    assert cut.architecture.drops_tokens
    assert macs(folder / "cut") <= 0.5 * macs(folder / "baseline")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (['masks.tokens="patch-slimming"'], "needs one of `token_macs = 0.6` and `token_counts`"),
        ([*TOKENS, "masks.token_counts=[4, 1]"], "needs one of"),
        (["masks.token_macs=0.5"], "token_macs needs a method"),
        (
            ['masks.tokens="radial"', "masks.token_counts=[9, 1]"],
            "masks.token_counts: 9 tokens at blocks.0.attn; the network carries at most 5 there",
        ),
        (['masks.tokens="radial"', "masks.token_macs=0.01"], "masks.token_macs = 0.01"),
        (
            ['masks.tokens="best"', "masks.token_macs=0.5"],
            '`masks.tokens` = "best" has the wrong type',
        ),
    ],
)
def test_impossible_tokens_are_refused_before_any_work(
    recipe_file: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        run(load_recipe(recipe_file, sets), recipe_file.parent / "refused", quiet=True)
    assert message in str(caught.value)
    assert not (recipe_file.parent / "refused").exists()


def test_recipes_name_every_method() -> None:
    assert get_args(TokenMethod) == ("learned", *SELECTING, *METHODS)
