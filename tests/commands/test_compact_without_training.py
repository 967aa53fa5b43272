"""`vitrim compact --without-training`: from a folder of images, or from a data set of `--data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import vitrim
from photo_folder import write_photos
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app, call
from vitrim.compress.network.count import count_macs, count_params


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    write_photos(folder / "photos")
    vitrim.save(tiny_vit(depth=3), folder / "model")
    vitrim.save(tiny_vit(depth=3, num_classes=0), folder / "backbone")
    return folder


@pytest.mark.parametrize(
    ("model", "data", "budget"),
    [
        ("model", "images:photos", ["--macs", "0.8"]),
        ("model", "imagefolder:photos", ["--params", "0.7"]),
        ("backbone", "images:photos/train/ant", ["--macs", "0.8"]),
    ],
)
def test_a_budget_is_met_from_images_without_labels(
    place: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str, budget: list[str]
) -> None:
    monkeypatch.chdir(place)
    out = f"small-{model}-{budget[0].strip('-')}-{len(data)}"
    arguments = ["compact", model, "--without-training", "--data", data, *budget]
    result = CliRunner().invoke(app, [*arguments, "--round-to", "4", "--out", out, "--explain"])
    assert result.exit_code == 0, result.output
    dense, small = vitrim.load(model).architecture, vitrim.load(out).architecture
    count = count_macs if budget[0] == "--macs" else count_params
    exported = dense.model_copy(update={"last_queries": True})
    assert count(small) <= float(budget[1]) * count(exported)
    for words in ("without labels", "cosine to the dense features", "-> ", "ridge"):
        assert words in result.output
    record = json.loads(Path(out, "trim.json").read_text())
    assert record["schema"] == "vitrim.trim/1"
    assert vitrim.StructuredMask.load(Path(out, "mask.safetensors")).note["data"] == data
    assert ("same class" in result.output) == (model == "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--without-training"], "needs one budget: --macs or --params"),
        (["--without-training", "--macs", "0.5", "--params", "0.5"], "needs one budget"),
        (["--without-training", "--macs", "1.5"], "--macs 1.5: give the share to keep"),
        (["--without-training", "--macs", "0.5"], "--without-training needs images"),
        (["--macs", "0.5"], "--macs is a budget of --without-training"),
        (["--without-training", "--macs", "0.5", "--keep-ratio", "0.5"], "keep one"),
        (
            ["--without-training", "--macs", "0.01", "--data", "images:photos"],
            "--macs = 0.01: the stem and the head",
        ),
        (["--without-training", "--macs", "0.5", "--data", "images:absent"], "no such folder"),
        (["--without-training", "--macs", "0.5", "--data", "images:model"], "no images in it"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(place)
    assert call(["compact", "model", *arguments, "--out", "refused"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("refused").exists()
