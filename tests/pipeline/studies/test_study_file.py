"""Study files: which runs they describe, and the errors of invalid ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_sample import write_study
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.expansion import cell, expand
from vitrim.pipeline.studies.study_file import (
    STUDIES,
    base_copy,
    flat_values,
    load_study,
    study_names,
)

GRID = """
seeds = [7, 13]
[set]
"finetune.epochs" = 2
[axes]
"masks.params" = [0.3, 0.6]
"masks.fixed" = [[], ["head"], ["qk", "v"]]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


def test_axes_and_seeds_are_combined(place: Path) -> None:
    runs = expand(load_study(write_study(place, GRID)))
    assert len(runs) == 2 * 2 * 3
    assert [run.number for run in runs] == list(range(1, 13))
    assert [run.seed for run in runs] == [7] * 6 + [13] * 6
    assert [run.cells for run in runs[:3]] == [
        {"masks.params": 0.3, "masks.fixed": fixed} for fixed in ("none", "head", "qk+v")
    ]
    last = runs[-1].recipe
    assert (last.train.seed, last.masks.params, last.masks.fixed) == (13, 0.6, ("qk", "v"))
    assert {run.recipe.finetune.epochs for run in runs} == {2}


def test_a_key_that_sets_the_size_replaces_the_one_of_the_recipe(place: Path) -> None:
    runs = expand(load_study(write_study(place, "[axes]\nmasks.lambda = [1e-6, 1e-7]\n")))
    assert [(run.recipe.masks.lambda_, run.recipe.masks.params) for run in runs] == [
        (1e-6, None),
        (1e-7, None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[set]\nmasks.file_mb = 3.0\n[axes]\nmasks.latency = [0.4, 0.6]\n",
        "[set]\nmasks.file_mb = 2.0\n[axes]\nmasks.file_mb = [3.0]\nmasks.latency = [0.4, 0.6]\n",
        "[axes]\nmasks.file_mb = [3.0]\nmasks.latency = [0.4, 0.6]\n",
        "[axes]\nmasks.latency = [0.4, 0.6]\nmasks.file_mb = [3.0]\n",
        "[set]\nmasks.macs = 0.5\n[[points]]\nmasks.file_mb = 3.0\nmasks.latency = 0.4\n"
        "[[points]]\nmasks.latency = 0.6\nmasks.file_mb = 3.0\n",
    ],
)
def test_a_file_size_stays_beside_the_latency_of_an_axis(place: Path, text: str) -> None:
    runs = expand(load_study(write_study(place, text)))
    found = [(run.recipe.masks.latency, run.recipe.masks.file_mb) for run in runs]
    assert found == [(0.4, 3.0), (0.6, 3.0)]
    varied = "[set]\nmasks.latency = 0.4\n[axes]\nmasks.file_mb = [2.0, 3.0]\n"
    runs = expand(load_study(write_study(place, varied)))
    found = [(run.recipe.masks.latency, run.recipe.masks.file_mb) for run in runs]
    assert found == [(0.4, 2.0), (0.4, 3.0)]


def test_zipped_keys_vary_together_and_points_are_taken_as_they_are(place: Path) -> None:
    text = """
[[zip]]
"masks.params" = [0.3, 0.5]
"finetune.lr" = [1e-3, 1e-4]
[[points]]
"finetune.epochs" = 1
[[points]]
"finetune.epochs" = 2
"train.label_smoothing" = 0.0
"""
    runs = expand(load_study(write_study(place, text)))
    found = [(r.recipe.masks.params, r.recipe.finetune.lr, r.recipe.finetune.epochs) for r in runs]
    assert found == [(0.3, 1e-3, 1), (0.3, 1e-3, 2), (0.5, 1e-4, 1), (0.5, 1e-4, 2)]
    # A key that only one point has shows the recipe's value for the others.
    assert [run.values["train.label_smoothing"] for run in runs] == [0.1, 0.0, 0.1, 0.0]


def test_exclusions_remove_runs_and_grids_add_some(place: Path) -> None:
    text = """
[axes]
"masks.params" = [0.3, 0.6]
"masks.sharing" = ["residual", "full"]
[[exclude]]
"masks.params" = 0.3
"masks.sharing" = "full"
[[grid]]
set = { "masks.sharing" = "unshared" }
axes = { "masks.params" = [0.6] }
"""
    runs = expand(load_study(write_study(place, text)))
    assert [(run.values["masks.params"], run.values["masks.sharing"]) for run in runs] == [
        (0.3, "residual"),
        (0.6, "residual"),
        (0.6, "full"),
        (0.6, "unshared"),
    ]


def test_a_run_has_the_same_id_in_a_larger_study_and_on_more_threads(place: Path) -> None:
    small = expand(load_study(write_study(place, "[axes]\nmasks.params = [0.3]\n")))
    text = "seeds = [13, 7]\n[set]\ntrain.threads = 2\n[axes]\nmasks.params = [0.6, 0.3]\n"
    large = expand(load_study(write_study(place, text)))
    assert small[0].id in {run.id for run in large}
    assert len({run.id for run in large}) == 4


def test_a_key_that_does_not_count_otherwise_counts_where_it_varies(place: Path) -> None:
    text = '[axes]\n"train.precision" = ["fp32", "bf16"]\n"train.threads" = [1, 2]\n'
    runs = expand(load_study(write_study(place, text)))
    assert len({run.id for run in runs}) == 4
    assert [run.cells for run in runs[:2]] == [
        {"train.precision": "fp32", "train.threads": threads} for threads in (1, 2)
    ]
    # A value of all runs does not.
    same = expand(load_study(write_study(place, '[set]\n"train.precision" = "bf16"\n')))
    assert same[0].id == expand(load_study(write_study(place, "")))[0].id


def test_repetitions_differ_in_their_id_only(place: Path) -> None:
    one, other = expand(load_study(write_study(place, "repetitions = 2\n")))
    assert (one.repetition, other.repetition) == (1, 2)
    assert one.id != other.id
    assert one.recipe.model_copy(update={"name": ""}) == other.recipe.model_copy(
        update={"name": ""}
    )


@given(
    params=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4, unique=True),
    epochs=st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
)
@settings(max_examples=25)
def test_a_grid_has_each_combination_once(
    place: Path, params: list[float], epochs: list[int], seeds: list[int]
) -> None:
    text = f'seeds = {seeds}\n[axes]\n"masks.params" = {params}\n"finetune.epochs" = {epochs}\n'
    runs = expand(load_study(write_study(place, text)))
    found = {(r.seed, r.recipe.masks.params, r.recipe.finetune.epochs) for r in runs}
    assert len(runs) == len(found) == len(params) * len(epochs) * len(seeds)
    assert len({run.id for run in runs}) == len(runs)


def test_tables_and_dotted_keys_are_the_same() -> None:
    assert flat_values({"a": {"b": 1, "c.d": 2}, "e.f": 3}) == {"a.b": 1, "a.c.d": 2, "e.f": 3}


def test_cells_are_numbers_and_texts() -> None:
    given = [True, 3, 1e-7, "full", [], ["qk", "v"], (1, 2), {"b": 1}, None]
    expected = ["true", 3, 1e-7, "full", "none", "qk+v", "1+2", '{"b": 1}', None]
    assert list(map(cell, given)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[axes]\nmasks.parms = [0.3]\n", r"masks.parms=0.3: unknown key `masks.parms`; the near"),
        ("[axes]\nmasks.params = [0.3, 7.0]\n", r"masks.params=7: `masks.params` = 7.0 is out"),
        ("[axes]\nmasks.params = 0.3\n", r"\[axes\] params = 0.3: write a list of values"),
        ("[axes]\nmasks.params = [0.3, 0.3]\n", "a value is listed twice"),
        ("[axes]\nmasks.params = []\n", "write a list of values"),
        ("[axes]\nmasks.params = [0.3]\nmasks.macs = [0.3]\n", "both set the size of one run"),
        ("[axes]\nmasks.macs = [0.3]\nmasks.file_mb = [3.0]\n", "both set the size of one run"),
        (
            "[axes]\nmasks.latency = [0.3]\nmasks.latency_ms = [2.0]\nmasks.file_mb = [3.0]\n",
            "`masks.latency` and `masks.latency_ms` both set the size of one run",
        ),
        ("[axes]\ntrain.seed = [1, 2]\n", "`train.seed` is set by the study; write `seeds`"),
        ("seeds = [7, 7]\n", "seeds are different whole numbers"),
        ("seeds = []\n", "`seeds`"),
        ("axis = 3\n", "unknown key `axis`; the nearest valid key is `axes`"),
        ("repetitions = 0\n", "`repetitions` = 0 is out of range"),
        ('until = "masks"\n', "expected one of finetune, report"),
        (
            "[[zip]]\nmasks.params = [0.3, 0.5]\nfinetune.lr = [1e-3]\n",
            "need one length, but masks.params has 2, finetune.lr has 1",
        ),
        (
            "[axes]\nmasks.params = [0.3]\n[[points]]\nmasks.params = 0.4\n",
            "`masks.params` varies in two places",
        ),
        (
            "[axes]\nmasks.params = [0.3]\n[[exclude]]\nmasks.sharing = 'full'\n",
            "names `masks.sharing`, which no axis has; write values of masks.params",
        ),
        (
            "[axes]\nmasks.params = [0.3]\n[[exclude]]\nmasks.params = 0.3\n",
            "leaves no run; exclude fewer",
        ),
        (
            "[axes]\nmasks.params = [0.3]\n[[grid]]\naxes = { masks.params = [0.3] }\n",
            "is run 1 already; exclude it from one grid",
        ),
        ("[[grid]]\naxis = 3\n", r"\[\[grid\]\] 1: unknown key `axis`"),
        (
            f"seeds = {list(range(101))}\n[axes]\nfinetune.epochs = {list(range(100))}\n",
            "10,100 runs; a study has at most 10,000",
        ),
    ],
)
def test_an_invalid_study_is_one_line(place: Path, text: str, message: str) -> None:
    path = write_study(place, text)
    with pytest.raises(InputError, match=message) as raised:
        expand(load_study(path))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_values_of_all_runs_replace_those_of_the_file_and_its_grids(place: Path) -> None:
    text = (
        "seeds = [1]\n[set]\nfinetune.epochs = 3\nmasks.params = 0.4\n"
        "[axes]\nfinetune.lr = [1e-3]\n"
        "[[grid]]\nset = { finetune.epochs = 4 }\naxes = { finetune.lr = [2e-3] }\n"
    )
    sets = ("finetune.epochs=2", "masks.macs=0.5", "data.seed=9")
    study = load_study(write_study(place, text), sets)
    runs = expand(study)
    for run in runs:
        recipe = run.recipe
        assert (recipe.finetune.epochs, recipe.masks.macs, recipe.masks.params) == (2, 0.5, None)
        assert recipe.data.seed == 9
    # The text alone describes the same runs.
    again = place / "again.toml"
    again.write_text(study.text, encoding="utf-8")
    assert [run.id for run in expand(load_study(again))] == [run.id for run in runs]
    with pytest.raises(InputError, match=r"again.toml: has `overrides`, which --set would replace"):
        load_study(again, ("finetune.epochs=2",))
    path = write_study(place, "[axes]\nmasks.params = [0.3]\n")
    with pytest.raises(InputError, match=r"`masks.params` varies, so that one value of --set or"):
        load_study(path, ("masks.params=0.5",))
    with pytest.raises(InputError, match=r"--set masks: write --set section.key=value, e.g."):
        load_study(path, ("masks",))
    with pytest.raises(InputError, match=r"unknown key `finetune.epoch`; the nearest valid key"):
        expand(load_study(path, ("finetune.epoch=2",)))


def test_a_missing_study_or_recipe_is_named(place: Path) -> None:
    with pytest.raises(InputError, match=r"no such study; name a TOML .*structured, tandem"):
        load_study("strctured")
    path = place / "other.toml"
    path.write_text('recipe = "nowhere"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"other.toml: recipe: nowhere: no such recipe"):
        load_study(path)
    path.write_text("recipe = ", encoding="utf-8")
    with pytest.raises(InputError, match=r"other.toml: not valid TOML"):
        load_study(path)


def test_the_copy_of_a_study_has_its_recipe(place: Path) -> None:
    study = load_study(write_study(place, GRID))
    folder = place / "folder"
    copy = base_copy(folder, study.section.recipe)
    copy.parent.mkdir(parents=True)
    copy.write_text(study.base.toml(), encoding="utf-8")
    (folder / "study.toml").write_text(study.text, encoding="utf-8")
    again = load_study(folder / "study.toml")
    assert [run.id for run in expand(again)] == [run.id for run in expand(study)]
    # Another recipe that somebody writes into the copy is that one.
    other = study.text.replace("tiny.toml", "quickstart")
    (folder / "study.toml").write_text(other, encoding="utf-8")
    assert load_study(folder / "study.toml").base.name == "quickstart"


def test_the_tokens_of_the_source_are_a_valid_study(place: Path) -> None:
    """What the comment of `tokens` describes: another recipe, and keys of [set] that change."""
    text = (STUDIES / "tokens.toml").read_text(encoding="utf-8")
    text = text.replace('recipe = "quickstart"', 'recipe = "imagenet_deit"')
    text = re.sub(r'^"masks.(lr|augmentation)" = .*\n', "", text, flags=re.MULTILINE)
    text = text.replace('"masks.epochs" = 3', '"masks.method" = "closed-form"')
    text = text.replace(', "finetune.epochs" = 3', "")
    (place / "full.toml").write_text(text, encoding="utf-8")
    runs = expand(load_study(place / "full.toml"))
    assert len(runs) == 81
    assert {run.recipe.finetune.epochs for run in runs} == {30}
    assert {run.recipe.masks.width_epochs for run in runs} == {0}
    assert {run.recipe.model.name for run in runs} == {"deit_small_patch16_224.fb_in1k"}


@pytest.mark.parametrize(("name", "count"), [("structured", 216), ("tokens", 81), ("tandem", 30)])
def test_the_studies_of_the_package_are_valid(name: str, count: int) -> None:
    assert name in study_names()
    study = load_study(name)
    assert len(expand(study)) == count
    assert study.section.source
    assert "@" in study.section.bibtex
