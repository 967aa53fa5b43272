"""A measurement is consistent and survives its file; a broken file is refused by its key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_samples import measurement
from pydantic import ValidationError
from vitrim.bench.report.model import ArtifactEntry
from vitrim.bench.results.measurement import Measurement
from vitrim.core.errors import InputError


def test_a_saved_measurement_loads_equal(tmp_path: Path) -> None:
    original = measurement(top1=0.75, correct=3, total=4)
    original.save(tmp_path / "m.json")
    assert Measurement.load(tmp_path / "m.json") == original
    assert json.loads((tmp_path / "m.json").read_text())["schema"] == "vitrim.measurement/1"


@pytest.mark.parametrize(
    ("earlier", "present"),
    [("x86-64", "x86-64-v4-vnni"), ("x86-64-avx2", "x86-64-v3"), ("rpi4", "rpi4")],
)
def test_a_target_of_an_earlier_version_keeps_its_meaning(
    tmp_path: Path, earlier: str, present: str
) -> None:
    path = tmp_path / "m.json"
    measurement(target=earlier).save(path)
    assert Measurement.load(path).target == earlier
    data = json.loads(path.read_text())
    del data["target_features"]
    path.write_text(json.dumps(data))
    assert Measurement.load(path).target == present
    entry = {"runtime": "onnxruntime", "precision": "fp32", "target": earlier, "bytes": 1}
    assert ArtifactEntry.model_validate({**entry, "measurement": data}).target == present


def test_statistics_are_derived_and_not_stored(tmp_path: Path) -> None:
    original = measurement()
    assert original.summary().p50_s == 0.002
    assert original.beyond_floor_rss_bytes == 60
    assert not {"p50_s", "mean_s", "statistics"} & set(original.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_turn": (1, 1)}, "samples_per_turn sums to 2, but latency_s holds 3"),
        ({"top1": 0.5}, "top1, correct and total must be given jointly"),
        ({"top1": 0.5, "correct": 3, "total": 4}, "is not correct / total = 3 / 4"),
        ({"latency_s": ()}, "latency_s"),
        ({"latency_s": (float("nan"),), "samples_per_turn": ()}, "latency_s"),
        ({"latency_ms": 3}, "latency_ms"),
    ],
)
def test_a_measurement_that_contradicts_itself_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        measurement(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "m.json: not JSON"),
        ("[]", "m.json: schema is 'list', not 'vitrim.measurement/1'"),
        ('{"schema": "vitrim.report/1"}', "m.json: schema is 'vitrim.report/1'"),
        ('{"schema": "vitrim.measurement/1"}', "m.json: name: Field required"),
    ],
)
def test_a_broken_file_is_refused_by_name_and_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        Measurement.load(tmp_path / "m.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: cannot be read"):
        Measurement.load(tmp_path / "absent.json")


def test_bench_and_targets_need_no_torch() -> None:
    code = """
import importlib, pkgutil, sys, vitrim.bench, vitrim.targets
for package in (vitrim.bench, vitrim.targets):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
