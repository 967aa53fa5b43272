"""`vitrim compact`: by a mask, by saliencies of weights and of images, and of dead weight alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from photo_folder import CLASSES, write_photos
from torch.nn.utils import prune
from typer.testing import CliRunner
from vitrim import StructuredMask, lift, load, save
from vitrim.cli import app, call
from vitrim.commands import model_data
from vitrim.compress.data.loading import open_sample
from vitrim.compress.data.named_datasets import default_preprocessing
from vitrim.compress.network.architecture import FfnSpec
from vitrim.core.errors import InputError

SETTINGS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
OVERRIDES = [word for key, value in SETTINGS.items() for word in ("--override", f"{key}={value}")]


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", **SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prune.ln_structured(model.get_submodule("blocks.0.mlp.fc1"), "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(model.get_submodule("blocks.1.mlp.fc2"), "weight", 0.3)
    torch.save(model.state_dict(), tmp_path / "pruned.pth")
    return tmp_path / "pruned.pth"


def test_without_a_mask_dead_weight_is_removed(pruned: Path, tmp_path: Path) -> None:
    arguments = [
        "compact",
        "--checkpoint",
        str(pruned),
        "--model",
        "vit_tiny_patch16_224",
        *OVERRIDES,
        "--out",
        str(tmp_path / "small"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (
        "blocks.0.ffn: 48 of 96 ffn units are dead, constant ones folded into a bias"
        in result.output
    )
    assert "zeros that remain:" in result.output
    assert load(tmp_path / "small").architecture.branches[1].core.hidden == 48  # type: ignore[union-attr]


def test_rounding_needs_a_mask(pruned: Path) -> None:
    result = CliRunner().invoke(
        app,
        [
            "compact",
            "--checkpoint",
            str(pruned),
            "--model",
            "vit_tiny_patch16_224",
            *OVERRIDES,
            "--round-to",
            "8",
        ],
    )
    assert result.exit_code != 0


def test_explain_names_the_tensors_and_the_masks(pruned: Path) -> None:
    arguments = [
        "compact",
        "--checkpoint",
        str(pruned),
        "--model",
        "vit_tiny_patch16_224",
        *OVERRIDES,
        "--explain",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "core.fc1.weight" in line)
    assert "96 x 24" in line
    assert "48 x 24" in line
    assert "ffn/blocks.0.ffn" in line


def test_a_checkpoint_is_cut_verified_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "model.pth", tmp_path / "small"
    sizes = {key: value for key, value in SETTINGS.items() if key != "num_classes"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    torch.save(model.state_dict(), path)
    command = ["compact", "--checkpoint", str(path), "--model", "vit_tiny_patch16_224"]
    for key, value in sizes.items():
        command += ["--override", f"{key}={value}"]
    command += ["--keep-ratio", "0.5", "--saliency", "l2", "--explain", "--out", str(out)]
    assert call(command) == 0
    shown = capsys.readouterr().out
    assert "blocks.0.attn" in shown
    assert "masked against compact" in shown
    small = sum(parameter.numel() for parameter in load(out).parameters())
    assert small < 0.7 * sum(value.numel() for value in torch.load(path).values())
    assert call(["targets", "check", "rpi4", str(out)]) == 0
    assert "it fits" in capsys.readouterr().out
    assert call(command) == 2
    assert "not empty" in capsys.readouterr().err


# ---- saliencies of images ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of three classes and a model of three classes."""
    folder = tmp_path_factory.mktemp("saliency")
    write_photos(folder / "photos")
    torch.manual_seed(0)
    save(
        lift(
            timm.create_model("vit_tiny_patch16_224", **{**SETTINGS, "num_classes": len(CLASSES)})
        ),
        folder / "model",
    )
    return folder


def compacted(*arguments: object) -> str:
    """Standard output of a successful run."""
    result = CliRunner().invoke(app, ["compact", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: object) -> str:
    """The error line of a refused run."""
    result = CliRunner().invoke(app, ["compact", *map(str, arguments)])
    assert isinstance(result.exception, InputError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_taylor_uses_the_images_and_records_them(place: Path, tmp_path: Path) -> None:
    data = f"imagefolder:{place / 'photos'}"
    shown = compacted(
        place / "model",
        "--saliency",
        "taylor",
        "--data",
        data,
        "--samples",
        12,
        "--seed",
        3,
        "--out",
        tmp_path / "small",
    )
    assert f"taylor saliency on 12 training images of {data}" in shown
    assert "masked against compact" in shown
    mask = StructuredMask.load(tmp_path / "small" / "mask.safetensors")
    assert mask.note == {
        "saliency": "taylor",
        "scope": "global",
        "keep_ratio": "0.5",
        "data": data,
        "split": "train",
        "images": "12",
        "seed": "3",
    }
    source = load(place / "model")
    split = open_sample(
        data,
        "train",
        12,
        preprocessing=default_preprocessing(data, (3, 16, 16), source.architecture.data),
        classes=3,
        draw_seed=3,
    )
    expected = StructuredMask.from_saliency(
        source, "taylor", scope="global", data=[(split.floats(), split.batch(slice(None))[1])]
    )
    assert all(torch.equal(keep, expected.kept[dimension][site]) for dimension, site, keep in mask)
    small = load(tmp_path / "small").architecture
    (channels,) = expected.kept["embed"].values()
    assert small.embed == int(channels.sum())
    # The saved mask reproduces the model.
    compacted(
        place / "model",
        "--mask",
        tmp_path / "small" / "mask.safetensors",
        "--out",
        tmp_path / "again",
    )
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "small" / "model.safetensors"
    ).read_bytes()


def test_head_cuts_heads_only(place: Path, tmp_path: Path) -> None:
    data = f"imagefolder:{place / 'photos'}"
    compacted(
        place / "model",
        "--saliency",
        "head",
        "--keep-ratio",
        0.67,
        "--data",
        data,
        "--out",
        tmp_path / "small",
    )
    mask = StructuredMask.load(tmp_path / "small" / "mask.safetensors")
    assert {(dimension, int(keep.sum())) for dimension, _, keep in mask} == {("head", 2)}
    # All images except the tenth that is held out.
    assert mask.note["images"] == "22"


def test_rounding_uses_the_scores_of_the_images(place: Path, tmp_path: Path) -> None:
    arguments = (
        place / "model",
        "--saliency",
        "taylor",
        "--data",
        f"imagefolder:{place / 'photos'}",
        "--keep-ratio",
        0.6,
    )
    compacted(*arguments, "--out", tmp_path / "free")
    compacted(*arguments, "--round-to", 8, "--out", tmp_path / "round")
    free, rounded = (
        StructuredMask.load(tmp_path / name / "mask.safetensors") for name in ("free", "round")
    )
    assert rounded.note["round_to"] == "8"
    assert rounded.note["saliency"] == "taylor"
    for branch in load(tmp_path / "round").architecture.branches:
        if isinstance(branch.core, FfnSpec):
            assert branch.core.hidden % 2 == 0
            one, other = free.kept["ffn"][branch.name], rounded.kept["ffn"][branch.name]
            # The scores are the same, so one list contains the other.
            assert bool((one <= other).all()) or bool((other <= one).all())


def test_the_images_are_those_of_the_run_of_the_model(place: Path, tmp_path: Path) -> None:
    data = f"imagefolder:{place / 'photos'}"
    save(load(place / "model"), tmp_path / "run" / "baseline")
    preprocessing = default_preprocessing(data, (3, 16, 16)).model_dump(mode="json")
    card = {
        "schema": "vitrim.data/1",
        "name": data,
        "seed": 5,
        "validation": 0.25,
        "preprocessing": preprocessing,
    }
    (tmp_path / "run" / "data.json").write_text(json.dumps(card))
    shown = compacted(tmp_path / "run" / "baseline", "--saliency", "taylor")
    assert f"on 18 training images of {data}" in shown, "the run held out a quarter of 24"


def test_a_long_pass_over_the_images_shows_a_bar_on_a_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(model_data, "PATIENCE_S", -1.0)
    monkeypatch.setattr(model_data, "BATCH", 8)
    shown = compacted(
        place / "model", "--saliency", "taylor", "--data", f"imagefolder:{place / 'photos'}"
    )
    assert "taylor saliency" in shown.split("on 22 training")[0]
    assert "22/22" in shown


def test_the_default_criterion_is_the_best_one_for_what_is_given(
    place: Path, tmp_path: Path
) -> None:
    data = f"imagefolder:{place / 'photos'}"
    for name, more, expected in (
        ("alone", [], {"saliency": "l2", "scope": "layer"}),
        ("labelled", ["--data", data], {"saliency": "fisher", "scope": "global"}),
    ):
        compacted(place / "model", "--keep-ratio", "0.7", *more, "--out", tmp_path / name)
        note = StructuredMask.load(tmp_path / name / "mask.safetensors").note
        assert {key: note[key] for key in expected} == expected


def test_labels_are_needed_for_the_default_criterion_of_images(place: Path) -> None:
    photos = f"images:{place / 'photos'}"
    shown = refusal(place / "model", "--keep-ratio", "0.7", "--data", photos)
    assert "only --saliency taylor, fisher and head use images" in shown


def test_invalid_options_of_saliencies_are_refused(
    place: Path, pruned: Path, tmp_path: Path
) -> None:
    model, photos = place / "model", f"imagefolder:{place / 'photos'}"
    assert refusal(model, "--saliency", "tailor").endswith("; did you mean 'taylor'?")
    assert refusal(model, "--saliency", "taylor") == (
        "--saliency taylor needs images: name them with --data, e.g. --data fashion-mnist or "
        "--data imagefolder:PATH"
    )
    assert "only --saliency taylor, fisher and head use images" in refusal(
        model, "--saliency", "l2", "--data", photos
    )
    assert "only --saliency taylor, fisher and head use images" in refusal(model, "--data", photos)
    assert "did you mean 'cifar10'?" in refusal(model, "--saliency", "taylor", "--data", "cifar1")
    assert (
        refusal(model, "--mask", "m.safetensors", "--saliency", "l1")
        == "--mask and --saliency both select what is kept; keep one"
    )
    assert refusal(model, "--checkpoint", pruned).startswith("two models: ")
    assert "scope = 'local'" in refusal(
        model, "--saliency", "taylor", "--data", photos, "--scope", "local"
    )
    assert "keep_ratio embed = 1.5" in refusal(
        model, "--saliency", "taylor", "--data", photos, "--keep-ratio", "1.5"
    )
    line = refusal(
        pruned,
        "--model",
        "vit_tiny_patch16_224",
        *OVERRIDES,
        "--saliency",
        "taylor",
        "--data",
        photos,
        "--out",
        tmp_path / "out",
    )
    assert (
        line
        == f"{photos} has 3 classes, but the model has 5 outputs; name the data set that it was "
        "trained on"
    )
    assert not (tmp_path / "out").exists()
