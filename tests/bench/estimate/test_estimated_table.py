"""The cost table of estimates: its sums are the estimates, and it is called an estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from latency_tables import latency_table
from tiny_models import tiny_vit
from vitrim.bench.estimate.cost_table import estimated_table
from vitrim.bench.estimate.prediction import estimate
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.lift import lift
from vitrim.core.errors import InputError
from vitrim.pipeline.estimates import network_workload
from vitrim.pipeline.latency_loop import LatencyRecord, measured_here
from vitrim.pipeline.latency_table import TableRequest
from vitrim.targets import shipped_tables
from vitrim.targets.catalog import load_target
from vitrim.targets.shipped_tables import shipped_table


@pytest.mark.parametrize("target", ["rpi4", "rpi5", "x86-64-v3"])
@pytest.mark.parametrize("sizes", [{}, {"embed_dim": 96, "depth": 6, "num_heads": 2}])
def test_the_sum_of_its_parts_is_the_estimate(target: str, sizes: dict[str, Any]) -> None:
    architecture = lift(tiny_vit(img_size=64, num_classes=10, **sizes)).architecture
    profile = load_target(target)
    table = estimated_table(profile, runtime="onnxruntime", threads=1)
    wanted = estimate(network_workload(architecture), profile, runtime="onnxruntime", threads=1)
    assert table.latency_ms(network_shape(architecture)) == pytest.approx(
        1e3 * wanted.likely_s, rel=0.03
    )
    assert table.estimated is not None
    assert f"within a factor of {wanted.factor:.1f}" in table.title
    assert not measured_here(table) or target.startswith("x86")


def test_a_device_without_estimates_needs_a_measured_table() -> None:
    with pytest.raises(InputError, match=r"no microcontroller was measured.*vitrim bench"):
        TableRequest(target="stm32h7").table()


def test_a_table_that_ships_is_found_by_its_name(tmp_path: Path) -> None:
    measured = latency_table(target="rpi4")
    measured.save(tmp_path / "rpi4-onnxruntime-fp32-1.json")
    what: dict[str, Any] = {"runtime": "onnxruntime", "precision": "fp32", "threads": 1}
    assert shipped_table("rpi4", folder=tmp_path, **what) == measured
    assert shipped_table("rpi5", folder=tmp_path, **what) is None
    assert TableRequest(target="rpi4").table().estimated is not None


def test_the_host_takes_the_table_of_its_own_class_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency_table(target="x86-64-v3").save(tmp_path / "x86-64-v3-onnxruntime-fp32-1.json")
    what: dict[str, Any] = {"runtime": "onnxruntime", "precision": "fp32", "threads": 1}
    for classes, found in (
        (["x86-64", "x86-64-v3"], True),
        (["x86-64", "x86-64-v3", "x86-64-v4-vnni"], False),
        ([], False),
    ):
        monkeypatch.setattr(shipped_tables, "targets_here", lambda classes=classes: classes)
        assert (shipped_table("host", folder=tmp_path, **what) is not None) == found


def test_its_title_names_the_processor_that_was_measured() -> None:
    table = latency_table(environment={"cpu_model": "Some CPU"})
    assert table.title.endswith(", 1 thread, measured on Some CPU")


def test_a_budget_by_it_is_called_an_estimate() -> None:
    table = estimated_table(load_target("rpi4"))
    record = LatencyRecord.of(table, 2.0, 1.9)
    assert record.text().startswith("latency: estimated budget 2 ms, 1.9 ms by an estimate (")
    assert record.record()["estimated"] is True
    assert "estimated" in record.table
    assert measured_here(latency_table())
    assert not measured_here(latency_table(target="rpi4")), "files of a board are measured on it"
