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
from vitrim.pipeline.latency_loop import LatencyRecord
from vitrim.pipeline.latency_place import elsewhere, file_target
from vitrim.pipeline.latency_table import TableRequest
from vitrim.targets import shipped_tables
from vitrim.targets.catalog import FOLDER as TARGETS
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
    assert elsewhere(table) or target.startswith("x86")


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
    assert elsewhere(latency_table()) is None
    board = latency_table(target="rpi4")
    assert elsewhere(board) == "the files are for rpi4, not for this machine"


def test_a_table_of_a_profile_that_is_not_known_is_not_of_this_machine(tmp_path: Path) -> None:
    table = latency_table(target="phone")
    reason = "the cost table is of phone, which is no name of `vitrim targets list`"
    assert str(elsewhere(table)).startswith(reason)
    with pytest.raises(InputError, match=r"give its profile with --target FILE\.toml"):
        file_target(table)
    profile = tmp_path / "phone.toml"
    text = (TARGETS / "rpi4.toml").read_text().replace('name = "rpi4"', 'name = "phone"')
    profile.write_text(text)
    assert elsewhere(table, str(profile)) == "the files are for phone, not for this machine"
    assert file_target(table, str(profile)) == str(profile)
    table.save(tmp_path / "costs.json")
    assert TableRequest(tmp_path / "costs.json", str(profile)).table(ARCHITECTURE) == table
    with pytest.raises(InputError, match=r"--target rpi4 names another device than .*costs\.json"):
        TableRequest(tmp_path / "costs.json", "rpi4").table(ARCHITECTURE)
    assert TableRequest(target=str(profile)).table(ARCHITECTURE).estimated is not None


def test_no_board_lends_its_table_to_a_host_of_the_same_instruction_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards = ["rpi4", "rpi5", "snapdragon-8-gen-2"]
    for name in boards:
        table = latency_table(target=name, points=[POINT])
        table.save(tmp_path / f"{name}-onnxruntime-fp32-1-tiny.json")
    monkeypatch.setattr(shipped_tables, "targets_here", lambda: boards)
    assert shipped_table("host", NETWORK, folder=tmp_path, **WHAT) is None
    assert shipped_table("rpi4", NETWORK, folder=tmp_path, **WHAT) is not None


def test_the_class_of_the_host_is_the_one_of_most_instruction_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classes = ["x86-64", "x86-64-v3", "x86-64-v4-vnni"]
    for count in range(1, 4):
        given = classes[:count]
        monkeypatch.setattr(shipped_tables, "targets_here", lambda given=given: given)
        assert shipped_tables.host_class() == classes[count - 1]


def test_the_sizes_beyond_the_measured_ones_are_named() -> None:
    table = latency_table(points=[POINT])
    assert table.beyond(NETWORK) is None
    larger = NETWORK.model_copy(update={"embed": 2 * NETWORK.embed, "tokens": 2 * NETWORK.tokens})
    embed, tokens = NETWORK.embed, NETWORK.tokens
    assert table.beyond(larger) == (
        f"{2 * embed} channels of the stream (measured: up to {embed}) and "
        f"{2 * tokens} tokens (measured: up to {tokens})"
    )
    assert latency_table().beyond(larger) is None, "what was measured is not known"
    assert estimated_table(load_target("rpi4")).beyond(larger) is None
