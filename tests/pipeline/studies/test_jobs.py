"""Steps that one run takes from another, and what a measurement waits for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vitrim.core.errors import InputError
from vitrim.pipeline.run_folder import RunFolder
from vitrim.pipeline.studies.jobs import take_steps
from vitrim.pipeline.studies.plan import Source

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
