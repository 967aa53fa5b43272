"""Where a run trains: devices, trackers, JSON lines, dry runs, and keys that repeat no step."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vitrim.cli import call
from vitrim.core.errors import InputError
from vitrim.pipeline.dry_run import dry_run
from vitrim.pipeline.recipe import load_recipe, recipe_names
from vitrim.pipeline.run import run

RECIPE = """
[data]
name = "quickstart"
limit = 64

[model.overrides]
img_size = 28
patch_size = 7
in_chans = 1
embed_dim = 32
depth = 2
num_heads = 2
num_classes = 10

[baseline]
epochs = 2
warmup_epochs = 0
augmentation = "none"

[masks]
params = 0.5
epochs = 2
augmentation = "thesis"

[finetune]
epochs = 1

[train]
batch_size = 32
threads = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.device=cuda", 'train.device = "cuda": torch'),
        ("train.precision=fp16", 'train.precision = "fp16" needs a GPU, and training runs on'),
        ("train.device=tpu", "train.device"),
        ("train.accumulate=3", "batch_size = 32 cannot be divided in 3 equal parts"),
        ("train.ema=1.5", "train.ema"),
        ("train.trackers=['wandb','wandb']", "a tracker is listed twice"),
    ],
)
def test_a_recipe_that_cannot_train_here_is_refused_in_one_line(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ([], ["--dry-run"]):
        out = tmp_path / "run"
        assert call(["run", str(recipe), "--set", change, "--out", str(out), *options]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
        assert not out.exists()


def test_fp16_on_a_cpu_is_refused_when_the_recipe_is_read(recipe: Path) -> None:
    recipe.write_text(RECIPE + 'device = "cpu"\nprecision = "fp16"\n')
    with pytest.raises(InputError, match='"fp16" needs a GPU; with device = "cpu" write "bf16"'):
        load_recipe(recipe)


def test_training_on_the_cpu_for_want_of_a_gpu_is_reported(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "no GPU is found (CUDA or MPS); training runs on the CPU" in capsys.readouterr().err


def test_a_run_continues_with_another_device_and_other_trackers(recipe: Path) -> None:
    sections = ("data", "model", "baseline", "train")
    base = load_recipe(recipe).fingerprint(*sections)
    for change in ("device=cpu", "precision=bf16", "compile=true", "workers=2", "threads=2"):
        assert load_recipe(recipe, [f"train.{change}"]).fingerprint(*sections) == base
    for change in ("accumulate=2", "grad_clip=0", "ema=0.99", "batch_size=16"):
        assert load_recipe(recipe, [f"train.{change}"]).fingerprint(*sections) != base


def test_options_of_dense_training_reach_it(recipe: Path, tmp_path: Path) -> None:
    changes = [
        *("train.ema=0.9", "train.layer_decay=0.75", "train.drop_path=0.2"),
        *("train.accumulate=2", "train.grad_clip=0"),
    ]
    run(load_recipe(recipe, changes), tmp_path / "run", until="finetune", quiet=True)
    run(load_recipe(recipe), tmp_path / "plain", until="finetune", quiet=True)
    models = [(tmp_path / name / "compact/model.safetensors") for name in ("run", "plain")]
    assert models[0].read_bytes() != models[1].read_bytes()


def test_json_progress_is_one_line_an_epoch_on_standard_output(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path / "run"), "--json-progress"]
    assert call(["compress", str(recipe), *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    history = (tmp_path / "run/history.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for line, record in zip(lines, map(json.loads, history), strict=True):
        assert line.pop("epochs") == 2
        assert line == record


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    changed = load_recipe(recipe, ['train.trackers=["mlflow"]'])
    with pytest.raises(InputError, match="mlflow is not installed; pip install mlflow, or leave"):
        run(changed, tmp_path / "run", quiet=True)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match="needs accelerate, which is not installed; pip install"):
        run(changed, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_epochs_are_logged_to_tensorboard(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    reader: Any = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    folder = tmp_path / "run"
    changed = load_recipe(recipe, ['train.trackers=["tensorboard"]'])
    run(changed, folder, until="masks", quiet=True)
    log = reader.EventAccumulator(str(folder / "trackers/tiny")).Reload()
    assert [event.step for event in log.Scalars("baseline/val_top1")] == [1, 2]
    assert [event.step for event in log.Scalars("masks/params")] == [3, 4]
    # The files of a tracker belong to the run.
    run(changed, folder, until="masks", quiet=True, overwrite=True)
    run(changed, folder, until="masks", quiet=True, resume=True)


def test_a_dry_run_estimates_every_training_and_writes_nothing(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["run", str(recipe), "--dry-run", "--quiet"]) == 0
    output = capsys.readouterr().out
    for phase, epochs, steps in (("baseline", 2, 4), ("masks", 2, 4), ("finetune", 1, 2)):
        assert re.search(
            rf"{phase} +up to {epochs} epochs, {steps} steps of [\d.e-]+ s: [\d.]+ minutes, "
            r"[\d.]+ GB \(estimated\)",
            output,
        )
    assert "nothing was written" in output
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    assert call(["run", str(recipe), "--dry-run", "--quiet", "--json-progress"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [phase["steps"] for phase in found["phases"]] == [4, 4, 2]


def test_estimated_memory_covers_weights_and_grows_with_the_batch(recipe: Path) -> None:
    small, large = (
        dry_run(load_recipe(recipe, [f"train.batch_size={size}"]), quiet=True) for size in (8, 64)
    )
    # fp32: the weight, its gradient and two moments.
    assert small.phases[0].memory_bytes > 16 * small.params
    assert large.phases[0].memory_bytes > small.phases[0].memory_bytes
    parts = dry_run(load_recipe(recipe, ["train.batch_size=64", "train.accumulate=8"]), quiet=True)
    assert parts.phases[0].memory_bytes < large.phases[0].memory_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("masks.params=0.0001", "not feasible; .* the smallest is"),
        ("data.name=imagefolder:missing", "missing"),
        ("model.checkpoint=missing.pth", "missing.pth"),
    ],
)
def test_a_dry_run_reports_what_is_missing(
    recipe: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert call(["run", str(recipe), "--dry-run", "--quiet", "--set", change]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_every_shipped_recipe_has_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrim.compress.data import fashion_mnist

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("vitrim.pipeline.dry_run.STEPS", 1)
    for name in recipe_names():
        recipe = load_recipe(name, ["train.threads=1"])
        local = recipe.data.name == "quickstart" or (
            recipe.data.name == "fashion-mnist" and fashion_mnist.installed_folder() is not None
        )
        checkpoint = recipe.model.checkpoint
        there = checkpoint in (None, "embedded") or Path(str(checkpoint)).exists()
        if local and there and not recipe.model.pretrained:
            assert dry_run(recipe, quiet=True).hours > 0.0
