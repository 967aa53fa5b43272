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
from vitrim.targets.cost_table import MeasuredNetwork
from vitrim.targets.shipped_tables import shipped_table

ARCHITECTURE = lift(tiny_vit()).architecture
NETWORK = network_shape(ARCHITECTURE)
POINT = MeasuredNetwork(network=NETWORK, latency_ms=1.0)
WHAT: dict[str, Any] = {"runtime": "onnxruntime", "precision": "fp32", "threads": 1}


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
        TableRequest(target="stm32h7").table(ARCHITECTURE)


def test_a_table_that_ships_is_found_by_its_name(tmp_path: Path) -> None:
    measured = latency_table(target="rpi4", points=[POINT])
    measured.save(tmp_path / "rpi4-onnxruntime-fp32-1-tiny.json")
    assert shipped_table("rpi4", NETWORK, folder=tmp_path, **WHAT) == measured
    assert shipped_table("rpi5", NETWORK, folder=tmp_path, **WHAT) is None
    assert TableRequest(target="rpi4").table(ARCHITECTURE).estimated is not None


@pytest.mark.parametrize("size", ["embed", "tokens", "pixels"])
def test_a_network_beyond_the_measured_ones_takes_a_larger_table_or_an_estimate(
    tmp_path: Path, size: str
) -> None:
    larger = NETWORK.model_copy(update={size: 2 * getattr(NETWORK, size)})
    slower = POINT.model_copy(update={"network": larger, "latency_ms": 2 * POINT.latency_ms})
    small = latency_table(target="rpi4", points=[POINT])
    large = latency_table(target="rpi4", points=[POINT, slower])
    small.save(tmp_path / "rpi4-onnxruntime-fp32-1-b.json")
    assert shipped_table("rpi4", larger, folder=tmp_path, **WHAT) is None
    large.save(tmp_path / "rpi4-onnxruntime-fp32-1-a.json")
    assert shipped_table("rpi4", larger, folder=tmp_path, **WHAT) == large
    assert shipped_table("rpi4", NETWORK, folder=tmp_path, **WHAT) == small


def test_wider_sub_layers_are_beyond_the_measured_ones() -> None:
    table = latency_table(points=[POINT])
    assert table.covers(NETWORK)
    for place, sublayer in enumerate(NETWORK.sublayers):
        name = "heads" if sublayer.kind == "attention" else "hidden"
        wider = sublayer.model_copy(update={name: 2 * getattr(sublayer, name)})
        sublayers = (*NETWORK.sublayers[:place], wider, *NETWORK.sublayers[place + 1 :])
        assert not table.covers(NETWORK.model_copy(update={"sublayers": sublayers}))
    deeper = NETWORK.model_copy(update={"sublayers": 2 * NETWORK.sublayers})
    assert table.covers(deeper), "a further sub-layer costs what the others do"


def test_the_host_takes_the_table_of_its_own_class_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = latency_table(target="x86-64-v3", points=[POINT])
    table.save(tmp_path / "x86-64-v3-onnxruntime-fp32-1-tiny.json")
    for classes, found in (
        (["x86-64", "x86-64-v3"], True),
        (["x86-64", "x86-64-v3", "x86-64-v4-vnni"], False),
        ([], False),
    ):
        monkeypatch.setattr(shipped_tables, "targets_here", lambda classes=classes: classes)
        shipped = shipped_table("host", NETWORK, folder=tmp_path, **WHAT)
        assert (shipped is not None) == found


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
