"""A killed cut continues from its folder, and refuses the folder of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_vit
from torch import nn
from vitrim import InputError, trim
from vitrim.compress.oneshot.trim import Trimmed, TrimOptions

OPTIONS = TrimOptions(round_to=4)


class Killed(Exception):
    """Stands for a kill in the middle."""


def _images(seed: int = 0) -> torch.Tensor:
    small = torch.randn(80, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, size=16, mode="bilinear")


def _cut(folder: Path | None, **arguments: Any) -> Trimmed:
    given = {"macs": 0.6, "options": OPTIONS, **arguments}
    return trim(tiny_vit(depth=3), _images(), resume=folder, **given)


def _same(first: Trimmed, second: Trimmed) -> None:
    assert first.widths == second.widths
    assert first.predicted_error == pytest.approx(second.predicted_error, rel=1e-9)
    state = second.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "number"), [("weigh", 1), ("predict", 1), ("predict", 4), ("compensate", 3)]
)
def test_a_killed_cut_continues_with_the_same_result(
    tmp_path: Path, stage: str, number: int
) -> None:
    def kill(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, number):
            raise Killed

    folder = tmp_path / "state"
    with pytest.raises(Killed):
        _cut(folder, progress=kill)
    seen: list[str] = []
    found = _cut(folder, progress=lambda name, done, total: seen.append(name))
    _same(found, _cut(None))
    assert ("weigh" in seen) == (stage == "weigh")


def test_finished_parts_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _cut(tmp_path)
    for module, name in (
        ("prediction", "rotated_curves"),
        ("prediction", "stream_weights"),
        ("compensation", "_refit"),
    ):
        monkeypatch.delattr(f"vitrim.compress.oneshot.{module}.{name}")
    _same(_cut(tmp_path), first)


def test_another_budget_uses_the_same_pass(tmp_path: Path) -> None:
    _cut(tmp_path)
    before = {path.name for path in tmp_path.glob("predict-*")}
    smaller = _cut(tmp_path, macs=0.5)
    assert {path.name for path in tmp_path.glob("predict-*")} == before
    _same(smaller, _cut(None, macs=0.5))


def test_the_folder_of_another_cut_is_refused(tmp_path: Path) -> None:
    _cut(tmp_path)
    with pytest.raises(InputError, match="was begun with another model, other images or other"):
        trim(tiny_vit(depth=3), _images(seed=1), macs=0.6, options=OPTIONS, resume=tmp_path)
    with pytest.raises(InputError, match="was begun with another model, other images or other"):
        trim(tiny_vit(depth=2), _images(), macs=0.6, options=OPTIONS, resume=tmp_path)
    with pytest.raises(InputError, match="was begun with another model, other images or other"):
        _cut(tmp_path, options=TrimOptions(round_to=8))


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not the state of a cut; name an empty or a new folder"):
        _cut(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("part", ["weights", "predict-0000", "predict-0002"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_part_is_refused_by_name(tmp_path: Path, part: str, damage: str) -> None:
    _cut(tmp_path)
    path = tmp_path / f"{part}.safetensors"
    other = tmp_path / (
        "predict-0001.safetensors" if part != "weights" else "predict-0000.safetensors"
    )
    content = {"truncated": path.read_bytes()[:-40], "empty": b"", "foreign": other.read_bytes()}
    path.write_bytes(content[damage])
    with pytest.raises(InputError, match=rf"{part}\.safetensors: damaged .*delete the file"):
        _cut(tmp_path)
