"""Recipes: valid ones, the error lines of invalid ones, and equality after writing and reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import Recipe, load_recipe, parse_recipe, recipe_names

SMALLEST = "[masks]\nparams = 0.3\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def line_for(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: "), "the line begins with the file"
    assert "\n" not in line
    return line.removeprefix(f"{path}: ")


def test_the_run_is_named_after_the_file(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, SMALLEST)).name == "mine"
    assert load_recipe(write(tmp_path, f'name = "trial 7"\n{SMALLEST}')).name == "trial 7"


def test_a_target_in_the_recipe_of_an_earlier_run_keeps_its_meaning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[masks]\nparams = 0.3\n[export]\ntarget = "x86-64"\n')
    assert load_recipe(path).export.target == "x86-64"
    (tmp_path / "steps.json").write_text("{}")
    capsys.readouterr()
    assert load_recipe(path).export.target == "x86-64-v4-vnni"
    assert "target x86-64 is named x86-64-v4-vnni now" in capsys.readouterr().err.replace("\n", " ")
    path.write_text(load_recipe(path, ["export.target=x86-64"]).toml())
    assert load_recipe(path).export.target == "x86-64"


def test_the_target_of_the_artifacts_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[masks]\nparams = 0.3\n[export]\ntarget = "x86_64-avx2"\n')
    with pytest.raises(InputError, match="did you mean 'x86-64-v3'"):
        load_recipe(path)


def test_the_default_recipe_is_the_quickstart() -> None:
    assert load_recipe() == load_recipe("quickstart")
    assert load_recipe().name == "quickstart"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, recipe.toml())) == recipe


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[masks]\nparms = 0.3\n",
            "unknown key `masks.parms`; the nearest valid key is `masks.params`",
        ),
        (
            f"batch_size = 3\n{SMALLEST}",
            "unknown key `batch_size`; the nearest valid key is `train.batch_size`",
        ),
        (f"{SMALLEST}[trian]\nseed = 1\n", "unknown key `trian`; the nearest valid key is `train`"),
        (
            f"{SMALLEST}[finetune]\nepoch = 1\n",
            "unknown key `finetune.epoch`; the nearest valid key is `finetune.epochs`",
        ),
        (
            "[masks]\nlamda = 1e-7\n",
            "unknown key `masks.lamda`; the nearest valid key is `masks.lambda`",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(
    tmp_path: Path, text: str, line: str
) -> None:
    assert line_for(tmp_path, text) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[masks]\nparams = "a third"\n',
            '`masks.params` = "a third" has the wrong type or value: expected a number',
        ),
        (
            f"{SMALLEST}epochs = 1.5\n",
            "`masks.epochs` = 1.5 has the wrong type or value: expected a whole number",
        ),
        (
            f"{SMALLEST}epochs = true\n",
            "`masks.epochs` = true has the wrong type or value: expected a whole number",
        ),
        (
            f"{SMALLEST}sharing = 3\n",
            "`masks.sharing` = 3 has the wrong type or value: expected one of residual, unshared, "
            "full",
        ),
        (
            f"{SMALLEST}[model]\noverrides = 3\n",
            "`model.overrides` = 3 has the wrong type or value: expected a table",
        ),
        ("masks = 0.3\n", "`masks` = 0.3 has the wrong type or value: expected a table"),
        (
            f'{SMALLEST}[export]\nbatch = "some"\n',
            '`export.batch` = "some" has the wrong type or value: expected a whole number or '
            "dynamic",
        ),
        (
            f'{SMALLEST}fixed = ["hed"]\n',
            '`masks.fixed` = "hed" has the wrong type or value: expected a list, each one of head, '
            "embed, ffn, qk, v, token",
        ),
    ],
)
def test_a_wrong_type_is_named_with_key_value_and_expected_type(
    tmp_path: Path, text: str, line: str
) -> None:
    assert line_for(tmp_path, text) == line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[masks]\nparams = 1.3\n", "`masks.params` = 1.3 is out of range"),
        ("[masks]\nparams = nan\n", "finite"),
        (
            "[masks]\nparams = 0.3\nmacs = 0.5\n",
            "[masks]: `params` and `macs` both set the size; keep one",
        ),
        ("[masks]\nparams = 0.3\nlambda = 1e-7\n", "`params` and `lambda` both"),
        ("[masks]\nepochs = 3\n", "nothing sets the size; add one of `params = 0.3`"),
        ('[data]\nname = "cifar10"\n', "the table [masks] is missing"),
        (
            f'{SMALLEST}[model]\npretrained = true\ncheckpoint = "m.pth"\n',
            "[model]: `pretrained` and `checkpoint` both name the weights",
        ),
        (f'{SMALLEST}fixed = ["head", "head"]\n', "a dimension is listed twice"),
        (
            '[masks]\nmacs = 0.5\ntokens = "lerned"\n',
            '`masks.tokens` = "lerned" has the wrong type or value: expected one of learned, ',
        ),
        (f'{SMALLEST}tokens = "learned"\n', 'tokens = "learned" needs method = "learned" and'),
        (
            '[masks]\nlambda = 1e-7\ntokens = "learned"\n',
            "a latency: tokens have no parameters, so `params` and `lambda` set no price",
        ),
        (
            '[masks]\nmacs = 0.5\nmethod = "closed-form"\ntokens = "learned"\n',
            'tokens = "learned" needs method = "learned"',
        ),
        (
            f"{SMALLEST}[export]\nimage_size = [160]\n",
            "`export.image_size` = [160]: image size [160]: write 160, "
            "or 160x192 for height x width",
        ),
        (f'{SMALLEST}[export]\nimage_size = "big"\n', "write 160, or 160x192"),
        (f'name = "../up"\n{SMALLEST}', "it names a folder"),
        ("[masks\n", "not valid TOML"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(tmp_path: Path, text: str, words: str) -> None:
    assert words in line_for(tmp_path, text)


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    assert line_for(tmp_path, "[masks]\nparms = 0.3\nsharing = 3\n").endswith(
        "(and 1 more like this)"
    )


def test_a_binary_or_missing_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"mine\.toml: not a text file"):
        load_recipe(path)
    with pytest.raises(
        InputError, match=r"no such recipe; name a TOML file, or one of .*quickstart"
    ):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="this is a folder"):
        load_recipe(tmp_path)


def test_set_replaces_one_value() -> None:
    recipe = load_recipe(
        None,
        [
            "train.seed=42",
            "data.name=cifar10",
            "masks.sharing=full",
            "model.overrides.depth=2",
            "masks.fixed=['head']",
        ],
    )
    assert (recipe.train.seed, recipe.data.name, recipe.masks.sharing) == (42, "cifar10", "full")
    assert recipe.model.overrides["depth"] == 2
    assert recipe.masks.fixed == ("head",)


def test_set_of_another_size_key_replaces_the_one_in_the_file() -> None:
    masks = load_recipe(None, ["masks.macs=0.5"]).masks
    assert (masks.params, masks.macs, masks.lambda_) == (None, 0.5, None)
    assert load_recipe("fashion_mnist", ["masks.lambda=1e-7"]).masks.lambda_ == 1e-7


@pytest.mark.parametrize("base", ["macs = 0.5", "latency_ms = 3.0", "file_mb = 2.0"])
@pytest.mark.parametrize(
    "sets",
    [
        ["masks.latency=0.4", "masks.file_mb=3.0"],
        ["masks.file_mb=3.0", "masks.latency=0.4"],
        ["masks.file_mb=3.0", "masks.latency_ms=1.0", "masks.latency=0.4"],
    ],
)
def test_a_file_size_stays_beside_a_latency_in_either_order(
    tmp_path: Path, base: str, sets: list[str]
) -> None:
    path = write(tmp_path, f'[masks]\nmethod = "closed-form"\n{base}\n')
    masks = load_recipe(path, sets).masks
    assert (masks.latency, masks.file_mb) == (0.4, 3.0)
    assert masks.latency_ms is masks.macs is None
    both = load_recipe(path, [*sets, "masks.params=0.3"]).masks
    assert both.params == 0.3
    assert both.latency is both.file_mb is None
    kept = load_recipe(path, ["masks.latency=0.4"]).masks
    assert kept.file_mb == (2.0 if base.startswith("file_mb") else None)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (
            "masks.parms=1",
            "--set masks.parms=1: unknown key `masks.parms`; the nearest valid key is "
            "`masks.params`",
        ),
        ("masks.params=much", "expected a number"),
        ("masks.params", "write --set section.key=value"),
        ("=3", "write --set section.key=value"),
        ("data.name.x=3", "`name` is a value, not a table"),
    ],
)
def test_a_bad_set_is_refused_by_name(item: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(None, [item])
    assert words in str(caught.value)


def test_steps_of_runs_before_file_precision_followed_the_table_are_kept(tmp_path: Path) -> None:
    def mark(masks: str) -> str:
        text = f'[masks]\nmethod = "closed-form"\n{masks}\n'
        return load_recipe(write(tmp_path, text)).fingerprint("masks")

    for masks in ("macs = 0.5", "file_mb = 3.0", "latency_ms = 2.0"):
        assert mark(masks) == mark(f'{masks}\nfile_precision = "fp32"')
    # Here the precision of the table counts.
    both = "latency_ms = 2.0\nfile_mb = 3.0"
    assert mark(both) != mark(f'{both}\nfile_precision = "fp32"')


def test_the_fingerprint_depends_only_on_the_named_sections() -> None:
    recipe = load_recipe()
    other = load_recipe(None, ["bench.threads=2"])
    assert recipe.fingerprint("data", "model") == other.fingerprint("data", "model")
    assert recipe.fingerprint("bench") != other.fingerprint("bench")
    assert recipe.fingerprint("bench", previous="a") != recipe.fingerprint("bench", previous="b")


values = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(overrides=st.dictionaries(st.text(), values, max_size=4), name=st.text(min_size=1))
def test_overrides_are_equal_after_writing_and_reading(
    overrides: dict[str, Any], name: str
) -> None:
    import tomllib

    tables = {"masks": {"params": 0.5}, "model": {"overrides": overrides}, "data": {"name": name}}
    try:
        recipe = parse_recipe(tables, where="here")
    except InputError as error:
        # Texts that stand for another type, such as "null", and values that no model has.
        if not str(error).startswith("here: [model.overrides]: "):
            raise
        reject()
    assert Recipe.model_validate(tomllib.loads(recipe.toml())) == recipe


def test_targets_of_estimates_must_exist(tmp_path: Path) -> None:
    wrong = f'{SMALLEST}[report]\nestimate_for = ["rpi5", "rpi44"]\n'
    assert line_for(tmp_path, wrong) == (
        "`report.estimate_for` = ['rpi5', 'rpi44']: target 'rpi44': no such profile; "
        "did you mean 'rpi4'? (or give the path of a .toml file)"
    )
    assert line_for(tmp_path, f'{SMALLEST}[report]\nestimate_for = ["rpi5", "rpi5"]\n').endswith(
        "a target is listed twice"
    )
    assert (
        load_recipe(write(tmp_path, SMALLEST), ["report.estimate_for=[]"]).report.estimate_for == ()
    )
