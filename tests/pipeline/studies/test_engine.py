"""Running a study: its run folders, its failures, and a study that was killed three times."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
from study_sample import logged_processes, rows_without_time, write_study
from vitrim.cli import call
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe_sections import BenchSection
from vitrim.pipeline.studies import engine
from vitrim.pipeline.studies.engine import StudyOptions, run_study, validated_runs
from vitrim.pipeline.studies.local_workers import Event
from vitrim.pipeline.studies.study_file import load_study
from vitrim.pipeline.studies.table import TABLE_FILE, StudyTable
from warm_processes import Running, start_vitrim

# Twelve runs, of which four fail: no mask meets that budget.
TEXT = """
until = "finetune"
seeds = [7, 13]
[axes]
"masks.params" = [0.6, 0.5, 0.0001]
"finetune.lr" = [1e-3, 1e-4]
"""
# Two runs with the same masks, measured.
MEASURED = """
[axes]
"finetune.lr" = [1e-3, 1e-4]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def study(place: Path) -> Path:
    return write_study(place, TEXT)


@pytest.fixture(scope="module")
def finished(study: Path) -> Path:
    """The folder of a study that nothing interrupted."""
    folder = study.parent / "whole"
    run_study(load_study(study), folder, StudyOptions(quiet=True))
    return folder


@pytest.fixture(scope="module")
def measured(place: Path) -> Path:
    """The folder of a study with artifacts and measurements, in two processes."""
    path = write_study(place, MEASURED, "measured")
    assert call(["study", str(path), "--out", str(place / "two"), "--jobs", "2", "-q"]) == 0
    return place / "two"


def test_every_run_is_a_row(finished: Path) -> None:
    rows = StudyTable(finished).rows()
    assert [row["state"] for row in rows] == ["done"] * 4 + ["failed"] * 2 + ["done"] * 4 + [
        "failed"
    ] * 2
    for row in rows[:4]:
        assert row["params"] < row["params_dense"] == 19323  # type: ignore[operator]
        assert 0 <= row["val_top1"] <= 1  # type: ignore[operator]
        assert row["top1"] is None
        assert 0 < row["kept_ffn"] <= 1  # type: ignore[operator]
        assert 0 < row["kept_attention"] <= 1  # type: ignore[operator]
    assert rows[0]["params"] > rows[2]["params"]  # type: ignore[operator]
    assert "budget params = 0.0001: not feasible" in str(rows[4]["reason"])
    assert f"shares the step masks with run {rows[4]['id']}, which failed" in str(rows[5]["reason"])


def test_equal_steps_are_computed_once(finished: Path) -> None:
    rows = StudyTable(finished).rows()
    owner, other = (finished / "runs" / str(row["id"]) for row in rows[:2])
    for name in ("baseline/model.safetensors", "mask.safetensors", "cut/model.safetensors"):
        assert (owner / name).stat().st_ino == (other / name).stat().st_ino
    name = "compact/model.safetensors"
    assert (owner / name).stat().st_ino != (other / name).stat().st_ino
    histories = [(folder / "history.jsonl").read_text().splitlines() for folder in (owner, other)]
    phases = [[json.loads(line)["phase"] for line in lines] for lines in histories]
    assert phases == [["baseline"] * 2 + ["masks", "finetune"]] * 2
    assert histories[0][:3] == histories[1][:3]


def test_a_run_of_a_study_is_an_ordinary_run_folder(finished: Path, place: Path) -> None:
    run = finished / "runs" / str(StudyTable(finished).rows()[1]["id"])
    before = json.loads((run / "steps.json").read_text())["steps"]
    command = ["run", str(run / "recipe.toml"), "--out", str(run), "--resume", "--quiet"]
    assert call(command) == 0
    after = json.loads((run / "steps.json").read_text())["steps"]
    assert {step: after[step] for step in before} == before
    assert (run / "report.html").is_file()


def _ended(folder: Path) -> int:
    """How many runs of a study have ended."""
    try:
        states = list(StudyTable(folder).states().values())
    except InputError:
        return 0
    return sum(state in ("done", "failed") for state in states)


def _killed(process: Running) -> None:
    """Kill a study, and only its own process; its workers end by themselves."""
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    assert process.wait() == -signal.SIGKILL
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert (len(gone), alive) == (len(workers), [])


def test_a_study_killed_three_times_has_the_table_of_one_that_was_not(
    study: Path, finished: Path
) -> None:
    folder = study.parent / "killed"
    for number, ended in enumerate((1, 4, 8)):
        resumed = ["--resume"] if number else []
        log = study.parent / f"killed-{number}"
        process = start_vitrim("study", study, "--out", folder, "-q", *resumed, log=log)
        process.wait_until(lambda ended=ended: _ended(folder) >= ended)  # type: ignore[misc]
        _killed(process)
        assert process.errors() == ""
    table = run_study(load_study(study), folder, StudyOptions(resume=True, jobs=2, quiet=True))
    assert rows_without_time(table) == rows_without_time(StudyTable(finished))


def test_the_worker_ends_with_a_killed_study(study: Path) -> None:
    folder = study.parent / "orphan"
    process = start_vitrim("study", study, "--out", folder, "-q", log=study.parent / "orphan-log")
    process.wait_until((folder / "logs").is_dir)
    _killed(process)


def test_a_killed_worker_is_tried_again(place: Path, finished: Path) -> None:
    text = 'until = "finetune"\n[axes]\n"masks.params" = [0.6]\n"finetune.lr" = [1e-3, 1e-4]\n'
    folder, path = place / "worker", write_study(place, text, "two")
    process = start_vitrim("study", path, "--out", folder, "-q", log=place / "worker-log")
    process.wait_until(lambda: bool(logged_processes(folder)))
    (named, *_) = logged_processes(folder)
    children = psutil.Process(process.pid).children(recursive=True)
    (worker,) = [child for child in children if child.pid == named]
    worker.kill()
    assert process.wait() == 0, process.errors()
    # Runs with equal settings have equal ids, in whichever study.
    assert rows_without_time(StudyTable(folder)) == rows_without_time(StudyTable(finished))[:2]


def test_measurements_follow_the_trainings(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = StudyTable(measured).rows()
    assert [row["state"] for row in rows] == ["done", "done"]
    for row in rows:
        assert row["compact_fp32_ms"] > 0  # type: ignore[operator]
        assert row["compact_fp32_memory_bytes"] > 0  # type: ignore[operator]
        assert row["baseline_fp32_bytes"] > row["compact_fp32_bytes"]  # type: ignore[operator]
        assert row["top1"] == row["compact_fp32_top1"]
        run = measured / "runs" / str(row["id"])
        assert (run / "report.html").is_file()
    ends = [
        (measured / "runs" / str(row["id"]) / "compact/architecture.json").stat().st_mtime
        for row in rows
    ]
    starts = [(measured / "runs" / str(row["id"]) / "artifacts").stat().st_ctime for row in rows]
    assert max(ends) < min(starts)
    assert call(["study", "show", str(measured), "--sort", "top1", "--where", "params < 1e6"]) == 0
    shown = capsys.readouterr().out
    assert all(str(row["id"]) in shown for row in rows)


def test_a_study_gains_runs_and_loses_none(measured: Path, place: Path) -> None:
    with pytest.raises(InputError, match="contains a study; --resume continues it"):
        run_study(load_study(place / "measured.toml"), measured, StudyOptions(quiet=True))
    fewer = write_study(place, '[axes]\n"finetune.lr" = [1e-3]\n', "fewer")
    with pytest.raises(InputError, match=r"has 1 runs that .*fewer.toml does not describe"):
        run_study(load_study(fewer), measured, StudyOptions(resume=True, quiet=True))
    # Trained before with other settings of the measurement only: nothing is trained again.
    more = write_study(
        place, 'until = "finetune"\n[axes]\n"finetune.lr" = [1e-3, 1e-4, 1e-5]\n', "more"
    )
    table = run_study(load_study(more), measured, StudyOptions(resume=True, quiet=True))
    assert [row["state"] for row in table.rows()] == ["done"] * 3
    assert [row["top1"] is None for row in table.rows()] == [False, False, True]


@pytest.fixture
def no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies begin and end, but do nothing."""

    def nothing(*arguments: object) -> Generator[Event, None, None]:
        yield from ()

    monkeypatch.setattr(engine, "_events", nothing)


@pytest.mark.usefixtures("no_jobs")
def test_models_beside_are_timed_as_the_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[BenchSection] = []

    def note(
        names: object, table: object, folder: object, bench: BenchSection, **_: object
    ) -> None:
        del names, table, folder
        found.append(bench)

    monkeypatch.setattr(engine, "measure_beside", note)
    path = write_study(tmp_path, 'beside = ["test_vit"]\n[set]\n"bench.threads" = 2\n')
    study = load_study(path, ["bench.time_limit_s=0.3"])
    run_study(study, tmp_path / "out", StudyOptions(quiet=True))
    assert (found[0].threads, found[0].time_limit_s) == (2, 0.3)


@pytest.mark.usefixtures("no_jobs")
def test_a_study_folder_is_resumed_without_the_file_and_its_recipe(tmp_path: Path) -> None:
    path = write_study(tmp_path, MEASURED)
    first = run_study(load_study(path, ["finetune.epochs=2"]), tmp_path / "out")
    path.unlink()
    (tmp_path / "tiny.toml").unlink()
    again = load_study(tmp_path / "out/study.toml")
    table = run_study(again, tmp_path / "out", StudyOptions(resume=True, quiet=True))
    assert table.states() == first.states()
    assert table.facts()["name"] == "trial"


def test_another_folder_is_not_touched(tmp_path: Path, study: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="the output folder is not empty"):
        run_study(load_study(study), tmp_path, StudyOptions(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_run_is_validated_before_the_first(place: Path) -> None:
    text = '[axes]\nmodel.name = ["vit_tiny_patch16_224", "vit_unknown"]\n'
    path = write_study(place, text, "models")
    with pytest.raises(InputError, match=r"models.toml: model.name=vit_unknown, seed 7: "):
        validated_runs(load_study(path), quiet=True)
    with pytest.raises(InputError, match="vit_unknown"):
        run_study(load_study(path), place / "models", StudyOptions(quiet=True))
    assert not (place / "models" / TABLE_FILE).exists()
