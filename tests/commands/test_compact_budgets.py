"""Budgets of `vitrim compact --without-training`: checked before any image is read, and fronts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import vitrim
from latency_tables import latency_table
from photo_folder import write_photos
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app, call
from vitrim.commands import compact_untrained
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.oneshot.budgets import file_bytes
from vitrim.pipeline import latency_loop

MODEL = ["compact", "model", "--data", "imagefolder:photos", "--round-to", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budgets")
    write_photos(folder / "photos")
    vitrim.save(tiny_vit(depth=2, num_classes=3), folder / "model")
    latency_table().save(folder / "costs.json")
    latency_table(precision="int8", batch=8).save(folder / "int8.json")
    return folder


def compacted(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*MODEL, *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latency-ms", "1e-5"], "--latency-ms 1e-05: the smallest latency that can be reached"),
        (
            ["--latency-ms", "1e-5", "--front", "3", "--out", "no"],
            "--latency-ms 1e-05: the smallest latency that can be reached is",
        ),
        (
            ["--latency-ms", "1", "--file-mb", "1e-3"],
            "--file-mb 0.001: the smallest weights that can be reached are",
        ),
        (
            ["--latency-ms", "1", "--file-mb", "1", "--peak-memory-mb", "1e-3"],
            "--peak-memory-mb 0.001: the smallest memory of weights and activations that can be",
        ),
        (["--file-mb", "1e-3"], "--file-mb 0.001: the stem and the head, which are not cut, are"),
        (["--macs", "1e-3"], "--macs 0.001: the stem and the head, which are not cut, are"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_before_images_are_read(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(place)

    def read(*arguments: object) -> None:
        raise AssertionError("images are read")

    monkeypatch.setattr(compact_untrained, "unlabeled_images", read)
    table = ["--cost-table", "costs.json"] if "--latency-ms" in arguments else []
    assert call([*MODEL, *table, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_the_file_has_the_precision_of_the_table(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    dense = vitrim.load("model").architecture
    whole_ms = latency_table().latency_ms(network_shape(dense))
    limits = ["--latency-ms", str(2 * whole_ms), "--keep-tokens"]
    limits += ["--file-mb", str(1.02 * file_bytes(dense, "int8") / 1e6)]
    shown = compacted(*limits, "--cost-table", "int8.json", "--out", "whole")
    assert f"--latency-ms {2 * whole_ms:g} is above the latency of the dense model" in shown
    assert vitrim.load("whole").architecture.branches[1] == dense.branches[1]
    compacted(*limits, "--cost-table", "costs.json", "--out", "small")
    small = vitrim.load("small").architecture
    assert file_bytes(small, "fp32") <= 1.02 * file_bytes(dense, "int8")


def test_each_size_of_a_front_is_measured_whatever_its_budget_is_of(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(latency_loop, "TIME_LIMIT_S", 0.3)
    shown = compacted("--front", "2", "--verify", "--out", "front")
    assert "measured (ms)" in shown
    sizes = json.loads(Path("front", "front.json").read_text())["sizes"]
    assert [size["folder"] for size in sizes] == ["", "macs-90", "macs-30"]
    for size in sizes:
        assert size["measured_ms"] > 0
        assert size["latency_ms"] is None
        assert size["top1"] is not None
    for arguments, message in (
        (["--front", "2", "--out", "front"], "front: the front of another model, other images or"),
        (["--macs", "0.5", "--verify"], "--verify belongs to --latency-ms or --front"),
        (["--front", "2", "--out", "no", "--runtime", "onnxruntime"], "--runtime belongs to"),
        (
            ["--front", "2", "--out", "no", "--verify", "--target", "rpi4"],
            "the files are for rpi4, not for this machine",
        ),
    ):
        assert (
            call([*MODEL, *arguments, "--resume"] if "front" in arguments else [*MODEL, *arguments])
            == 2
        )
        assert message in capsys.readouterr().err


def test_a_front_continues_only_within_the_same_limits(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    dense = vitrim.load("model").architecture
    whole_ms = latency_table().latency_ms(network_shape(dense))
    front = ["--front", "2", "--latency-ms", str(0.6 * whole_ms), "--cost-table", "costs.json"]
    front += ["--keep-tokens", "--out", "limited"]
    compacted(*front, "--file-mb", "9")
    compacted(*front, "--file-mb", "9", "--resume")
    assert call([*MODEL, *front, "--file-mb", "0.1", "--resume"]) == 2
    assert "limited: the front of another model, other images" in capsys.readouterr().err
