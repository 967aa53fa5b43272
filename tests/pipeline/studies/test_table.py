"""The table of a study: its columns, its order, many writers, and a thousand rows."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import sqlite3
from pathlib import Path

import pyarrow.parquet
import pytest
from study_sample import large_table
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.exports import as_csv, as_json, as_parquet, mean_rows
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.summary import on_fronts, pareto, summarise
from vitrim.pipeline.studies.table import TABLE_FILE, Column, StudyTable

WRITERS, WRITES = 4, 25
FIGURES = {"top1": 0.5, "params": 10}


@pytest.fixture
def table(tmp_path: Path) -> StudyTable:
    return large_table(tmp_path, 12)


def _write(folder: Path, first: int) -> None:
    table = StudyTable(folder)
    ids = list(table.states())
    for number in range(WRITES):
        column = Column(f"writer_{first}_{number % 3}", "figure", "REAL", "a figure")
        run = ids[(first + number) % len(ids)]
        table.change(run, "done", figures={column.name: number}, columns=[column])


def test_many_processes_write_at_the_same_time(tmp_path: Path, table: StudyTable) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, n)) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(table.rows()) == 12
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    names = {column.name for column in table.columns()}
    assert {f"writer_{n}_{k}" for n in range(WRITERS) for k in range(3)} <= names
    # No write of one process was lost to another.
    rows = table.rows()
    for n in range(WRITERS):
        found = [row[f"writer_{n}_0"] for row in rows if row[f"writer_{n}_0"] is not None]
        assert max(found) == WRITES - 1  # type: ignore[type-var]


def test_the_file_is_in_wal_mode(tmp_path: Path, table: StudyTable) -> None:
    with sqlite3.connect(tmp_path / TABLE_FILE) as link:
        assert link.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_best_row_is_first_and_missing_values_are_last(table: StudyTable) -> None:
    first, second, *_ = table.states()
    table.change(first, "failed", "no memory", {"top1": None})
    table.change(second, "done", figures={"top1": 0.99})
    best = table.rows(sort="top1")
    assert best[0]["id"] == second
    assert best[-1]["id"] == first
    assert best[-1]["reason"] == "no memory"
    smallest = [row["params"] for row in table.rows(sort="params")]
    assert smallest == sorted(smallest)  # type: ignore[type-var]
    assert table.rows(sort="-params")[0]["params"] == max(smallest)  # type: ignore[type-var]
    with pytest.raises(InputError, match="--sort: no column 'topl'; the nearest is top1"):
        table.rows(sort="topl")


def test_a_condition_restricts_the_rows(table: StudyTable) -> None:
    found = table.rows("masks.sharing = 'full' and seed in (7, 13)")
    assert {row["masks.sharing"] for row in found} == {"full"}
    assert {row["seed"] for row in found} == {7, 13}
    assert 0 < len(found) < 6


def test_adding_runs_again_keeps_their_rows(tmp_path: Path, table: StudyTable) -> None:
    before = table.rows()
    again = StudyTable.create(tmp_path, {"name": "renamed"})
    assert again.rows() == before
    assert again.facts()["name"] == "renamed"


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a study folder \(it has no study.sqlite\)"):
        StudyTable(tmp_path)
    (tmp_path / TABLE_FILE).write_text("no database" * 100)
    with pytest.raises(InputError, match="damaged"):
        StudyTable(tmp_path)
    (tmp_path / TABLE_FILE).unlink()
    sqlite3.connect(tmp_path / TABLE_FILE).execute("CREATE TABLE study (key, value)")
    with pytest.raises(InputError, match="not a table of this version"):
        StudyTable(tmp_path)


def test_exports_have_the_same_values(table: StudyTable) -> None:
    rows, names = table.rows(), [column.name for column in table.columns()]
    assert json.loads(as_json(rows, names)) == rows
    lines = list(csv.DictReader(io.StringIO(as_csv(rows, names))))
    assert [float(line["top1"]) for line in lines] == [row["top1"] for row in rows]
    assert {line["reason"] for line in lines} == {""}
    parquet = pyarrow.parquet.read_table(io.BytesIO(as_parquet(rows, names)))
    assert parquet.to_pylist() == rows


def test_a_column_of_numbers_and_texts_is_texts_in_parquet() -> None:
    written = as_parquet([{"a": 1}, {"a": "none"}, {"a": None}], ["a"])
    assert pyarrow.parquet.read_table(io.BytesIO(written)).to_pydict() == {"a": ["1", "none", None]}


def test_means_are_over_the_seeds_of_a_setting(tmp_path: Path) -> None:
    table = StudyTable.create(tmp_path, {"name": "means"})
    large = large_table(tmp_path, 6)
    ids = list(large.states())
    for run, top1 in zip(ids, (0.8, 0.9, 0.7, 0.5, 0.6, 0.7), strict=True):
        table.change(run, "done", figures={"top1": top1})
    summary = summarise(table)
    rows, columns = mean_rows(summary, table.rows())
    assert {"top1", "top1_std", "runs", "masks.params"} <= {column.name for column in columns}
    by_setting = {(row["masks.params"], row["masks.sharing"]): row for row in rows}
    first = by_setting[0.1, "full"]
    assert first["runs"] == 2
    assert first["top1"] == pytest.approx(0.75)
    assert first["top1_std"] == pytest.approx(0.0707, abs=1e-4)
    assert by_setting[0.1, "residual"]["top1_std"] is None
    best, *_, worst = mean_rows(summary, table.rows(), "top1")[0]
    assert best["top1"] >= worst["top1"]  # type: ignore[operator]


def test_a_front_has_the_runs_that_no_other_beats(table: StudyTable) -> None:
    rows = [
        {"id": name, "params": params, "top1": top1, "seed": 7}
        for name, params, top1 in (
            ("a", 10, 0.5),
            ("b", 20, 0.4),
            ("c", 20, 0.7),
            ("d", 30, 0.7),
            ("e", 40, 0.9),
            ("f", 5, None),
        )
    ]
    assert [row["id"] for row in pareto(rows, "params", "top1")] == ["a", "c", "e"]
    summary = summarise(table)
    assert set(summary.fronts) == {"params", "macs", "compact_fp32_ms"}
    assert set(summary.fronts["params"]) == {7, 13, 42}
    counted = sum(count for _, count in on_fronts(summary, "params"))
    assert counted == sum(map(len, summary.fronts["params"].values()))


def test_a_thousand_rows_are_shown_and_reported(tmp_path: Path) -> None:
    # How fast: python -m benchmarks.measurement.study_table.
    table = large_table(tmp_path, 1000)
    assert len(table.rows("params < 3e5", "top1")) == 600
    written = write_report(tmp_path)
    assert written == [str(tmp_path / "study.html"), str(tmp_path / "study.md")]
    page = (tmp_path / "study.html").read_text(encoding="utf-8")
    assert page.count("<tr>") > 1000
    assert f'href="runs/{999:010x}/report.html"' in page
