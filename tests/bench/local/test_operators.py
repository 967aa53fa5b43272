"""The operator table adds up and names what the runtime really ran."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_samples import chain
from vitrim.bench.local.operators import profile_operators
from vitrim.core.errors import InputError


def test_rows_add_up_to_the_whole(tmp_path: Path) -> None:
    table = profile_operators(chain(tmp_path / "m.onnx", width=400, layers=3), runs=5)
    assert sum(table.share(row.seconds) for row in table.rows) == pytest.approx(1)
    assert [row.seconds for row in table.rows] == sorted(
        (row.seconds for row in table.rows), reverse=True
    )
    kinds = table.by_operator()
    assert kinds["MatMul"][0] == 4
    assert sum(seconds for _, seconds, _ in kinds.values()) == pytest.approx(table.seconds)
    assert {
        shape for row in table.rows if row.operator == "MatMul" for shape in row.output_shapes
    } == {(1, 400), (1, 10)}


def test_no_run_and_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs = 0: at least 1"):
        profile_operators(chain(tmp_path / "m.onnx"), runs=0)
    (tmp_path / "broken.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot load it"):
        profile_operators(tmp_path / "broken.onnx")
