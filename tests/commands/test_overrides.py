"""`vitrim compact --override` and `--set model.overrides`: values keep their types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from tiny_models import tiny_vit
from vitrim.cli import call
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe, parse_value

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def options(**changes: object) -> list[str]:
    given = {**TINY, **changes}
    return [text for key, value in given.items() for text in ("--override", f"{key}={value}")]


def compact(tmp_path: Path, model: dict[str, Any], **written: object) -> int:
    checkpoint, out = tmp_path / "weights.pth", tmp_path / "small"
    torch.save(tiny_vit(**model).state_dict(), checkpoint)
    name = ["--model", "vit_tiny_patch16_224", "--keep-ratio", "0.5", "--out", str(out)]
    return call(["compact", str(checkpoint), *name, *options(**written)])


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ({"num_classes": 0}, {"num_classes": 0}),
        ({"num_classes": 7}, {"num_classes": 0}),
        ({"num_classes": 7}, {}),
        (
            {"class_token": False, "global_pool": "avg"},
            {"class_token": "False", "global_pool": "avg"},
        ),
        (
            {"class_token": False, "global_pool": "avg"},
            {"class_token": "false", "global_pool": "'avg'"},
        ),
        ({"img_size": (24, 40)}, {"img_size": "(24, 40)"}),
        ({"img_size": (24, 40)}, {"img_size": "24,40"}),
        ({"img_size": (24, 40)}, {"img_size": "[24, 40]"}),
        ({"init_values": 0.1}, {"init_values": ".1"}),
        ({"init_values": None}, {"init_values": "None"}),
    ],
)
def test_a_model_is_built_as_its_overrides_are_written(
    tmp_path: Path, model: dict[str, Any], written: dict[str, object]
) -> None:
    assert compact(tmp_path, model, **written) == 0
    architecture = vitrim.load(tmp_path / "small").architecture
    assert (architecture.head is None) == (written.get("num_classes") == 0)
    assert architecture.image == (3, *model.get("img_size", (16, 16)))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"class_token": "no"}, "class_token is the text 'no'; write class_token = false"),
        ({"class_token": "'False'"}, "class_token is the text 'False'; write class_token = false"),
        ({"class_token": "TRUE"}, "class_token is the text 'TRUE'; write class_token = true"),
        ({"init_values": "none"}, "init_values is the text 'none'; leave init_values out"),
        ({"img_size": "'(24, 40)'"}, "write img_size = [24, 40], without quotes"),
        ({"num_classes": "ten"}, "num_classes is 'ten'; write a whole number, 0 for a model with"),
        ({"num_classes": "7.0"}, "num_classes is 7.0; write a whole number"),
        ({"num_classes": "-1"}, "num_classes is -1; write a whole number"),
        ({"num_classes": "True"}, "num_classes is True; write a whole number"),
    ],
)
def test_a_value_that_would_be_misread_is_refused_with_its_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: dict[str, object], words: str
) -> None:
    assert compact(tmp_path, {}, **written) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_two_sources_of_weights_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["compact", "x.pth", "--model", "vit_tiny_patch16_224", "--pretrained"]) == 2
    assert "`pretrained` and `checkpoint` both name the weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("true", True),
        ("None", None),
        ("(24,40)", [24, 40]),
        ("24, 40", [24, 40]),
        ("((1, 2), 3)", [[1, 2], 3]),
        ("()", []),
        (".5", 0.5),
        ("1e-5", 1e-5),
        ("'a b'", "a b"),
        ('"avg"', "avg"),
        ("avg", "avg"),
        ("", ""),
        ("160x192", "160x192"),
        ("imagefolder:~/photos", "imagefolder:~/photos"),
        ("0123", "0123"),
        ("b'x'", "b'x'"),
        ("{1, 2}", "{1, 2}"),
        ("(1, 2", "(1, 2"),
        ("(" * 500, "(" * 500),
    ],
)
def test_values_are_toml_or_literals_of_python(text: str, value: object) -> None:
    key, found = parse_value(f"key={text}", "--override")
    assert (key, found, type(found)) == ("key", value, type(value))


def test_recipes_take_the_same_values() -> None:
    base = "model.checkpoint=None"
    recipe = load_recipe(None, [base, "model.overrides.class_token=False"])
    assert recipe.model.overrides == {"class_token": False}
    recipe = load_recipe(None, [base, "model.overrides.img_size=(24, 40)"])
    assert recipe.model.overrides == {"img_size": [24, 40]}
    assert "img_size = [24, 40]" in recipe.toml()
    assert load_recipe(None, ["export.image_size=None"]).export.image_size is None
    for value, words in (("None", "TOML has no None"), ("off", "write class_token = false")):
        with pytest.raises(InputError, match=words):
            load_recipe(None, [base, f"model.overrides.class_token={value}"])
