"""`vitrim study`: its words, its formats, and its errors."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from study_sample import large_table, write_study
from vitrim.cli import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study")
    large_table(place, 12)
    return place


def test_the_word_run_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, "[axes]\nmasks.params = [0.3, 0.5]\n")
    shown = []
    for words in (["study"], ["study", "run"]):
        assert call([*words, str(path), "--dry-run", "-q"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert [line.split("  ")[1] for line in shown[0].splitlines()] == [
        "masks.params=0.3, seed 7",
        "masks.params=0.5, seed 7",
    ]
    assert not (tmp_path / "runs").exists()


def test_rows_are_shown_in_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "show", str(folder), "--sort", "-params", "--where", "seed = 7"]
    assert call(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sharing" in lines[0]
    assert "compact_fp32_ms" in lines[0]
    assert len(lines) == 2 + 4
    assert lines[2].startswith(f"{9:010x}")


def test_rows_are_written_in_every_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(*words: str) -> str:
        assert call(["study", "show", str(folder), *words]) == 0
        return capsys.readouterr().out

    rows = json.loads(show("--format", "json"))
    assert len(rows) == 12
    assert {"id", "masks.params", "top1", "compact_fp32_ms", "reason"} <= set(rows[0])
    text = show("--format", "csv", "--columns", "id,top1")
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"id": row["id"], "top1": str(row["top1"])} for row in rows
    ]
    path = tmp_path / "rows.parquet"
    show("--format", "parquet", "--out", str(path))
    assert pyarrow.parquet.read_table(path).to_pylist() == rows
    means = json.loads(show("--means", "--format", "json", "--sort", "top1"))
    assert sum(row["runs"] for row in means) == 12
    assert means[0]["top1"] == max(row["top1"] for row in means)


@pytest.mark.parametrize("format_", ["csv", "json", "parquet"])
def test_only_rows_of_the_study_are_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    path = tmp_path / f"rows.{format_}"
    command = ["study", "show", str(folder), "--format", format_, "--out", str(path)]
    means = ["--means", "--columns", "runs,top1_std"]
    sizes = []
    for words in (["--columns", "id,top1"], [], means, []):
        assert call([*command, *words]) == 0
        sizes.append(path.stat().st_size)
    assert sizes[1] == sizes[3] > sizes[0]
    for content in (b"id,price\n1,2\n", b'[{"id": 1, "price": 2}]', b"PAR1", b"\nmine", b"[1]"):
        path.write_bytes(content)
        assert call(command) == 2
        assert f"not rows of this study as {format_}), so it is not" in capsys.readouterr().err
        assert path.read_bytes() == content


def test_the_table_of_the_study_is_never_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "study.sqlite").read_bytes()
    for format_ in ("csv", "json", "parquet"):
        out = str(folder / "study.sqlite")
        assert call(["study", "show", str(folder), "--format", format_, "--out", out]) == 2
        assert "the output is the study's table that is read" in capsys.readouterr().err
    assert (folder / "study.sqlite").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "FOLDER", "--out", "x"], "--out x: a table is only shown; write --format csv"),
        (["show", "FOLDER", "--where", "parms < 3"], "no column 'parms'; the nearest is params"),
        (["show", "FOLDER", "--sort", "tpo1"], "--sort: no column 'tpo1'; the nearest is top1"),
        (["show", "FOLDER", "--columns", "id,x1"], "--columns: no column 'x1'"),
        (["show", "FOLDER", "--format", "parquet"], "name the file with --out rows.parquet"),
        (["show", "nowhere"], "nowhere: not a study folder (it has no study.sqlite)"),
        (["report", "nowhere"], "nowhere: not a study folder"),
        (["nothing.toml"], "nothing.toml: no such study; name a TOML file, or one of magnitude,"),
        (["structured", "--retry-failed"], "--retry-failed needs --resume"),
    ],
)
def test_an_error_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    command = ["study", *(str(folder) if word == "FOLDER" else word for word in words)]
    assert call(command) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_an_interrupted_study_names_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrim.pipeline.studies.study_file.load_study", interrupt)
    assert call(["study", "mine.toml", "--out", "out", "--jobs", "2"]) == 130
    assert "resume with: vitrim study mine.toml --out out --jobs 2 --resume" in (
        capsys.readouterr().err
    )
