"""The fit recovers known costs and is monotone; a measured table predicts held-out shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrim.bench.local.block_graph import BlockShape, block_model
from vitrim.bench.local.cost_table import (
    PARTS,
    CostTable,
    Point,
    chosen_shapes,
    fit_cost_table,
    measure_cost_table,
    nonnegative_least_squares,
)
from vitrim.bench.results.measurement import Environment
from vitrim.core.errors import InputError


def table(points: list[Point]) -> CostTable:
    return fit_cost_table(
        points, target="host", threads=1, runtime="synthetic", environment=Environment()
    )


def synthetic_points(noise: float, count: int = 40) -> list[Point]:
    rng = np.random.default_rng(5)
    shapes = chosen_shapes(count=count, seed=3)
    seconds = [
        2e-5 + shape.macs / 30e9 + 1e-9 * (shape.tokens_in + shape.tokens_out) * shape.embed
        for shape in shapes
    ]
    return [
        Point(shape=shape, latency_s=value * rng.lognormal(0, noise), held_out=i >= count - 10)
        for i, (shape, value) in enumerate(zip(shapes, seconds, strict=True))
    ]


def test_known_costs_are_recovered() -> None:
    exact = table(synthetic_points(0))
    assert exact.largest_error is not None
    assert exact.largest_error < 1e-6
    noisy = table(synthetic_points(0.03))
    assert noisy.median_error is not None
    assert noisy.median_error < 0.05


def test_a_target_of_an_earlier_table_keeps_its_meaning(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    made = table(synthetic_points(0)).model_copy(update={"target": "x86-64"})
    made.save(path)
    assert CostTable.load(path) == made
    data = json.loads(path.read_text())
    del data["target_features"]
    path.write_text(json.dumps(data))
    assert CostTable.load(path).target == "x86-64-v4-vnni"


widths = st.builds(
    lambda n, cut, *rest: BlockShape(n, max(1, n - cut), *rest),
    *(
        st.integers(1, 200),
        st.integers(0, 50),
        st.integers(1, 12),
        st.integers(1, 64),
        st.integers(1, 64),
        st.integers(1, 800),
        st.integers(1, 400),
    ),
)


@settings(max_examples=60)
@given(widths, st.sampled_from(["tokens_in", "heads", "qk", "v", "ffn", "embed"]))
def test_a_wider_block_is_never_predicted_to_be_faster(shape: BlockShape, name: str) -> None:
    fitted = FITTED
    assert fitted.latency_s(replace(shape, **{name: getattr(shape, name) + 1})) >= fitted.latency_s(
        shape
    )


FITTED = table(synthetic_points(0.05))


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


@pytest.mark.parametrize(
    "shape", [BlockShape(9, 9, 2, 8, 4, 24, 16), BlockShape(9, 1, 1, 3, 5, 7, 11)]
)
def test_the_block_runs_and_counts_its_macs(shape: BlockShape) -> None:
    import onnx

    data = block_model(shape, copies=1)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    tokens = np.random.default_rng(0).standard_normal(
        (1, shape.tokens_in, shape.embed), dtype=np.float32
    )
    assert session.run(None, {"tokens": tokens})[0].shape == (shape.tokens_out, shape.embed)
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(data)).graph
    sizes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output, *graph.input]
    }
    sizes |= {value.name: list(value.dims) for value in graph.initializer}
    counted = 0
    for node in graph.node:
        if node.op_type in ("Gemm", "MatMul"):
            counted += int(np.prod(sizes[node.output[0]])) * sizes[node.input[0]][-1]
    assert counted == shape.macs


def test_an_impossible_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_out = 5 is more than tokens_in = 4"):
        BlockShape(4, 5, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="ffn = 0: must be at least 1"):
        BlockShape(4, 4, 1, 1, 1, 0, 1)


def test_a_small_table_is_measured_and_saved(tmp_path: Path) -> None:
    shapes = chosen_shapes(tokens=20, embed=64, heads=2, head_width=16, ffn=128, count=12)
    with pytest.raises(InputError, match="at least 9 are needed"):
        measure_cost_table(shapes[:10], held_out=2)
    found = measure_cost_table(shapes, held_out=2, time_limit_s=3.0, quiet=True)
    assert len(found.points) == 12
    assert set(found.costs_s) == set(PARTS)
    # A wide bound, since the test machine is busy.
    assert 0.5 < found.latency_s(shapes[0]) / found.points[0].latency_s < 2
    found.save(tmp_path / "table.json")
    assert CostTable.load(tmp_path / "table.json") == found
    (tmp_path / "table.json").write_text(
        (tmp_path / "table.json").read_text().replace('"threads": 1', '"threads": 0')
    )
    with pytest.raises(InputError, match=r"table\.json: threads: Input should be greater"):
        CostTable.load(tmp_path / "table.json")
