"""`vitrim compact --select`: selections for each image, with cuts of widths, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vitrim
from photo_folder import write_photos
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app, call
from vitrim.compress.network.count import count_macs
from vitrim.compress.oneshot.choice import priced
from vitrim.core.console import unit_count


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    vitrim.save(tiny_vit(depth=3, img_size=32), folder / "model")
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def compact(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compact", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_selection_needs_no_data_and_no_training() -> None:
    shown = compact("model", "--select", "class-attention", "--select-ratio", "0.5", "--out", "few")
    assert "patches: 16, for each image 8 (select.1)" in shown
    small = vitrim.load("few")
    assert [select.patches for select in small.architecture.selects] == [8]
    chosen = vitrim.chosen_tokens(small, torch.randn(4, *small.architecture.image))
    assert chosen[0].shape == (4, 8)
    assert len({tuple(row.tolist()) for row in chosen[0]}) > 1


def test_widths_are_cut_in_the_same_call_and_in_a_second_one() -> None:
    stages = ["--select-stages", "0,1", "--select-counts", "12,6"]
    shown = compact("model", "--select", "evit", *stages, "--keep-ratio", "0.6", "--out", "both")
    assert "patches: 16, for each image 13 (select.0), 7 (select.1)" in shown
    assert "masked against compact" in shown
    shown = compact("both", "--saliency", "l2", "--keep-ratio", "0.8", "--explain", "--out", "less")
    assert "select.1" in shown
    selects = vitrim.load("less").architecture.selects
    assert [(s.name, s.patches, s.fused) for s in selects] == [
        ("select.0", 12, True),
        ("select.1", 6, True),
    ]


def test_the_rule_and_the_seed_are_those_of_the_options() -> None:
    few = ["--select", "random", "--select-ratio", "0.7", "--select-stages", "0,1"]
    shown = compact("model", *few, "--select-rule", "subtractive", "--seed", "5", "--out", "five")
    assert "patches: 16, for each image 11 (select.0), 8 (select.1)" in shown
    selects = vitrim.load("five").architecture.selects
    assert [select.seed for select in selects] == [5, 6]
    wanted = vitrim.select_tokens(
        vitrim.load("model"), "random", stages=[0, 1], rule="subtractive", seed=5
    )
    assert wanted.architecture.selects == selects


@pytest.mark.parametrize("widths", [[], ["--keep-ratio", "0.6"]])
def test_multiply_adds_are_counted_as_exported(widths: list[str]) -> None:
    shown = compact("model", "--select", "random", *widths, "--out", "priced", "--overwrite")
    dense, small = (vitrim.load(name).architecture for name in ("model", "priced"))
    counts = [unit_count(count_macs(priced(each))) for each in (dense, small)]
    assert f"MACs: {counts[0]} -> {counts[1]} (" in shown
    # A second cut of the result begins where the first one ended.
    again = compact("priced", "--saliency", "l2", "--keep-ratio", "0.9")
    assert f"MACs: {counts[1]} -> " in again


def test_buckets_are_calibrated_and_exported(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    images = ["--data", f"images:{tmp_path / 'photos'}", "--samples", "16"]
    few = ["--select", "class-attention", "--buckets", "3,6,11"]
    shown = compact("model", *few, "--mean-patches", "6.5", *images, "--out", "bucketed")
    assert "buckets of 16 images of images:" in shown
    assert "3 patches at select.1: " in shown
    assert "mean: " in shown
    model = vitrim.load_bucketed("bucketed")
    assert model.buckets.counts == (3, 6, 11)
    assert (model.buckets.images, model.buckets.rule) == (16, "divergence")
    assert "rule: predicted divergence at most e^" in shown
    # Of a model that has selections already, without images.
    vitrim.save(model.fixed(11), "eleven")
    shown = compact("eleven", "--buckets", "3,6,11", "--coverage", "0.9", "--out", "again")
    assert "rule: coverage 0.9000" in shown
    assert vitrim.load_bucketed("again").buckets.shares is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--buckets", "3,6"], "--buckets needs one of --mean-patches"),
        (["--buckets", "3,6", "--coverage", "0.5", "--mean-patches", "4"], "needs one of"),
        (["--coverage", "0.5"], "--coverage belongs to --buckets; add --buckets 60,98,137"),
        (["--bucket-rule", "coverage"], "--bucket-rule belongs to --buckets"),
        (
            ["--buckets", "3,6", "--coverage", "0.5", "--bucket-rule", "coverage"],
            "--bucket-rule and --coverage: a coverage is a rule of its own",
        ),
        (
            ["--buckets", "3,6", "--mean-patches", "4", "--bucket-rule", "best"],
            "--bucket-rule best: choose divergence or coverage",
        ),
        (["--buckets", "3,x", "--coverage", "0.5"], "--buckets 3,x: give whole numbers"),
        (["--buckets", "3,6", "--coverage", "0.5"], "selects no patches; call"),
        (
            ["--select", "evit", "--buckets", "3,6", "--coverage", "0.5"],
            "select.1: a fused token stands for the dropped patches",
        ),
        (
            ["--select", "class-attention", "--buckets", "3,6", "--mean-patches", "4"],
            "--mean-patches needs images: name them with --data",
        ),
        (
            ["--buckets", "3,6", "--coverage", "0.5", "--keep-ratio", "0.5"],
            "--buckets and --keep-ratio: cut the model first",
        ),
        (
            ["--select", "class-attention", "--buckets", "3,16", "--coverage", "0.5"],
            "buckets: counts: select.1 leaves 16 tokens behind the prefix, there are 16",
        ),
        (["--select", "magic"], "--select magic: choose one of class-attention, evit"),
        (["--select", "dynamicvit"], "--select dynamicvit: its predictors need training"),
        (["--select-ratio", "0.5"], "--select-ratio belongs to --select"),
        (["--select-rule", "geometric"], "--select-rule belongs to --select"),
        (["--select", "evit", "--select-ratio", "2"], "--select-ratio = 2.0: give a number above"),
        (
            ["--select", "random", "--select-ratio", "0.01"],
            "--select-ratio = 0.01 (geometric): no patch is left at block 1",
        ),
        (
            ["--select", "random", "--select-rule", "linear"],
            "--select-rule = 'linear': choose one of geometric, subtractive",
        ),
        (
            ["--select", "evit", "--select-rule", "subtractive"],
            "--select-rule = 'subtractive': evit keeps the same share",
        ),
        (
            ["--select", "random", "--select-counts", "9", "--select-rule", "subtractive"],
            "--select-rule = 'subtractive': --select-counts state what every stage keeps",
        ),
        (
            ["--select", "random", "--select-counts", "0,0"],
            "--select-counts: 0 patches at block 1; each stage needs one at least",
        ),
        (["--select", "evit", "--select-stages", "1,x"], "--select-stages 1,x: give whole numbers"),
        (
            ["--select", "evit", "--select-stages", "7"],
            "--select-stages: 7; the model has blocks 0 to 2",
        ),
        (
            ["--select", "evit", "--select-stages", "2"],
            "--select evit: select.2: nothing behind it reads patches; choose in an earlier block",
        ),
        (
            ["--select", "evit", "--select-ratio", "0.5", "--select-counts", "4"],
            "--select-ratio and --select-counts both state",
        ),
        (
            ["--select", "evit", "--tokens", "radial", "--macs", "0.6"],
            "--select and --tokens: cut the model first",
        ),
        (
            ["--select", "evit", "--without-training", "--macs", "0.7"],
            "--select and --without-training: cut",
        ),
    ],
)
def test_invalid_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(["compact", "model", *arguments]) == 2
    shown = capsys.readouterr().err.strip()
    assert words in shown
    assert len([line for line in shown.splitlines() if line.startswith("vitrim: ")]) == 1


def test_scores_by_a_register_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    vitrim.save(tiny_vit("vit_medium_patch16_reg4_gap_256", depth=3, img_size=32), "registers")
    assert call(["compact", "registers", "--select", "evit"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert 'no class token (pool "mean"); use --select column-attention' in shown
    assert "for each image 8 (select.1)" in compact(
        "registers", "--select", "column-attention", "--select-ratio", "0.5"
    )


def test_a_second_selection_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    compact("model", "--select", "random", "--out", "random")
    assert call(["compact", "random", "--select", "random"]) == 2
    assert "--select random: this network selects patches" in capsys.readouterr().err
