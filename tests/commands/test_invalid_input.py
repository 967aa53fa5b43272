"""Invalid input: exit code 2, one line that names what and where, and no file left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from photo_folder import write_photos, write_recipe
from vitrim.cli import call

Refused = Callable[..., str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def recipe(tmp_path: Path, photos: Path) -> Callable[..., Path]:
    return lambda more="": write_recipe(tmp_path / "trial.toml", photos, more)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command that must exit with 2, one line and no new file; returns the line."""

    def check(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = call([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("vitrim: ")
        assert sorted(tmp_path.rglob("*")) == before, "a file was left behind"
        return lines[0].removeprefix("vitrim: ")

    return check


# ---- the recipe ----


def test_an_unknown_recipe_key(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe("[finetune_]\nepochs = 1\n")
    line = refused("run", path, "--out", tmp_path / "out")
    assert line == f"{path}: unknown key `finetune_`; the nearest valid key is `finetune`"


def test_a_recipe_value_of_the_wrong_type(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe('[bench]\nthreads = "all"\n')
    line = refused("run", path, "--out", tmp_path / "out")
    assert (
        line
        == f'{path}: `bench.threads` = "all" has the wrong type or value: expected a whole number'
    )


def test_a_missing_recipe(refused: Refused, tmp_path: Path) -> None:
    assert "no such recipe" in refused("run", tmp_path / "absent.toml")


def test_a_bad_set(refused: Refused, recipe: Callable[..., Path]) -> None:
    assert refused("run", recipe(), "--set", "masks.ratio=0.3").startswith(
        "--set masks.ratio=0.3: unknown key `masks.ratio`"
    )


def test_a_budget_that_no_mask_can_meet(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused("run", recipe(), "--set", "masks.params=0.001", "--out", tmp_path / "out")
    assert "params = 0.001: not feasible" in line
    assert "the smallest is 0." in line


def test_an_unknown_target(refused: Refused, recipe: Callable[..., Path], tmp_path: Path) -> None:
    assert "did you mean 'x86-64'?" in refused(
        "run", recipe(), "--set", "export.target=x86-6", "--out", tmp_path / "out"
    )


# ---- the model ----


def test_a_model_other_than_a_vision_transformer(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused(
        "run",
        recipe(),
        "--set",
        "model.name=resnet18",
        "--set",
        "model.overrides={}",
        "--out",
        tmp_path / "out",
    )
    assert "no rule for model type timm.models.resnet.ResNet" in line


def test_an_unknown_model_name(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused(
        "run", recipe(), "--set", "model.name=vit_tinny_patch16_224", "--out", tmp_path / "out"
    )
    assert "has no such model; the nearest is 'vit_tiny_patch16_224'" in line


def test_an_override_that_timm_rejects(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused("run", recipe(), "--set", "model.overrides.widths=3", "--out", tmp_path / "out")
    assert "timm cannot build it with" in line
    assert "widths" in line


def test_a_head_with_another_number_of_classes(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    line = refused(
        "run", recipe(), "--set", "model.overrides.num_classes=10", "--out", tmp_path / "out"
    )
    assert (
        line
        == "model.overrides.num_classes = 10, but the data set has 3 classes; leave num_classes out"
    )


def small_model(classes: int = 3, **overrides: int) -> torch.nn.Module:
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
    } | overrides
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes)


def test_a_checkpoint_that_does_not_fit(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(small_model(embed_dim=48).state_dict(), path)
    line = refused("run", recipe(), "--set", f"model.checkpoint={path}", "--out", tmp_path / "out")
    assert line.startswith(
        f"{path}: cls_token has shape [1, 1, 48], vit_tiny_patch16_224 needs [1, 1, 24]"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a complete checkpoint"),
        (b"PK\x03\x04broken", "not a complete checkpoint"),
        (None, "no such checkpoint"),
    ],
)
def test_a_damaged_checkpoint(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "broken.pth"
    if content is not None:
        path.write_bytes(content)
    line = refused("run", recipe(), "--set", f"model.checkpoint={path}", "--out", tmp_path / "out")
    assert line.startswith(f"{path}: {words}")


def test_a_checkpoint_that_could_run_code_is_not_read(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "whole.pth"
    torch.save(small_model(), path)
    line = refused("run", recipe(), "--set", f"model.checkpoint={path}", "--out", tmp_path / "out")
    assert line.startswith(f"{path}: it contains more than tensors and could run code")


def test_a_checkpoint_without_an_entry(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path, state = tmp_path / "incomplete.pth", small_model().state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    assert "it has no entry 'blocks.1.mlp.fc1.bias'" in refused(
        "train", recipe(), "--set", f"model.checkpoint={path}", "--out", tmp_path / "out"
    )


def test_a_checkpoint_with_nan(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path, state = tmp_path / "nan.pth", small_model().state_dict()
    state["norm.bias"][3] = float("nan")
    torch.save(state, path)
    assert "norm.bias contains NaN or infinity" in refused(
        "train", recipe(), "--set", f"model.checkpoint={path}", "--out", tmp_path / "out"
    )


# ---- the data ----


def test_an_unknown_data_set(refused: Refused, recipe: Callable[..., Path], tmp_path: Path) -> None:
    assert "did you mean 'cifar10'?" in refused(
        "run", recipe(), "--set", "data.name=cifar1", "--out", tmp_path / "out"
    )


def test_an_empty_data_set(refused: Refused, recipe: Callable[..., Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "train" / "ant").mkdir(parents=True)
    assert str(empty) in refused(
        "run", recipe(), "--set", f"data.name=imagefolder:{empty}", "--out", tmp_path / "out"
    )


def test_a_data_set_of_one_class(
    refused: Refused, recipe: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        for name in ("bee", "fly"):
            for file in (photos / part / name).iterdir():
                file.unlink()
            (photos / part / name).rmdir()
    line = refused("run", recipe(), "--out", tmp_path / "out")
    assert str(photos) in line
    assert "at least two" in line


def test_a_corrupt_image(
    refused: Refused, recipe: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    broken = photos / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert str(broken) in refused("run", recipe(), "--out", tmp_path / "out")


# ---- the disk ----


def test_an_output_folder_that_is_not_empty(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("my only copy")
    for flag in ([], ["--overwrite"], ["--resume"]):
        line = refused("run", recipe(), "--out", out, *flag)
        assert (
            line == f"{out}: the output folder is not empty and is not a run that vitrim wrote "
            "(it holds thesis.txt), so it is not replaced; name another folder"
        )
    assert (out / "thesis.txt").read_text() == "my only copy"


def test_a_file_where_the_output_folder_should_be(
    refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    assert (
        refused("run", recipe(), "--out", out)
        == f"{out}: a file is in the way of the output folder; name another folder"
    )


def test_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, out = recipe(), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on the disk" in refused("train", path, "--out", out)


# ---- other commands ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compact"], "no model: name MODEL or --checkpoint"),
        (["compact", "--checkpoint", "m.pth"], "name their model with --model NAME"),
        (["compact", "--checkpoint", "{tmp}"], "architecture.json: no such file"),
        (
            ["compact", "--mask", "a", "--keep-ratio", "0.5"],
            "--mask and --keep-ratio both select what is kept",
        ),
        (["export", "{tmp}/absent", "--out", "{tmp}/new"], "architecture.json: no such file"),
        (
            ["export", "{tmp}", "--out", "{tmp}/new", "--batch", "0"],
            "--batch 0: give a whole number of at least 1",
        ),
        (["bench", "{tmp}/absent.onnx"], "no such file"),
        (["bench", "{tmp}"], "no artifact (there is no manifest.json)"),
        (
            ["report", "{tmp}"],
            "contains no measurements; name a folder that `vitrim run` or `vitrim bench --out` "
            "wrote",
        ),
        (["compare", "{tmp}"], "a comparison needs two measurements or more"),
        (["compare", "{tmp}/a.json", "{tmp}/b.json"], "a.json: cannot be read"),
        (["targets", "show", "rpi44"], "did you mean 'rpi4'?"),
        (["targets", "check", "rpi4", "{tmp}"], "architecture.json: no such file"),
    ],
)
def test_invalid_input_of_other_commands(
    refused: Refused, tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in refused(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
