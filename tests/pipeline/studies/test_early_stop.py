"""Early stopping by ASHA: its rule, its rungs, and a study in which a run is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_sample import write_study
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.studies.early_stop import EarlyStop, Judge, Stopped, continues
from vitrim.pipeline.studies.engine import StudyOptions, run_study
from vitrim.pipeline.studies.expansion import StudyRun
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.study_file import load_study

STUDY = 'until = "finetune"\n[set]\n"finetune.epochs" = 3\n'


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=40),
    st.integers(2, 5),
)
def test_the_rule_keeps_the_best_and_stops_the_rest(values: list[float], factor: int) -> None:
    going = [continues(value, values[:place], factor) for place, value in enumerate(values)]
    assert going[0]
    for place, value in enumerate(values):
        seen = values[: place + 1]
        better = sum(other > value for other in seen)
        if not better:
            assert going[place]
        if better >= max(1, len(seen) // factor):
            assert not going[place]
        # What reaches the rung later has no influence.
        assert continues(value, [*values[:place]], factor) == going[place]


def test_rungs_are_before_the_last_epoch() -> None:
    assert EarlyStop().rungs(1) == []
    assert EarlyStop().rungs(10) == [1, 3, 9]
    assert EarlyStop(factor=2, first=3).rungs(12) == [3, 6]


def judge(folder: Path, run_id: str, params: float) -> Judge:
    recipe = load_recipe(None, ["finetune.epochs=8"])
    run = StudyRun(run_id, 1, 7, 1, {"masks.params": params, "finetune.lr": 1e-3}, recipe)
    return Judge(EarlyStop(), run, folder)


def record(epoch: int, top1: float, phase: str = "finetune") -> dict[str, Any]:
    return {"phase": phase, "epoch": epoch, "val_top1": top1}


def test_runs_of_one_size_are_compared_in_the_order_in_which_they_come(tmp_path: Path) -> None:
    judge(tmp_path, "a", 0.5)(record(1, 80.0))
    judge(tmp_path, "b", 0.5)(record(1, 81.0))
    # A smaller network, another phase and an epoch that is no rung.
    judge(tmp_path, "c", 0.1)(record(1, 50.0))
    judge(tmp_path, "d", 0.5)(record(1, 10.0, "masks"))
    judge(tmp_path, "d", 0.5)(record(2, 10.0))
    last = judge(tmp_path, "d", 0.5)
    with pytest.raises(Stopped) as caught:
        last(record(1, 80.5))
    reason = "stopped by ASHA after epoch 1: 80.50 % validation top-1, 1 of 2 runs were better"
    assert str(caught.value) == reason
    # Also if the study was killed before it wrote the end of the run.
    with pytest.raises(Stopped, match="1 of 2 runs were better"):
        judge(tmp_path, "d", 0.5).check()
    judge(tmp_path, "a", 0.5).check()
    (tmp_path / "rungs/1/a.json").write_text("{}")
    with pytest.raises(InputError, match=r"a\.json: damaged; delete it"):
        judge(tmp_path, "e", 0.5)(record(1, 1.0))


def test_a_stopped_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    path, folder = write_study(tmp_path, STUDY), tmp_path / "out"
    # A study that was killed when one run, the best that there can be, had reached the first rung.
    (folder / "rungs/1").mkdir(parents=True)
    (folder / "study.toml").write_text(path.read_text())
    best = {"val_top1": 101.0, "group": "", "continues": True, "reason": ""}
    (folder / "rungs/1/0123456789.json").write_text(json.dumps(best))
    options = StudyOptions(early_stop="asha", resume=True, quiet=True)
    (row,) = run_study(load_study(path), folder, options).rows()
    assert row["state"] == "stopped"
    assert str(row["reason"]).startswith("stopped by ASHA after epoch 1: ")
    assert str(row["reason"]).endswith("1 of 1 runs were better")
    assert 0 < row["params"] < 19323  # type: ignore[operator]
    assert row["val_top1"] is not None
    lines = (folder / "runs" / str(row["id"]) / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines if '"finetune"' in line] == [1]
    again = StudyOptions(resume=True, retry_failed=True, quiet=True)
    assert run_study(load_study(path), folder, again).rows() == [row]
    write_report(folder)
    text = (folder / "study.md").read_text()
    assert "**0 of 1 run done, 1 stopped early**" in text
    assert "## Stopped runs" in text


def test_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="early_stop"):
        load_study(write_study(tmp_path, 'early_stop = "median"\n'))
    with pytest.raises(InputError, match="early_stop_factor"):
        load_study(write_study(tmp_path, "early_stop_factor = 1\n"))
