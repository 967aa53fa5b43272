"""Loading a run folder: all parts, errors that name file and key, and later measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import report_sample
from vitrim.bench.report.model import Report, json_schema
from vitrim.bench.report.run import load_measurements, load_run
from vitrim.core.errors import InputError


def test_all_parts_of_a_run_folder_are_loaded(tmp_path: Path) -> None:
    run = load_run(report_sample.write_run(tmp_path / "run"))
    assert run.report.models["compact"].params == 231_904
    assert len(run.kept) == 8
    assert [epoch.phase for epoch in run.history].count("masks") == 20
    assert run.recipe_toml is not None
    assert run.missing == ()


def test_the_report_is_equal_after_writing_and_matches_its_schema(tmp_path: Path) -> None:
    report = load_run(report_sample.write_run(tmp_path / "run")).report
    plain = json.loads(json.dumps(report.to_dict()))
    assert Report.model_validate(plain) == report
    jsonschema.validate(plain, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**plain, "models": {}}, json_schema())


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    report = load_run(report_sample.write_run(tmp_path / "run", data_seed=3)).report
    assert report.to_dict()["data_seed"] == 3


@pytest.mark.parametrize(
    ("name", "part"),
    [("kept.json", "Kept units per block"), ("history.jsonl", "Training curves")],
)
def test_a_missing_part_has_a_line(tmp_path: Path, name: str, part: str) -> None:
    run = load_run(report_sample.write_run(tmp_path / "run", without=(name,)))
    assert [line for line in run.missing if part in line and name in line]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"schema": "vitrim.report/9"},
            "report.json: schema is 'vitrim.report/9', not 'vitrim.report/1'",
        ),
        ({"models": {}}, "report.json: models: dictionary should have at least 1 item"),
        (
            {"models": {"baseline": {"macs": 1, "top1": None}}},
            "report.json: models.baseline.params: field required",
        ),
        (
            {"models": {"baseline": {"params": 1, "macs": 1, "top1": 91.3}}},
            "report.json: models.baseline.top1: input should be less than",
        ),
        (
            {"parity": {"cut": -1}},
            "report.json: parity.cut: input should be greater than or equal to 0",
        ),
    ],
)
def test_an_invalid_report_is_refused_with_its_key(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = report_sample.write_run(tmp_path / "run", **change)
    with pytest.raises(InputError) as error:
        load_run(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_measurement_in_the_report_is_validated(tmp_path: Path) -> None:
    made = report_sample.report()
    made["models"]["compact"]["artifacts"][1]["measurement"]["latency_s"] = []
    folder = report_sample.write_run(tmp_path / "run", **made)
    with pytest.raises(
        InputError, match=r"report\.json: models\.compact\.artifacts\.1\.measurement\.latency_s: "
    ):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("report.json", "{", "report.json: not JSON"),
        ("report.json", "[]", "report.json: schema is 'list'"),
        ("kept.json", "{}", "kept.json: expected a list of branches, found dict"),
        (
            "kept.json",
            '[{"branch": "b", "kind": "ffn", "dims": {"ffn": [9, 3]}}]',
            "kept.json: branch 0: dims: ffn keeps 9 of 3",
        ),
        (
            "kept.json",
            '[{"branch": "b", "kind": "conv"}]',
            "kept.json: branch 0: kind: input should be 'attention'",
        ),
        ("history.jsonl", '{"phase": "masks"}\n', "history.jsonl: line 1: epoch: field required"),
        ("history.jsonl", 'x\n{"phase": "masks", "epoch": 1}\n', "history.jsonl: line 1: not JSON"),
        (
            "history.jsonl",
            '{"phase": "masks", "epoch": 1, "loss": "low"}\n',
            "history.jsonl: line 1: loss: input should be a valid number",
        ),
    ],
)
def test_an_invalid_file_is_refused_with_its_key(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(InputError) as error:
        load_run(folder)
    assert words in str(error.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    (folder / "kept.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"kept\.json: not a text file"):
        load_run(folder)


def test_a_truncated_history_keeps_its_complete_lines(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    path = folder / "history.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(load_run(folder).history) == 69


def test_a_missing_and_an_empty_folder_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"contains neither report\.json nor measurements"):
        load_run(tmp_path)


def test_a_later_measurement_is_added_to_its_model_and_a_known_one_is_not(
    tmp_path: Path,
) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    (folder / "measurements").mkdir()
    known = report_sample.measurements()["compact-int8"]
    later = report_sample.measurement(
        "compact-int8", "int8", 0.003, 318_000, 0.9096, device="ssh://board", session="two"
    )
    for name, data in (("a", known), ("b", later)):
        (folder / "measurements" / f"{name}.json").write_text(json.dumps(data))
    compact = load_run(folder).report.models["compact"]
    assert compact.params == 231_904
    assert [a.measurement.device for a in compact.artifacts if a.measurement] == [
        "host",
        "host",
        "ssh://board",
    ]


def test_measurements_alone_are_grouped_into_models_by_name(tmp_path: Path) -> None:
    files = []
    for name, data in report_sample.measurements().items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(data))
    run = load_measurements(files)
    assert {name: len(model.artifacts) for name, model in run.report.models.items()} == {
        "baseline": 1,
        "compact": 2,
    }
    assert run.report.models["baseline"].params is None
    with pytest.raises(InputError, match="no measurement file was named"):
        load_measurements([])
