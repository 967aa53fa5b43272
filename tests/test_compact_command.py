"""`vitrim compact` on a model pruned elsewhere: prune masks folded, dead weight out, the rest told."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch.nn.utils import prune
from typer.testing import CliRunner
from vitrim import load
from vitrim.cli import app

SETTINGS = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
OVERRIDES = [word for key, value in SETTINGS.items() for word in ("--override", f"{key}={value}")]


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prune.ln_structured(model.blocks[0].mlp.fc1, "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(model.blocks[1].mlp.fc2, "weight", 0.3)
    torch.save(model.state_dict(), tmp_path / "pruned.pth")
    return tmp_path / "pruned.pth"


def test_dead_weight_goes_without_a_mask(pruned: Path, tmp_path: Path) -> None:
    arguments = ["compact", "--checkpoint", str(pruned), "--model", "vit_tiny_patch16_224", *OVERRIDES, "--out", str(tmp_path / "small")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "blocks.0.ffn: 48 of 96 ffn units are dead, constant ones folded into a bias" in result.output
    assert "zeros that stay:" in result.output
    assert load(tmp_path / "small").architecture.branches[1].core.hidden == 48  # type: ignore[union-attr]


def test_rounding_needs_a_mask(pruned: Path) -> None:
    result = CliRunner().invoke(
        app, ["compact", "--checkpoint", str(pruned), "--model", "vit_tiny_patch16_224", *OVERRIDES, "--round-to", "8"]
    )
    assert result.exit_code != 0


def test_explain_names_the_tensors_and_the_masks(pruned: Path) -> None:
    arguments = ["compact", "--checkpoint", str(pruned), "--model", "vit_tiny_patch16_224", *OVERRIDES, "--explain"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "core.fc1.weight" in line)
    assert "96 x 24" in line
    assert "48 x 24" in line
    assert "ffn/blocks.0.ffn" in line
