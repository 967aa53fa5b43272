"""Data sets that are not decoded as a whole, on the command line: one line, exit code 2."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from photo_folder import write_photos, write_recipe
from PIL import Image
from vitrim.cli import call
from warm_processes import start_vitrim

Refused = Callable[..., str]
LAZY = ("--set", "data.cache_gb=0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Trains with a recipe that must end with exit code 2; returns the error line."""

    def check(recipe: Path, *arguments: str) -> str:
        out = tmp_path / "out"
        code = call(["train", str(recipe), "--out", str(out), *arguments])
        captured = capsys.readouterr()
        assert code == 2, captured
        errors = [line for line in captured.err.splitlines() if line.startswith("vitrim: ")]
        assert len(errors) == 1, captured.err
        assert "Traceback" not in captured.err
        return errors[0].removeprefix("vitrim: ")

    return check


def tars(folder: Path, train: int = 48, label: int = 0) -> Path:
    """Tars of noise in three colours, `train` images and 12 for validation."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for part, count in (("train-0", train // 2), ("train-1", train // 2), ("val-0", 12)):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for number in range(count):
                pixels = noise.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, number % 3] += 120
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                target = label if label and part == "val-0" else number % 3
                for ending, data in (("png", buffer.getvalue()), ("cls", b"%d" % target)):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def recipe_for(tmp_path: Path, name: str) -> Path:
    path = write_recipe(tmp_path / "trial.toml", tmp_path / "photos")
    text = path.read_text().replace(f"imagefolder:{tmp_path / 'photos'}", name)
    path.write_text(text)
    return path


def test_a_tar_that_ends_early(tmp_path: Path, refused: Refused) -> None:
    folder = tars(tmp_path / "tars")
    tar = folder / "train-1.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    line = refused(recipe_for(tmp_path, f"webdataset:{folder}"))
    assert line == f"{tar}: the tar ends early, at byte 2000; fetch or write it again"
    assert not (tmp_path / "out").exists()


def test_a_label_outside_the_classes(tmp_path: Path, refused: Refused) -> None:
    folder = tars(tmp_path / "tars", label=9)
    line = refused(recipe_for(tmp_path, f"webdataset:{folder}"))
    assert line.startswith(f"{folder}/val-0.tar, image at byte ")
    assert "label 9 does not occur in the training split; correct it, or add such images" in line
    assert not (tmp_path / "out").exists()


def test_zero_images(tmp_path: Path, refused: Refused) -> None:
    folder = tars(tmp_path / "tars", train=0)
    for more in ((), ("--set", "data.streaming=true")):
        line = refused(recipe_for(tmp_path, f"webdataset:{folder}"), *more)
        assert "images" in line
    assert not (tmp_path / "out").exists()


def test_a_stream_cannot_be_cut_in_closed_form(tmp_path: Path, refused: Refused) -> None:
    recipe = recipe_for(tmp_path, f"webdataset:{tars(tmp_path / 'tars')}")
    options = ("--set", "data.streaming=true", "--set", 'masks.method="closed-form"')
    line = refused(recipe, *options)
    assert line.startswith("data.streaming: a closed-form cut and a choice of tokens read single")
    assert not (tmp_path / "out").exists()


def test_no_disk_for_the_cache(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrim.compress.data.decoding.MEMORY_LIMIT_BYTES", 0)
    monkeypatch.setattr("vitrim.compress.data.decoding._write", full)
    line = refused(write_recipe(tmp_path / "trial.toml", photos))
    assert "cache" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_in_the_middle(tmp_path: Path, refused: Refused, workers: str) -> None:
    photos = write_photos(tmp_path / "photos", train=16)
    bad = photos / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    recipe = write_recipe(tmp_path / "trial.toml", photos)
    line = refused(recipe, *LAZY, "--set", f"train.workers={workers}")
    assert line.startswith(f"{bad}: not a readable image (")
    assert line.endswith('or skip such images with data.on_error = "skip"')


def test_skipped_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "photos", train=16)
    for label in ("ant", "bee"):
        for number in range(4):
            (photos / "train" / label / f"{number}.png").write_bytes(b"text")
    recipe = write_recipe(tmp_path / "trial.toml", photos)
    out = tmp_path / "out"
    skip = ("--set", "data.on_error=skip", "--set", "train.workers=1")
    assert call(["train", str(recipe), "--out", str(out), *LAZY, *skip]) == 0
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert all(3 <= line["skipped_images"] <= 8 for line in lines)
    assert "unreadable images skipped, e.g. " in capsys.readouterr().err


def killed_within_an_epoch(arguments: Sequence[str], out: Path) -> None:
    """Train in a process, which is killed after its first checkpoint."""
    checkpoint = out / "training" / "baseline" / "checkpoint.pt"
    process = start_vitrim(*arguments, log=out)
    process.wait_until(checkpoint.is_file)
    time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.errors()


def test_training_continues_within_an_epoch_after_a_kill(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", train=80)
    recipe = write_recipe(tmp_path / "trial.toml", photos)
    more = ["--set", "train.workers=1", "--set", "baseline.epochs=3", "--set", "train.batch_size=4"]
    more += ["--set", "train.checkpoint_minutes=0.0001", "--set", "baseline.augmentation=imagenet"]

    def command(name: str, *options: str) -> list[str]:
        return ["train", str(recipe), "--out", str(tmp_path / name), *LAZY, *more, *options]

    assert call(command("whole")) == 0
    killed_within_an_epoch(command("killed"), tmp_path / "killed")
    history = tmp_path / "killed" / "history.jsonl"
    epochs = history.read_text().count("\n") if history.is_file() else 0
    assert epochs < 3
    assert call(command("killed", "--resume")) == 0
    found = [
        [
            {key: line[key] for key in ("epoch", "loss", "train_top1", "val_top1")}
            for line in map(
                json.loads, (tmp_path / name / "history.jsonl").read_text().splitlines()
            )
        ]
        for name in ("whole", "killed")
    ]
    assert len(found[0]) == 3
    assert found[1] == found[0]


def test_data_that_changed_since_a_kill_is_refused(tmp_path: Path, refused: Refused) -> None:
    folder = tars(tmp_path / "tars", train=100)
    recipe = recipe_for(tmp_path, f"webdataset:{folder}")
    more = ["--set", "data.streaming=true", "--set", "train.batch_size=4"]
    more += ["--set", "train.checkpoint_minutes=0.0001", "--set", "baseline.epochs=50"]
    more += ["--set", "baseline.patience_epochs=50"]
    out = tmp_path / "out"
    killed_within_an_epoch(["train", str(recipe), "--out", str(out), *more], out)
    checkpoint = out / "training" / "baseline" / "checkpoint.pt"
    os.utime(folder / "train-1.tar", (1, 1))
    line = refused(recipe, *more, "--resume")
    assert line == (
        f"{checkpoint}: the data changed since it was written (a file was added, removed or "
        "rewritten); restore what it was, or start again without --resume"
    )
