"""Cost tables: a fit recovers known costs and tiles, and what is gone costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import COSTS, latency_table
from source_tree import ROOT
from vitrim.core.errors import InputError
from vitrim.pipeline.cost_networks import CostSizes, random_shapes
from vitrim.targets.cost_fit import (
    fit_correction,
    fit_costs,
    least_sure,
    nonnegative_least_squares,
    refitted,
)
from vitrim.targets.cost_parts import (
    PARTS,
    AttentionShape,
    FfnShape,
    NetworkShape,
    whole_tiles,
)
from vitrim.targets.cost_table import Correction, CostTable, Errors, MeasuredNetwork

SIZES = CostSizes(50, 128, 4, 32, 512, 6, 4, 1, 10)
TABLE = latency_table(tile=16, costs_ms=COSTS | {"ffn products": 1e-5})


def points(count: int, noise: float = 0.0, seed: int = 0) -> list[MeasuredNetwork]:
    """Random networks with the latencies of `TABLE`; every third is held out."""
    rng = np.random.default_rng(seed)
    return [
        MeasuredNetwork(
            network=shape,
            latency_ms=TABLE.latency_ms(shape) * rng.lognormal(0, noise),
            role="held-out" if number % 3 == 0 else "fit",
        )
        for number, shape in enumerate(random_shapes(SIZES, count, seed))
    ]


def test_known_costs_and_the_tile_are_recovered() -> None:
    measured = points(90)
    fit = fit_costs(measured, [1, 8, 16, 32])
    assert fit.tile == 16
    errors = fit.errors([point for point in measured if point.role == "held-out"])
    assert errors is not None
    assert errors.count == 30
    assert errors.largest < 1e-6
    assert set(fit.costs) <= set(PARTS)
    noisy = fit_costs(points(90, noise=0.03), [1, 16])
    errors = noisy.errors(points(30, seed=5))
    assert errors is not None
    assert errors.median < 0.03
    assert fit.errors([]) is None


def test_the_next_points_are_those_that_no_point_is_like() -> None:
    # Networks of FFNs only leave the attention unknown.
    measured = [
        point
        for point in points(120)
        if all(isinstance(each, FfnShape) for each in point.network.sublayers)
    ]
    fit = fit_costs([point.model_copy(update={"role": "fit"}) for point in measured], [1, 16])
    pool = random_shapes(SIZES, 60, 9)
    chosen = least_sure(fit, pool, 4)
    assert len(set(chosen)) == 4
    first = pool[chosen[0]].sublayers
    assert any(isinstance(each, AttentionShape) for each in first)


@settings(max_examples=60)
@given(st.data())
def test_a_larger_sub_layer_is_never_predicted_to_be_faster(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, most)) for most in (300, 200, 200, 12, 64, 64)]
    embed, before, after, *rest = sizes
    after = min(before, after)
    larger = list(rest)
    place = data.draw(st.integers(0, 2))
    larger[place] += 1
    smaller_ms = TABLE.attention_ms(embed, before, after, *rest)
    assert TABLE.attention_ms(embed, before, after, *larger) >= smaller_ms
    assert TABLE.ffn_ms(embed, after, 8 * rest[1] + 1) >= TABLE.ffn_ms(embed, after, 8 * rest[1])


def test_what_is_gone_costs_nothing_and_arrays_are_broadcast() -> None:
    heads = np.array([0, 1, 2])
    found = TABLE.attention_ms(64, np.array([[17], [33]]), 17, heads, 8, 8)
    assert found.shape == (2, 3)
    assert (found[:, 0] == 0).all()
    assert (np.diff(found, axis=1) > 0).all()
    assert TABLE.ffn_ms(64, 17, 0) == 0
    assert TABLE.ffn_ms(64, 17, 1) == TABLE.ffn_ms(64, 17, 1).item() > 0
    assert [int(whole_tiles(width, 16)) for width in (1, 16, 17)] == [16, 16, 32]


def test_a_network_is_the_sum_of_its_parts_and_the_correction() -> None:
    network = NetworkShape(
        embed=64,
        tokens=17,
        pixels=48,
        classes=10,
        sublayers=(
            AttentionShape(tokens_in=17, tokens_out=9, heads=2, qk=8, v=8),
            FfnShape(tokens=9, hidden=128),
        ),
    )
    parts = TABLE.attention_ms(64, 17, 9, 2, 8, 8) + TABLE.ffn_ms(64, 9, 128)
    whole = float(parts + TABLE.ends_ms(64, 17, 48, 10))
    assert TABLE.sum_ms(network) == pytest.approx(whole)
    table = latency_table(tile=16, correction=Correction(scale=2.0, offset_ms=0.5))
    assert table.latency_ms(network) == pytest.approx(2 * table.sum_ms(network) + 0.5)
    assert table.parts_ms(table.corrected_ms(0.7)) == pytest.approx(0.7)


def test_a_correction_is_learned_from_whole_networks() -> None:
    predicted = np.array([1.0, 2.0, 3.0, 5.0])
    measured = 1.1 * predicted + 0.2
    correction, corrected = fit_correction(predicted, measured)
    assert correction.scale == pytest.approx(1.1)
    assert correction.offset_ms == pytest.approx(0.2)
    assert Errors.of(corrected, measured).largest < 1e-9
    one, _ = fit_correction(np.array([2.0, 2.0]), np.array([3.0, 3.0]))
    assert one == Correction(scale=1.5)
    assert Errors.of([1.1, 1.0], [1.0, 1.0]).text() == (
        "median 5.0 %, 95th percentile 9.5 %, largest 10.0 %"
    )


def test_costs_follow_networks_that_are_measured_later() -> None:
    table = TABLE.model_copy(update={"points": tuple(points(60))})
    attentions = (AttentionShape(tokens_in=50, tokens_out=50, heads=4, qk=32, v=32),) * 4
    ffns = (FfnShape(tokens=50, hidden=512),) * 4
    ends = {"embed": 128, "tokens": 50, "pixels": 16, "classes": 10}
    one = NetworkShape(sublayers=attentions, **ends)
    other = NetworkShape(sublayers=ffns, **ends)
    assert refitted(table, []) is table
    assert refitted(TABLE, [(one, 1.0)]) is TABLE
    # One network shows the speed of the machine.
    assert table.latency_ms(one) > 0
    faster = refitted(table, [(one, 0.8 * table.latency_ms(one))])
    for shape in (one, other):
        assert faster.latency_ms(shape) == pytest.approx(0.8 * table.latency_ms(shape), rel=1e-3)
    # Two show where the costs are wrong.
    latencies = [(one, 0.8 * table.latency_ms(one)), (other, 1.2 * table.latency_ms(other))]
    both = refitted(table, latencies)
    for shape, latency_ms in latencies:
        was, now = (abs(each.latency_ms(shape) / latency_ms - 1) for each in (table, both))
        assert now < 0.5 * was


def test_a_table_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = TABLE.model_copy(update={"points": tuple(points(6))})
    table.save(path)
    assert CostTable.load(path) == table
    assert json.loads(path.read_text())["schema"] == "vitrim.cost-table/2"
    assert TABLE.title == "onnxruntime fp32 on host, 1 thread"
    batch = latency_table(threads=2, batch=8)
    assert batch.title == "onnxruntime fp32 on host, 2 threads, batch 8"


def test_a_table_of_the_earlier_schema_still_loads(tmp_path: Path) -> None:
    file = ROOT / "benchmarks/results/cost_table_demo_avx512.json"
    table = CostTable.load(file)
    assert table.runtime == "onnxruntime"
    assert table.runtime_version == "1.31.1"
    assert table.ends_ms(128, 50, 16, 10) == 0
    data = json.loads(file.read_text()) | {"target": "x86-64"}
    data.pop("target_features", None)
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert CostTable.load(tmp_path / "old.json").target == "x86-64-v4-vnni"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, r"t\.json: threads: Input should be greater"),
        ({"costs_ms": {"ffn": -1.0}}, r"t\.json: costs_ms\.ffn: Input should be greater"),
        (
            {"costs_ms": {"mlp": 1.0}},
            r"t\.json: the table: .*'mlp' is no part; known are attention",
        ),
        ({"more": 1}, r"t\.json: more: Extra inputs are not permitted; measure the table again"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TABLE.model_dump(mode="json", by_alias=True) | change))
    with pytest.raises(InputError, match=message):
        CostTable.load(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"t\.json: not JSON"):
        CostTable.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        CostTable.load(tmp_path / "absent.json")


@given(st.integers(0, 1000))
def test_the_least_squares_solution_is_nonnegative_and_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, wanted = rng.random((12, 5)), rng.standard_normal(12)
    found = nonnegative_least_squares(matrix, wanted)
    assert (found >= 0).all()
    # The Karush-Kuhn-Tucker conditions: zero slope where x > 0, no gain from growing where x = 0.
    slope = matrix.T @ (wanted - matrix @ found)
    assert slope.max() <= 1e-6
    assert np.abs(slope[found > 0]).max(initial=0) <= 1e-6
