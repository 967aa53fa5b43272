"""The chain with `masks.tokens`: tokens are chosen before widths, or alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import vitrim
from photo_folder import write_photos, write_recipe
from tiny_models import tiny_vit
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.surgery.image_size import at_image_size
from vitrim.compress.tokens import patch_slimming
from vitrim.compress.tokens.choose import METHODS
from vitrim.core.errors import InputError
from vitrim.pipeline.masks_section import SELECTING, TokenMethod
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import run
from vitrim.pipeline.run_folder import RunFolder
from vitrim.pipeline.shipping_steps import resampled_notes
from vitrim.pipeline.source_model import with_last_queries

TOKENS = ('masks.tokens="patch-slimming"', "masks.token_macs=0.7")
TOLERANCE = ('masks.tokens="patch-slimming"', "masks.token_tolerance=0.05")
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


def test_a_tolerance_sets_the_tokens_and_refits_blocks(recipe_file: Path) -> None:
    sets = (*TOLERANCE, *CLOSED_FORM, "masks.params=1.0")
    folder = trained(recipe_file, "tolerance", *sets)
    record = json.loads((folder / "tokens.json").read_text())
    assert all(0.0 <= error < 1.0 for error in record["errors"].values())
    cut = vitrim.load(folder / "cut")
    assert list(record["counts"].values())[1:] == list(cut.architecture.step_tokens())
    assert json.loads((folder / "cut-parity.json").read_text())["max_relative_error"] < 1e-5
    mask = vitrim.StructuredMask.load(folder / "mask.safetensors")
    # The mask is that of the network of full size with the refitted blocks.
    assert mask.note["tolerance"] == "0.05"
    again = vitrim.compact(vitrim.load(folder / "rotated"), mask, last_queries=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), cut.eval()(images))
    assert not (folder / "training").exists()


def test_a_search_that_was_killed_continues(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*TOLERANCE, *CLOSED_FORM, "masks.params=1.0")
    whole, folder = trained(recipe_file, "whole", *sets), recipe_file.parent / "killed"
    searched: list[int] = []
    search = patch_slimming._Search.block

    def block(self: Any, place: int) -> None:
        if len(searched) == 1:
            raise KeyboardInterrupt
        searched.append(place)
        search(self, place)

    monkeypatch.setattr(patch_slimming._Search, "block", block)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe_file, sets), folder, until="masks", quiet=True)
    assert (folder / "training/tokens/slim-1.safetensors").is_file()
    # What was left can be replaced, too.
    RunFolder.check(folder, resume=False, overwrite=True)
    blocks: list[int] = []

    def rest(self: Any, place: int) -> None:
        blocks.append(place)
        search(self, place)

    monkeypatch.setattr(patch_slimming._Search, "block", rest)
    run(load_recipe(recipe_file, sets), folder, until="masks", resume=True, quiet=True)
    assert (searched, blocks) == ([1], [0])
    names = ("tokens.json", "cut/model.safetensors", "mask.safetensors")
    assert [(folder / name).read_bytes() == (whole / name).read_bytes() for name in names] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (['masks.tokens="patch-slimming"'], "needs one of `token_macs = 0.6` and `token_counts`"),
        (
            [*TOKENS, "masks.token_counts=[4, 1]"],
            "`token_macs` and `token_counts` both set the tokens; keep one",
        ),
        (
            [*TOLERANCE, "masks.token_macs=0.5"],
            "`token_macs` and `token_tolerance` both set the tokens; keep one",
        ),
        (
            ['masks.tokens="radial"', "masks.token_tolerance=0.02"],
            'token_tolerance is of tokens = "patch-slimming"; "radial" takes `token_macs = 0.6`',
        ),
        (
            ['masks.tokens="evit"', "masks.token_tolerance=0.02"],
            'token_tolerance is that of one set for all images; tokens = "evit" takes',
        ),
        (["masks.token_tolerance=0.02"], "token_tolerance needs a method"),
        (
            ['masks.tokens="patch-slimming"', "masks.token_tolerance=1.5"],
            "`masks.token_tolerance` = 1.5 is out of range",
        ),
        (["masks.token_macs=0.5"], "token_macs needs a method"),
        (
            [
                'masks.tokens="radial"',
                "masks.token_counts=[5,5,5]",
                'masks.token_schedule="linear"',
            ],
            "token_schedule distributes `token_macs`",
        ),
        (
            ['masks.tokens="evit"', 'masks.token_schedule="linear"'],
            'token_schedule is that of one set for all images; tokens = "evit" takes',
        ),
        (
            [
                'masks.tokens="radial"',
                "masks.token_macs=0.5",
                'masks.token_schedule="importance"',
            ],
            "masks.token_schedule = 'importance': radial has no importance",
        ),
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


def test_the_report_warns_of_a_token_mask_that_was_resampled() -> None:
    dense = tiny_vit(img_size=32, depth=3)
    cut = vitrim.compact(dense, vitrim.choose_tokens(dense, "radial", macs=0.7)).architecture
    larger = [at_image_size(each, 48) for each in (vitrim.lift(dense).architecture, cut, cut)]
    assert resampled_notes([cut]) == []
    (line,) = resampled_notes(larger)
    assert line.startswith("image size 48x48: the map of where patches leave was resampled")
