"""`vitrim compact --tokens`: counts, budgets, records, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vitrim
from photo_folder import write_photos
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app, call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_photos(folder / "photos")
    vitrim.save(tiny_vit(depth=3, img_size=32), folder / "model")
    vitrim.save(tiny_vit(depth=3, img_size=32, num_classes=0, global_pool=""), folder / "dense")
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def compact(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compact", "model", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_budget_is_met_from_images_without_labels() -> None:
    data = ["--data", "images:photos", "--macs", "0.6"]
    shown = compact("--tokens", "patch-slimming", *data, "--out", "slim")
    assert "patch-slimming on 36 images of images:photos, without labels" in shown
    assert "masked against compact" in shown
    record = json.loads(Path("slim", "tokens.json").read_text())
    assert record["schema"] == "vitrim.tokens/1"
    assert record["macs_share"] <= 0.6
    architecture = vitrim.load("slim").architecture
    assert list(record["counts"].values()) == [architecture.tokens, *architecture.step_tokens()]
    # Patches that never enter save their embedding, and are scored like the others.
    assert architecture.tokens < 17
    assert f"17 of the grid, {architecture.tokens} after the stem" in shown
    assert "stem.out" in record["scores"]
    assert {len(score) for score in record["scores"].values()} == {17}
    mask = vitrim.StructuredMask.load(Path("slim", "mask.safetensors"))
    assert list(mask.kept) == ["token"]
    assert (mask.note["tokens"], mask.note["data"]) == ("patch-slimming", "images:photos")
    # A second choice of the same folder replaces all of its files.
    compact("--tokens", "random", "--macs", "0.8", "--out", "slim", "--overwrite")
    assert json.loads(Path("slim", "tokens.json").read_text())["method"] == "random"


def test_given_counts_and_widths_are_cut_in_one_call() -> None:
    shown = compact("--tokens", "radial", "--token-counts", "17,9,1", "--keep-ratio", "0.5")
    assert "after each block 17, 9, 1" in shown
    arguments = ["--token-counts", "12,9,1", "--saliency", "l2", "--out", "both"]
    compact("--tokens", "radial", *arguments)
    mask = vitrim.StructuredMask.load(Path("both", "mask.safetensors"))
    assert {"token", "embed", "ffn"} <= set(mask.kept)
    assert vitrim.load("both").architecture.step_tokens() == (12, 12, 9, 9, 1, 1)
    # The mask that is saved gives this network again.
    again = vitrim.compact(vitrim.load("model"), mask)
    assert again.architecture == vitrim.load("both").architecture


def test_a_schedule_distributes_the_budget() -> None:
    shown = compact("--tokens", "random", "--macs", "0.7", "--token-schedule", "constant")
    counts = shown.split("after each block ")[1].split(";")[0].split(", ")
    assert counts[0] == counts[1]
    assert counts[2] == "1"


def test_a_tolerance_determines_the_counts_and_refits_blocks() -> None:
    data = ["--data", "images:photos", "--token-tolerance", "0.1"]
    shown = compact("--tokens", "patch-slimming", *data, "--out", "tolerant")
    first, second = (line for line in shown.splitlines() if line.startswith("blocks."))
    assert first.startswith("blocks.0.attn: relative error ")
    assert first.endswith(" of the next block")
    # The last block keeps the class token alone, so its tokens are not chosen.
    assert second.startswith("blocks.1.attn: ")
    assert second.endswith(" of the next block")
    record = json.loads(Path("tolerant", "tokens.json").read_text())
    assert record["errors"]["blocks.1.attn"] <= 0.1
    assert vitrim.load("tolerant").architecture.step_tokens()[-1] == 1


def test_the_error_of_the_last_block_of_a_pooling_head_is_that_of_the_features() -> None:
    vitrim.save(tiny_vit("vit_medium_patch16_gap_240", depth=2, img_size=32), "pooling")
    data = ["--data", "images:photos", "--token-tolerance", "0.1"]
    result = CliRunner().invoke(app, ["compact", "pooling", "--tokens", "patch-slimming", *data])
    assert result.exit_code == 0, result.output
    first, last = (line for line in result.output.splitlines() if line.startswith("blocks."))
    assert first.endswith(" of the next block")
    assert last.startswith("blocks.1.attn: relative error ")
    assert last.endswith(" of the features")


NEEDED = ["--tokens", "radial"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "magic", "--macs", "0.6"], "--tokens magic: choose one of patch-slimming"),
        (
            ["--tokens", "scop", "--macs", "0.6"],
            "--tokens scop needs images: name them with --data",
        ),
        (NEEDED, "--tokens radial needs the number of tokens: --macs"),
        ([*NEEDED, "--macs", "0.6", "--token-counts", "9,9,1"], "--macs and --token-counts both"),
        ([*NEEDED, "--token-counts", "9,9"], "--token-counts: 2 numbers; give one for each of"),
        ([*NEEDED, "--token-counts", "9,10,1"], "--token-counts: 10 tokens at blocks.1, after 9"),
        ([*NEEDED, "--token-counts", "18,9,1"], "18 tokens at blocks.0.attn; the network carries"),
        ([*NEEDED, "--token-counts", "9,x,1"], "--token-counts 9,x,1: give whole numbers"),
        ([*NEEDED, "--macs", "0.05"], "--macs = 0.05: with the fewest tokens"),
        ([*NEEDED, "--macs", "1.5"], "--macs 1.5: give the share to keep"),
        ([*NEEDED, "--macs", "0.6", "--token-schedule", "cosine"], "choose one of error"),
        ([*NEEDED, "--token-counts", "9,9,1", "--token-schedule", "linear"], "keep one"),
        ([*NEEDED, "--token-tolerance", "0.1"], "belongs to --tokens patch-slimming, not to rad"),
        (["--token-counts", "9,9,1"], "--token-counts belongs to --tokens"),
        ([*NEEDED, "--macs", "0.6", "--mask", "m"], "--tokens and --mask both select"),
        ([*NEEDED, "--macs", "0.6", "--without-training"], "--tokens and --without-training"),
        ([*NEEDED, "--params", "0.6"], "--tokens and --params"),
        ([*NEEDED, "--macs", "0.6", "--round-to", "8"], "--round-to rounds widths"),
        ([*NEEDED, "--macs", "0.6", "--data", "images:photos"], "--data images:photos: only"),
    ],
)
def test_invalid_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(["compact", "model", *arguments]) == 2
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len([line for line in shown.splitlines() if line.startswith("vitrim: ")]) == 1


def test_a_network_that_returns_every_token_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["compact", "dense", *NEEDED, "--macs", "0.6"]) == 2
    assert "the network returns every token" in capsys.readouterr().err


def test_sets_that_are_not_nested_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"blocks.0.attn": torch.arange(17) < 9, "blocks.1.attn": torch.arange(17) < 10}
    vitrim.StructuredMask({"token": sets}).save("returning.safetensors")
    assert call(["compact", "model", "--mask", "returning.safetensors"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    site = "vitrim: mask token/blocks.1.attn keeps 1 tokens that an earlier site has dropped"
    assert f"{site}, the first is token 9; the sets must be nested" in shown
    assert shown.count("vitrim: ") == 1


def test_a_mask_of_another_image_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    vitrim.save(tiny_vit(depth=3, img_size=24), "smaller")
    compact("--tokens", "radial", "--macs", "0.7", "--out", "radial")
    mask = Path("radial", "mask.safetensors")
    assert call(["compact", "smaller", "--mask", str(mask)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "has 17 entries, the model has 10 (9 patches at 24x24, 1 learned)" in shown
    assert "the mask is of another number of patches, that of another image size" in shown
    assert "then resize the result (vitrim.resized, vitrim export --image-size)" in shown
    # The way out: cut at the size of the mask, and export the result for the other one.
    assert call(["export", "radial", "--image-size", "24", "--out", "at24"]) == 0
    shown = capsys.readouterr().out
    assert "image size 24x24: the model was trained at 32x32" in shown
    assert "image size 24x24: the map of where patches leave was resampled" in shown
    # Nor does it fit a network that dropped tokens before.
    assert call(["compact", "radial", "--mask", str(mask)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "which has dropped tokens already; make a mask for this model" in shown
