"""Measuring a cost table: when it stops, how it continues after a kill, and what it learns."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latency_tables import latency_table
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.latency.trial import trial_network
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.pipeline import cost_measuring
from vitrim.pipeline.cost_measuring import (
    REFERENCE,
    measure_cost_table,
    reaches_goal,
)
from vitrim.pipeline.cost_networks import (
    CostSizes,
    compact_networks,
    dense_model,
    first_shapes,
    network_of,
    random_shapes,
    sizes_of,
)
from vitrim.pipeline.cost_points import CostRequest, points_file
from vitrim.targets.cost_parts import NetworkShape, SelectShape
from vitrim.targets.cost_table import CostTable

SIZES = CostSizes(
    tokens=13, embed=32, heads=2, head_width=8, ffn=64, depth=2, patch=4, channels=1, classes=3
)
TRUTH = latency_table(tile=1)


class Machine:
    """Exports shapes as files, and measures them by a table with noise; it may be killed.

    `drift`: by how much its speed differs from one group of files to another; `slow`: networks that
    take a tenth longer.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0, drift: float = 0.0
    ) -> None:
        self.noise, self.drift, self.measured, self.dies_at = noise, drift, 0, 10**9
        self.references: list[Path] = []
        self.meter = True
        self.slow = set[str]()
        monkeypatch.setattr(cost_measuring, "export", self.export)

    def export(self, model: CompactModel, folder: Path, **options: Any) -> None:
        folder.write_text(network_shape(model.architecture).model_dump_json())
        if folder.name == REFERENCE:
            self.references.append(folder)

    def measure(self, files: dict[str, Path], options: Any, progress: Any) -> dict[str, Any]:
        found = {}
        speed = np.random.default_rng(self.measured).lognormal(0, self.drift)
        for name, file in files.items():
            self.measured += name != REFERENCE
            if self.measured > self.dies_at:
                raise KeyboardInterrupt
            shape = NetworkShape.model_validate_json(file.read_text())
            rng = np.random.default_rng(self.measured)
            factor = 1.1 if file.read_text() in self.slow else 1.0
            found[name] = self._measurement(factor * speed * TRUTH.latency_ms(shape), rng)
        return found

    def _measurement(self, latency_ms: float, rng: np.random.Generator) -> Any:
        p50_s = latency_ms * rng.lognormal(0, self.noise) / 1e3
        return SimpleNamespace(
            summary=lambda: SimpleNamespace(p50_s=p50_s),
            runtime_version="1.0",
            energy_per_inference_j=2.0 * p50_s if self.meter else None,
            environment=SimpleNamespace(model_dump=lambda mode: {"cores": 2}),
        )


def measured(path: Path, machine: Machine, **fields: Any) -> CostTable:
    request = CostRequest(sizes=SIZES, **{"checks": 3, "most_points": 60} | fields)
    return measure_cost_table(request, path, machine.measure, quiet=True)


def test_it_stops_when_the_held_out_networks_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, path = Machine(monkeypatch), tmp_path / "table.json"
    table = measured(path, machine)
    assert CostTable.load(path) == table
    assert table.held_out is not None
    assert 10 <= table.held_out.count < 20
    assert table.held_out.median < 0.02
    assert table.held_out.p95 < 0.06
    assert machine.measured == len(table.points) < 60
    assert table.whole is not None
    assert table.whole.count == 3
    assert table.environment == {"cores": 2}
    assert table.power_w == pytest.approx(2.0)
    assert not points_file(path).exists()


def test_a_machine_whose_speed_changes_is_measured_beside_the_dense_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = measured(tmp_path / "t.json", Machine(monkeypatch, drift=0.3), checks=20)
    assert table.held_out is not None
    assert table.held_out.p95 < 0.06
    # The costs are stated at the speed of the points that check them.
    assert table.uncorrected is not None
    assert table.uncorrected.p95 < 0.06


def test_the_solvers_networks_show_what_the_costs_underestimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    fair = measured(tmp_path / "fair.json", machine, checks=8)
    assert sum(point.role == "solved" for point in fair.points) == 8
    assert fair.excess is not None
    assert abs(fair.excess) < 0.02
    # A machine that is slower for the networks which the solver finds.
    def slow_trial(*given: Any, **options: Any) -> Any:
        found = trial_network(*given, **options)
        assert found is not None
        machine.slow.add(network_shape(found.architecture).model_dump_json())
        return found

    monkeypatch.setattr(cost_measuring, "trial_network", slow_trial)
    slow = measured(tmp_path / "slow.json", machine, checks=8)
    assert slow.excess is not None
    assert slow.excess > 0.03
    assert CostTable.load(tmp_path / "slow.json") == slow


def test_a_measurement_that_is_killed_at_the_solvers_networks_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, path = Machine(monkeypatch), tmp_path / "t.json"
    whole = measured(tmp_path / "whole.json", machine, checks=4)
    machine.measured, machine.dies_at = 0, len(whole.points) - 1
    with pytest.raises(KeyboardInterrupt):
        measured(path, machine, checks=4)
    machine.measured, machine.dies_at = len(whole.points) - 2, 10**9
    assert measured(path, machine, checks=4).excess == whole.excess


def test_the_dense_network_is_exported_once_for_all_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, path = Machine(monkeypatch), tmp_path / "table.json"
    machine.dies_at = 15
    with pytest.raises(KeyboardInterrupt):
        measured(path, machine)
    assert len(machine.references) == 1
    machine.dies_at = 10**9
    measured(path, machine)
    assert len(machine.references) == 2
    assert not any(file.exists() for file in machine.references)


def test_a_noisy_machine_is_measured_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = measured(tmp_path / "t.json", Machine(monkeypatch, noise=0.3), most_points=30, checks=0)
    assert len(table.points) == 30
    assert table.held_out is not None
    assert table.held_out.p95 > 0.06
    assert table.whole is None
    assert not reaches_goal(table)


def test_a_larger_number_of_networks_continues_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, machine = tmp_path / "t.json", Machine(monkeypatch, noise=0.3)
    first = measured(path, machine, most_points=30, checks=2)
    assert machine.measured == len(first.points) == 34
    machine.noise = 0.0
    second = measured(path, machine, most_points=42, checks=4)
    assert machine.measured == len(second.points)
    roles = Counter(point.role for point in second.points)
    assert roles["fit"] + roles["held-out"] == 42
    assert roles["check"] == 4
    # The solver's networks of the first costs, which were noisy, stay.
    assert roles["solved"] >= 1
    networks = [point.network for point in first.points]
    assert [point.network for point in second.points][:34] == networks
    # Fewer are complete at once.
    assert len(measured(path, machine, most_points=24, checks=0).points) == machine.measured
    # A file of an earlier version has the numbers in its request.
    head, *lines = points_file(path).read_text().splitlines()
    data = json.loads(head)
    data["request"] |= {"most_points": 72, "checks": 20}
    points_file(path).write_text("\n".join([json.dumps(data), *lines]) + "\n")
    assert len(measured(path, machine, most_points=42, checks=4).points) == machine.measured


def test_an_interrupted_measurement_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, machine = tmp_path / "table.json", Machine(monkeypatch)
    machine.dies_at = 15
    with pytest.raises(KeyboardInterrupt):
        measured(path, machine)
    assert not path.exists()
    with points_file(path).open("a") as stream:
        # The batch that a kill cut off.
        stream.write('{"network": {"embed": 3')
    machine.dies_at, machine.meter = 10**9, False
    table = measured(path, machine)
    # The power was read before the kill.
    assert table.power_w == pytest.approx(2.0)
    whole = measured(tmp_path / "whole.json", Machine(monkeypatch))
    assert [point.network for point in table.points] == [point.network for point in whole.points]
    assert machine.measured == 16 + len(table.points) - 12


def test_points_of_another_request_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, machine = tmp_path / "table.json", Machine(monkeypatch)
    machine.dies_at = 8
    with pytest.raises(KeyboardInterrupt):
        measured(path, machine)
    with pytest.raises(InputError, match=r"table\.json\.points: the points of another cost table"):
        measured(path, machine, precision="int8")
    points_file(path).write_text("text\n")
    with pytest.raises(InputError, match="not the points of a cost table"):
        measured(path, machine)
    with pytest.raises(InputError, match="6 networks: a fit and its error need at least 18"):
        CostRequest(most_points=6)


def test_every_network_of_a_shape_has_it_and_runs() -> None:
    shapes = [*first_shapes(SIZES, 12, 0), *random_shapes(SIZES, 12, 1)]
    for shape in shapes:
        model = network_of(SIZES, shape)
        assert network_shape(model.architecture) == shape
        with torch.no_grad():
            assert model(torch.zeros(1, *model.architecture.image)).shape == (1, 3)
    assert random_shapes(SIZES, 12, 1) == shapes[12:]


def test_compact_networks_of_a_model_check_its_sums() -> None:
    dense = dense_model(SIZES)
    assert sizes_of(dense.architecture) == SIZES
    found = compact_networks(dense, 4, 0)
    assert found[0][1] is dense
    for shape, model in found:
        assert network_shape(model.architecture) == shape
    assert len({shape.embed for shape, _ in found}) > 1
    assert json.loads(found[1][0].model_dump_json())["classes"] == 3
    for sizes in ({"tokens": 1}, {"embed": 4}):
        with pytest.raises(InputError, match="give at least"):
            CostSizes(**sizes)  # type: ignore[arg-type]


def test_networks_that_select_tokens_have_the_shape_that_was_requested() -> None:
    sizes = replace(SIZES, tokens=26, selects=True)
    shapes = random_shapes(sizes, 60, 3)
    selecting = [shape for shape in shapes if _selections(shape)]
    assert len(selecting) > 10
    macs = [each.macs for shape in selecting for each in _selections(shape)]
    assert min(macs) == 0 < max(macs)
    for shape in [*selecting[:12], *first_shapes(sizes, 12, 0)]:
        found = network_shape(network_of(sizes, shape).architecture)
        assert found.embed == shape.embed
        # A network's shape has its selections behind its sub-layers.
        assert sorted(map(repr, found.sublayers)) == sorted(map(repr, shape.sublayers))


def _selections(shape: NetworkShape) -> list[SelectShape]:
    return [each for each in shape.sublayers if isinstance(each, SelectShape)]


def test_the_costs_of_selections_are_measured_for_a_model_that_selects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(SIZES, tokens=26, selects=True)
    request = CostRequest(sizes=sizes, checks=0, most_points=54)
    machine = Machine(monkeypatch)
    table = measure_cost_table(request, tmp_path / "t.json", machine.measure, quiet=True)
    assert table.prices_selections
    selecting = [shape for shape in random_shapes(sizes, 40, 11) if _selections(shape)]
    errors = [abs(table.latency_ms(each) / TRUTH.latency_ms(each) - 1) for each in selecting]
    assert np.median(errors) < 0.03
    plain = measured(tmp_path / "plain.json", machine, checks=0)
    assert not plain.prices_selections
    with pytest.raises(InputError, match="has no costs of selections of tokens"):
        plain.require_selections()
