"""The chain with patches that are chosen for each image: every method, every order, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from photo_folder import write_photos, write_recipe
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import build as network
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.selection_task import SelectionTask
from vitrim.core.errors import InputError
from vitrim.pipeline.dry_run import dry_run
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import recipe_fingerprints, run
from vitrim.pipeline.selection_step import with_selections
from vitrim.pipeline.selection_training import LaterSelections, show_missing_loss
from vitrim.pipeline.source_model import build

DEPTH = ("model.overrides={img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3}",)
ALONE = ("masks.params=1.0",)
# Of so small a network the start of an attention costs more than its products.
EVERY_ATTENTION = "masks.attention_overhead_macs=0"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selections")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", "", masks_epochs=2)
    return folder / "tiny.toml"


def trained(recipe_file: Path, name: str, *sets: str, resume: bool = False) -> Path:
    folder = recipe_file.parent / name
    recipe = load_recipe(recipe_file, (*DEPTH, *sets))
    run(recipe, folder, until="finetune", quiet=True, resume=resume)
    return folder


def tokens(method: str, *more: str) -> tuple[str, ...]:
    return (f'masks.tokens="{method}"', "masks.token_ratio=0.6", "masks.token_stages=[1]", *more)


def phases(folder: Path) -> list[str]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["phase"] for line in lines))


@pytest.mark.parametrize("method", ["dynamicvit", "evit", "dps", "class-attention"])
def test_patches_alone_keep_every_width(recipe_file: Path, method: str) -> None:
    folder = trained(recipe_file, method, *tokens(method), *ALONE)
    dense, compact = vitrim.load(folder / "baseline"), vitrim.load(folder / "compact")
    (select,) = compact.architecture.selects
    # Of 16 patches; EViT counts the fused token among those that stay.
    assert select.patches == (10 if method == "evit" else 9)
    assert select.fused == (method == "evit")
    predictors = sum(parameter.numel() for parameter in compact.selects.parameters())
    own = count_params(compact.architecture) - predictors
    assert own == count_params(dense.architecture)
    assert count_macs(compact.architecture) < count_macs(dense.architecture)
    expected = ["baseline", "tokens", "finetune"]
    assert phases(folder) == [
        each for each in expected if each != "tokens" or method != "class-attention"
    ]
    parity = json.loads((folder / "cut-parity.json").read_text())
    assert parity["max_relative_error"] < 1e-5
    images = torch.rand(3, 3, 16, 16)
    assert vitrim.chosen_tokens(compact, images)[0].shape[1] == select.patches + select.fused


@pytest.mark.parametrize("method", ["dynamicvit", "evit"])
@pytest.mark.parametrize("order", ["together", "tokens-first", "widths-first"])
def test_patches_and_widths_share_a_budget(recipe_file: Path, method: str, order: str) -> None:
    sets = (*tokens(method), f'masks.token_order="{order}"', "masks.macs=0.5", EVERY_ATTENTION)
    folder = trained(recipe_file, f"{method}-{order}", *sets)
    dense, compact = vitrim.load(folder / "baseline"), vitrim.load(folder / "compact")
    assert compact.architecture.selects
    share = count_macs(compact.architecture) / count_macs(dense.architecture)
    assert 0.4 < share <= 0.5
    assert count_params(compact.architecture) < 0.9 * count_params(dense.architecture)
    assert json.loads((folder / "cut-parity.json").read_text())["max_relative_error"] < 1e-5
    start = folder / ("baseline" if order == "widths-first" else "start")
    mask = vitrim.StructuredMask.load(folder / "mask.safetensors")
    cut = vitrim.compact(vitrim.load(start), mask).architecture
    whole = vitrim.load(folder / "cut").architecture
    assert cut.model_copy(update={"selects": ()}) == whole.model_copy(update={"selects": ()})
    both = {"tokens-first": ["tokens", "masks"], "widths-first": ["masks", "tokens"]}
    assert phases(folder) == ["baseline", *both.get(order, ["masks"]), "finetune"]


@pytest.mark.parametrize("method", ["learned", "closed-form"])
@pytest.mark.parametrize("budget", ["params=0.4", "macs=0.4", "macs=0.3"])
def test_a_budget_with_widths_first_is_that_of_the_result(
    recipe_file: Path, method: str, budget: str
) -> None:
    kind, _, share = budget.partition("=")
    sets = (
        *tokens("dynamicvit", 'masks.token_order="widths-first"', "masks.token_ratio=0.9"),
        *(f'masks.method="{method}"', f"masks.{budget}", EVERY_ATTENTION),
    )
    folder = trained(recipe_file, f"{method}-{budget}", *sets)
    dense, cut, compact = (vitrim.load(folder / name) for name in ("baseline", "cut", "compact"))
    assert compact.architecture.selects
    count = count_params if kind == "params" else count_macs
    found = [count(each.architecture) / count(dense.architecture) for each in (cut, compact)]
    assert found[0] == found[1]
    # One unit more of a network of 24 channels is a lot.
    assert 0.85 * float(share) < found[1] <= float(share)


def test_a_closed_form_cut_of_widths_comes_before_selections(recipe_file: Path) -> None:
    sets = (*tokens("class-attention"), 'masks.method="closed-form"', "masks.macs=0.6")
    folder = trained(recipe_file, "closed", *sets)
    dense, cut = vitrim.load(folder / "baseline"), vitrim.load(folder / "cut")
    assert cut.architecture.selects
    share = count_macs(cut.architecture) / count_macs(dense.architecture)
    assert 0.5 < share <= 0.6
    assert phases(folder) == ["baseline", "finetune"]


def test_a_loss_on_tokens_that_cannot_be_compared_is_announced(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_file, (*DEPTH, *tokens("dynamicvit")))
    dense = vitrim.lift(build(recipe.model.name, recipe.model.overrides))
    model = with_selections(dense, recipe.masks, 0)
    show_missing_loss(model, dense, recipe, quiet=False)
    assert "loss on tokens" not in capsys.readouterr().err
    model.architecture = model.architecture.model_copy(update={"stream_rotated": True})
    show_missing_loss(model, dense, recipe, quiet=False)
    shown = " ".join(capsys.readouterr().err.split())
    assert 'masks.tokens = "dynamicvit": the loss on tokens is left out' in shown
    assert "another basis" in shown


def test_one_shot_widths_start_a_training_of_both(recipe_file: Path) -> None:
    sets = (*tokens("dynamicvit"), 'masks.start="one-shot"', "masks.macs=0.5", EVERY_ATTENTION)
    folder = trained(recipe_file, "one-shot", *sets)
    assert vitrim.load(folder / "start").architecture.selects
    assert vitrim.load(folder / "compact").architecture.selects


@pytest.mark.parametrize("order", ["tokens-first", "widths-first"])
def test_a_run_that_was_killed_continues_to_the_same_weights(
    recipe_file: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order_key = f'masks.token_order="{order}"'
    sets = (*tokens("dynamicvit"), order_key, "masks.macs=0.6", EVERY_ATTENTION)
    whole = trained(recipe_file, f"whole-{order}", *sets)
    steps = 0
    loss: Any = SelectionTask.loss

    def interrupted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SelectionTask, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe_file, f"killed-{order}", *sets)
    killed = trained(recipe_file, f"killed-{order}", *sets, resume=True)
    for name in ("cut", "compact"):
        one, other = (vitrim.load(folder / name).state_dict() for folder in (whole, killed))
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_a_run_that_was_killed_behind_start_reads_its_selections(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (*tokens("evit"), 'masks.start="one-shot"', "masks.macs=0.6", EVERY_ATTENTION)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MaskTask, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe_file, "behind", *sets)
    folder = trained(recipe_file, "behind", *sets, resume=True)
    assert len(vitrim.load(folder / "compact").architecture.selects) == 1


def test_a_selection_goes_with_every_attention_behind_it(recipe_file: Path) -> None:
    sets = (*tokens("evit"), 'masks.token_order="tokens-first"', "masks.macs=0.5")
    folder = trained(recipe_file, "gone", *sets)
    compact = vitrim.load(folder / "compact").architecture
    assert not compact.selects
    assert len(compact.attention_steps()) == 2


@pytest.mark.parametrize(
    ("method", "gone", "left"),
    [
        ("evit", (), ["select.0", "select.1"]),
        # The one that scores, and the one that reads what is kept.
        ("evit", (0,), ["select.1"]),
        ("evit", (2,), ["select.0"]),
        ("evit", (0, 1, 2), []),
        ("dynamicvit", (0,), ["select.0", "select.1"]),
        ("dynamicvit", (0, 1, 2), []),
    ],
)
def test_selections_behind_a_cut_are_those_that_fit_it(
    recipe_file: Path, method: str, gone: tuple[int, ...], left: list[str]
) -> None:
    sets = (f'masks.tokens="{method}"', "masks.token_stages=[0, 1]", "masks.token_ratio=0.6")
    recipe = load_recipe(recipe_file, (*DEPTH, *sets))
    dense = vitrim.lift(build(recipe.model.name, recipe.model.overrides))
    later = LaterSelections(with_selections(dense, recipe.masks, 0), recipe.masks, 0)
    nothing = torch.zeros(1, dtype=torch.bool)
    mask = {f"blocks.{number}.attn": nothing for number in gone}
    cut = vitrim.compact(dense, vitrim.StructuredMask({"block": mask} if mask else {}))
    found = later(cut)
    assert [each.name for each in found.architecture.selects] == left
    assert later.architecture(cut.architecture) == found.architecture


def test_a_trial_of_a_recipe_times_every_phase(recipe_file: Path) -> None:
    sets = (*tokens("dynamicvit"), 'masks.token_order="tokens-first"', "masks.macs=0.6")
    found = dry_run(load_recipe(recipe_file, (*DEPTH, *sets)), quiet=True)
    assert [phase.phase for phase in found.phases] == ["baseline", "tokens", "masks", "finetune"]


def test_the_keys_are_part_of_the_identity_of_the_step(recipe_file: Path) -> None:
    def mark(*sets: str) -> str:
        return recipe_fingerprints(load_recipe(recipe_file, (*DEPTH, *sets)))["masks"]

    marks = [
        mark(*tokens("dynamicvit", *more))
        for more in ((), ('masks.token_order="tokens-first"',), ("masks.token_lr=0.1",))
    ]
    assert len({mark(), *marks, mark(*tokens("dps"))}) == 5


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ('masks.tokens="dynamicvit"', "masks.token_ratio=0.05"),
            "masks.token_ratio = 0.05 (geometric): no patch is left at block 1",
        ),
        (
            (*tokens("evit"), "masks.token_stages=[3]"),
            "masks.token_stages: 3; the model has blocks 0 to 2",
        ),
        (
            (*tokens("evit"), 'masks.token_rule="subtractive"'),
            "masks.token_rule = 'subtractive': evit keeps the same share of the tokens",
        ),
        (('masks.token_order="tokens-first"',), "token_order needs a method that chooses for"),
        ((*tokens("evit"), "masks.token_macs=0.6"), "token_macs is that of one set for all images"),
        ((*tokens("evit"), "masks.token_counts=[4]"), "`token_counts` and `token_ratio` both set"),
        ((*tokens("dps"), "masks.token_ratio_weight=4"), 'token_ratio_weight is of "dynamicvit"'),
        ((*tokens("dps"), "masks.token_epochs=0"), 'token_epochs = 0 leaves tokens = "dps"'),
        (
            (*tokens("dps"), 'masks.method="closed-form"', 'masks.token_order="together"'),
            'token_order = "together" needs method = "learned"',
        ),
        (
            (*tokens("dynamicvit"), 'masks.method="closed-form"', "finetune.epochs=0"),
            "nothing trains its predictors",
        ),
        ((*tokens("dynamicvit"), "masks.macs=0.01"), "budget macs = "),
    ],
)
def test_impossible_selections_are_refused_before_any_work(
    recipe_file: Path, sets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        run(load_recipe(recipe_file, (*DEPTH, *sets)), recipe_file.parent / "no", quiet=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (recipe_file.parent / "no").exists()


def test_the_recipe_of_dynamicvit_has_the_counts_of_its_code() -> None:
    recipe = load_recipe("imagenet_deit_dynamicvit")
    with torch.device("meta"):
        dense = vitrim.lift(build(recipe.model.name.partition(".")[0], {}))
    state = {name: torch.zeros(tensor.shape) for name, tensor in dense.state_dict().items()}
    model = with_selections(network(dense.architecture, state), recipe.masks, 0)
    assert [each.patches for each in model.architecture.selects] == [137, 96, 67]
    assert count_macs(model.architecture) / count_macs(dense.architecture) == pytest.approx(
        2.9 / 4.6, abs=0.03
    )
    assert recipe.masks.keeps_widths
    assert recipe.masks.alone_epochs == 30


def test_counts_replace_the_ratio(recipe_file: Path) -> None:
    sets = ('masks.tokens="evit"', "masks.token_counts=[7]", "masks.token_stages=[1]")
    folder = trained(recipe_file, "counts", *sets, *ALONE, "masks.token_epochs=0")
    (select,) = vitrim.load(folder / "compact").architecture.selects
    assert (select.patches, select.fused) == (7, True)
    assert phases(folder) == ["baseline", "finetune"]
