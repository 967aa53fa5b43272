"""`vitrim export`: --verify, a missing --out, and files for a reduced build of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app
from vitrim.compress.lift import lift
from vitrim.compress.network.files import save
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "fp32"
    export(lift(tiny_vit()), folder)
    return folder


def test_verify_summarizes_an_intact_artifact(artifact: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--verify", str(artifact)])
    assert result.exit_code == 0
    assert "parity" in result.output


def test_verify_names_a_corrupt_file(artifact: Path) -> None:
    model = next(artifact.glob("*.onnx"))
    content = bytearray(model.read_bytes())
    content[100] ^= 1
    model.write_bytes(bytes(content))
    result = CliRunner().invoke(app, ["export", "--verify", str(artifact)])
    assert isinstance(result.exception, InputError) or result.exit_code == 2
    assert model.name in f"{result.output}{result.exception}"


def test_a_missing_out_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path)])
    assert "--out is missing" in f"{result.output}{result.exception}"


def test_ort_format_also_writes_the_files_of_a_reduced_build(tmp_path: Path) -> None:
    model = lift(tiny_vit())
    save(model, tmp_path / "model")
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--ort-format"]
    )
    assert result.exit_code == 0, result.output
    assert "ort file against torch" in result.output
    roles = {entry.path: entry.role for entry in Artifact.load(tmp_path / "out").manifest.files}
    assert roles == {
        "model.onnx": "model",
        "model.ort": "other",
        "required_operators.config": "operators",
    }
