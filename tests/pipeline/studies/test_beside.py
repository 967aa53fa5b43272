"""Dense models beside a study: exported and timed once, and a row of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from study_sample import large_table
from tiny_models import fvcore_macs, tiny_vit
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe_sections import BenchSection
from vitrim.pipeline.studies.beside import count_module_macs, measure_beside, require_models
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.table import StudyTable

QUICK = BenchSection(time_limit_s=0.1)


def test_models_are_measured_once_and_reported(tmp_path: Path) -> None:
    table = large_table(tmp_path, 3)
    measure_beside(["test_efficientnet"], table, tmp_path, QUICK, quiet=True)
    (row,) = table.beside()
    assert row["name"] == "test_efficientnet"
    assert row["image"] == "160x160"
    assert row["params"] > 1e5  # type: ignore[operator]
    assert row["macs"] > row["params"]  # type: ignore[operator]
    assert row["ms"] > 0  # type: ignore[operator]
    assert row["memory_bytes"] > 0  # type: ignore[operator]
    assert (tmp_path / "beside/test_efficientnet/manifest.json").is_file()
    # One that could not be exported before is tried again; the other one keeps its figures.
    table.set_beside("broken", {"reason": "an operator is missing"})
    measure_beside(["test_efficientnet"], StudyTable(tmp_path), tmp_path, QUICK, quiet=True)
    assert table.beside()[0] == row
    write_report(tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "## Dense models beside" in text
    assert "efficientnet | 160x160 |" in text
    assert "| broken |  | an operator is missing |" in text


def test_whatever_a_model_raises_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("shape mismatch\nat line 3")

    monkeypatch.setattr("timm.create_model", broken)
    table = large_table(tmp_path, 3)
    measure_beside(["test_vit", "test_efficientnet"], table, tmp_path, QUICK, quiet=True)
    reason = "unexpected RuntimeError: shape mismatch"
    assert [row["reason"] for row in table.beside()] == [reason] * 2


def test_an_unknown_model_is_refused_before_the_runs() -> None:
    with pytest.raises(InputError, match=r"beside: timm .* has no model 'vit_huge'"):
        require_models(["test_vit", "vit_huge"])


def test_multiply_adds_are_those_of_fvcore() -> None:
    model = tiny_vit(depth=1)
    images = torch.zeros(1, 3, 16, 16)
    assert count_module_macs(model, (3, 16, 16)) == fvcore_macs(model, images)
