"""The cost table of a recipe: it is of a file that the run ships, and its content is hashed."""

from __future__ import annotations

import json
from pathlib import Path

import bench_samples
import pytest
from latency_tables import COSTS, latency_table
from photo_folder import write_recipe
from tiny_models import tiny_vit
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.latency.solve import solve
from vitrim.compress.lift import lift
from vitrim.core.errors import InputError
from vitrim.pipeline import latency_table as latency_table_module
from vitrim.pipeline.latency_loop import latency_entry
from vitrim.pipeline.latency_table import (
    recipe_table,
    shipped_artifact,
    show_reach,
    table_mark,
)
from vitrim.pipeline.recipe import Recipe, load_recipe
from vitrim.targets.cost_table import Correction, CostTable, Errors, MeasuredNetwork

DENSE = lift(tiny_vit()).architecture


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe; no table ships for this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency_table_module, "shipped_table", lambda *given, **named: None)
    monkeypatch.setattr(latency_table_module, "tables_of", lambda *given, **named: [])
    write_recipe(tmp_path / "tiny.toml", tmp_path / "photos", "")
    return tmp_path


def with_table(place: Path, table: CostTable, *sets: str) -> Recipe:
    table.save(place / "costs.json")
    return of(place, 'masks.cost_table="costs.json"', *sets)


def of(place: Path, *sets: str) -> Recipe:
    return load_recipe(place / "tiny.toml", ["masks.latency=0.8", *sets])


@pytest.mark.parametrize(
    ("table", "sets", "name"),
    [
        ({}, (), "compact-fp32"),
        ({"precision": "int8"}, (), "compact-int8"),
        ({"threads": 2, "batch": 4}, ("bench.threads=2", "export.batch=4"), "compact-fp32"),
        ({}, ('export.batch="dynamic"',), "compact-fp32"),
        ({"target": "rpi4"}, ("export.target=rpi4",), None),
    ],
)
def test_a_table_of_a_file_that_the_run_ships_is_taken(
    place: Path, table: dict[str, object], sets: tuple[str, ...], name: str | None
) -> None:
    measured = latency_table(**table)
    recipe = with_table(place, measured, *sets)
    assert recipe_table(recipe, DENSE) == measured
    assert shipped_artifact(recipe, DENSE) == name


@pytest.mark.parametrize(
    ("table", "sets", "change"),
    [
        ({"runtime": "tvm"}, (), 'export.runtimes = ["tvm"]'),
        ({"precision": "fp16"}, (), 'export.precisions = ["fp16"]'),
        ({"threads": 2}, (), "bench.threads = 2"),
        ({"batch": 4}, (), "export.batch = 4"),
        ({"target": "rpi4"}, (), 'export.target = "rpi4"'),
        ({"target": "phone"}, (), "export.target = the TOML of phone"),
        ({}, ("export.target=rpi4", "bench.threads=4"), 'export.target = "host" and bench.thr'),
    ],
)
def test_a_table_of_no_file_that_the_run_ships_is_refused(
    place: Path, table: dict[str, object], sets: tuple[str, ...], change: str
) -> None:
    recipe = with_table(place, latency_table(**table), *sets)
    with pytest.raises(InputError) as caught:
        recipe_table(recipe, DENSE)
    message = str(caught.value)
    assert message.startswith('masks.cost_table = "costs.json" is of ')
    assert f"; write {change}" in message
    threads = recipe.bench.threads
    assert f"--cost-table FILE --target {recipe.export.target} --runtime onnx" in message
    assert f"--precision fp32 --threads {threads} --batch 1" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ("masks.target_runtime=tvm",),
            'masks.target_runtime = "tvm" is of tvm fp32 on host, 1 thread, batch 1, and no '
            "artifact of the run is (compact-fp32: onnxruntime fp32 on host, 1 thread, batch 1)",
        ),
        (("export.batch=4",), "the cost table without a file is of onnxruntime fp32 on host, 1 th"),
        (('export.image_size="32x32"',), "export.image_size = 32x32: the latency of [masks] is th"),
    ],
)
def test_what_a_run_ships_is_what_an_estimate_is_of(
    place: Path, sets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        recipe_table(of(place, *sets), DENSE)
    assert str(caught.value).startswith(message)


def test_the_mark_has_the_content_of_the_table(place: Path) -> None:
    errors = Errors(count=3, median=0.01, p95=0.02, largest=0.03)
    changed = [
        latency_table(costs_ms=COSTS | {"call": 0.02}),
        latency_table(correction=Correction(scale=1.1)),
        latency_table(tile=8),
        latency_table(whole=errors),
        latency_table(power_w=2.0),
    ]
    marks = [table_mark(with_table(place, table)) for table in [latency_table(), *changed]]
    assert len(set(marks)) == len(marks)
    again = latency_table(environment={"cpu_model": "Some CPU"})
    assert table_mark(with_table(place, again)) == marks[0]
    # The plan of a study reads the tables of all runs, and one without a table is a failed row.
    assert table_mark(of(place, 'masks.cost_table="absent.json"')) == " latency by no table"
    assert table_mark(load_recipe(place / "tiny.toml")) == ""


def test_the_mark_of_an_estimate_follows_from_the_profile(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [table_mark(of(place, f"export.target={name}")) for name in ("rpi4", "rpi5", "host")]
    assert len(set(found)) == 3
    assert found[2] == " latency of host onnxruntime fp32 1"
    assert " latency of stm32h7" in table_mark(of(place, "export.target=stm32h7"))
    # And of the tables that ship.
    for costs in (COSTS, COSTS | {"call": 0.02}):
        shipped = [latency_table(costs_ms=costs)]
        monkeypatch.setattr(
            latency_table_module, "tables_of", lambda *given, shipped=shipped, **named: shipped
        )
        found.append(table_mark(of(place, "export.target=host")))
    assert len(set(found)) == 5


def test_a_network_beyond_the_table_is_refused_unless_its_cut_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = network_shape(DENSE)
    small = shape.model_copy(update={"embed": shape.embed // 2})
    table = latency_table(points=[MeasuredNetwork(network=small, latency_ms=1.0)])
    recipe = with_table(place, table)
    assert recipe_table(recipe, DENSE) == table
    show_reach(recipe, DENSE, table, quiet=False)
    line = " ".join(capsys.readouterr().err.split())
    assert f"costs.json extrapolates to {shape.embed} channels of the stream (measured: " in line
    assert "`vitrim bench --cost-table FILE --like MODEL`; the cut is measured" in line
    pointless = latency_table()
    show_reach(with_table(place, pointless), DENSE, pointless, quiet=False)
    assert capsys.readouterr().err == ""
    board = table.model_copy(update={"target": "rpi4"})
    for given, sets in ((table, ["masks.latency_rounds=0"]), (board, ["export.target=rpi4"])):
        with pytest.raises(InputError, match=r"extrapolates to .* --like MODEL"):
            recipe_table(with_table(place, given, *sets), DENSE)
    with pytest.raises(InputError, match=r"extrapolates to .* --like MODEL"):
        solve(DENSE, 1.0, table)


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_report_holds_the_shipped_file_against_the_budget(place: Path, share: float) -> None:
    measured = {
        name: bench_samples.measurement(name=name) for name in ("compact-fp32", "compact-int8")
    }
    p50_ms = 1e3 * measured["compact-int8"].summary().p50_s
    record = {"schema": "vitrim.latency/1", "latency_ms": share * p50_ms, "met": True}
    recipe = with_table(place, latency_table(precision="int8"))
    assert latency_entry(recipe, DENSE, place, measured) is None
    (place / "latency.json").write_text(json.dumps(record))
    assert latency_entry(recipe, DENSE, place, measured) == {
        **{key: value for key, value in record.items() if key != "schema"},
        "shipped": "compact-int8",
        "shipped_ms": p50_ms,
        "shipped_met": share > 1,
    }
    # A board is not measured here.
    recipe = with_table(place, latency_table(target="rpi4"), "export.target=rpi4")
    assert "shipped_ms" not in (latency_entry(recipe, DENSE, place, measured) or {})
