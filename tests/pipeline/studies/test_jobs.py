"""Steps that one run takes from another, and what a measurement waits for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run_folder import RunFolder
from vitrim.pipeline.studies.early_stop import EarlyStop
from vitrim.pipeline.studies.expansion import StudyRun
from vitrim.pipeline.studies.jobs import run_job, take_steps
from vitrim.pipeline.studies.plan import Job, Source

MARKS = {"baseline": "b" * 64, "masks": "m" * 64}


@pytest.fixture
def owner(tmp_path: Path) -> RunFolder:
    """A run folder with the step `baseline` and a line of its history."""
    folder = RunFolder.open(tmp_path / "owner", resume=True, overwrite=False)

    def make(resumed: bool) -> str:
        del resumed
        (folder / "baseline").mkdir()
        (folder / "baseline/model.safetensors").write_bytes(b"weights")
        (folder / "history.jsonl").write_text('{"phase": "baseline"}\n{"phase": "masks"}\n')
        return "made"

    folder.step("baseline", MARKS["baseline"], ["baseline"], make, lambda: "loaded")
    return folder


def taken(tmp_path: Path, *steps: str) -> Path:
    place = tmp_path / "other"
    take_steps(tmp_path / "owner", place, Source("owner", {step: MARKS[step] for step in steps}))
    return place


def test_a_step_is_linked_with_its_entry_and_its_history(owner: RunFolder, tmp_path: Path) -> None:
    place = taken(tmp_path, "baseline")
    name = "baseline/model.safetensors"
    assert (place / name).stat().st_ino == (owner / name).stat().st_ino
    ledgers = [json.loads((path / "steps.json").read_text()) for path in (owner.path, place)]
    assert ledgers[0]["steps"] == ledgers[1]["steps"]
    assert (place / "history.jsonl").read_text() == '{"phase": "baseline"}\n'
    loaded = RunFolder(place).step(
        "baseline", MARKS["baseline"], ["baseline"], lambda _: "made", lambda: "loaded"
    )
    assert loaded == ("loaded", False)


def test_taking_a_step_again_changes_nothing(owner: RunFolder, tmp_path: Path) -> None:
    place = taken(tmp_path, "baseline")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    taken(tmp_path, "baseline")
    assert {path: path.read_bytes() for path in before} == before
    assert len(before) == 3


def test_a_taking_that_was_interrupted_is_completed(owner: RunFolder, tmp_path: Path) -> None:
    place = tmp_path / "other"
    (place / "baseline").mkdir(parents=True)
    RunFolder(place)._write()
    (place / "baseline/model.safetensors").write_bytes(b"half")
    taken(tmp_path, "baseline")
    assert (place / "baseline/model.safetensors").read_bytes() == b"weights"
    assert (owner / "baseline/model.safetensors").read_bytes() == b"weights"


def test_a_step_that_the_owner_lacks_is_named(owner: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it shares the step masks with run owner, which failed"):
        taken(tmp_path, "baseline", "masks")
    assert RunFolder(tmp_path / "other").is_done("baseline", MARKS["baseline"])


def test_a_changed_file_of_the_owner_is_not_taken(owner: RunFolder, tmp_path: Path) -> None:
    (owner / "baseline/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="shares the step baseline"):
        taken(tmp_path, "baseline")


def test_masks_come_with_the_record_of_their_latency(owner: RunFolder, tmp_path: Path) -> None:
    def make(resumed: bool) -> str:
        del resumed
        (owner / "mask.safetensors").write_bytes(b"mask")
        (owner / "latency.json").write_text("{}")
        return "made"

    owner.step("masks", MARKS["masks"], ["mask.safetensors"], make, lambda: "loaded")
    assert (taken(tmp_path, "baseline", "masks") / "latency.json").read_text() == "{}"


def test_a_repetition_of_a_stopped_run_is_stopped(owner: RunFolder, tmp_path: Path) -> None:
    """Its trainings are those of the run that was stopped, so that it has no other end."""
    study = tmp_path / "study"
    (study / "rungs/1").mkdir(parents=True)
    (study / "runs").mkdir()
    (tmp_path / "owner").rename(study / "runs/owner")
    with (study / "runs/owner/history.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"phase": "finetune", "epoch": 1, "val_top1": 40.0}\n')
    reason = "stopped by ASHA after epoch 1: 40.00 % validation top-1, 2 of 2 runs were better"
    value = {"val_top1": 40.0, "group": "", "continues": False, "reason": reason}
    (study / "rungs/1/owner.json").write_text(json.dumps(value), encoding="utf-8")
    run = StudyRun("other", 2, 7, 2, {}, load_recipe(None, ["finetune.epochs=3"]))
    source = Source("owner", {"baseline": MARKS["baseline"], "finetune": "f" * 64})
    # Also where a resumed study has no such rule any more.
    for rule in (EarlyStop(), None):
        outcome = run_job(Job(run, "finetune", source, early_stop=rule), study)
        assert (outcome.stopped, outcome.reason) == (True, reason)
    assert RunFolder(study / "runs/other").is_done("baseline", MARKS["baseline"])
    history = (study / "runs/other/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in history] == ["baseline", "finetune"]
