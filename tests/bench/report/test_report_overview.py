"""The figures: compared on one device only; the headline is of the fastest accurate artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_sample
from vitrim.bench.report.kept import kept_blocks
from vitrim.bench.report.model import KeptBranch
from vitrim.bench.report.overview import Overview, overview
from vitrim.bench.report.run import load_measurements, load_run
from vitrim.bench.report.table import NONE, side_by_side, table


def measured(tmp_path: Path, *made: dict[str, Any]) -> Overview:
    files = []
    for number, data in enumerate(made):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(data))
    return overview(load_measurements(files))


def test_the_headline_has_parameters_top1_and_speed_up(tmp_path: Path) -> None:
    view = overview(load_run(report_sample.write_run(tmp_path / "run")))
    assert view.headline == "0.80 M → 0.23 M parameters, 91.3 → 91.0 % top-1, 3.5× faster"
    assert view.chosen == "compact int8"
    assert [change.name for change in view.changes] == [
        "Parameters",
        "Multiply-adds",
        "Top-1",
        "Latency, p50",
        "Files",
    ]


def test_figures_agree_with_the_raw_samples(tmp_path: Path) -> None:
    made = report_sample.measurements()
    row = overview(load_run(report_sample.write_run(tmp_path / "run"))).devices[0].rows[1]
    ratio = np.median(made["baseline-fp32"]["latency_s"]) / np.median(
        made["compact-fp32"]["latency_s"]
    )
    assert row.speed_up is not None
    # The ratio of interleaved measurements is taken per round, which cancels drift. Without drift
    # the two agree closely.
    assert row.speed_up.estimate == pytest.approx(ratio, rel=0.005)
    assert row.speed_up.low < ratio < row.speed_up.high
    assert row.efficiency == pytest.approx(row.speed_up.estimate / (40_141_312 / 11_603_200))
    low, high = row.top1_interval or (0, 0)
    assert low < 0.9103 < high
    # Wilson's interval of 9,103 in 10,000, from R's prop.test(9103, 10000, correct = FALSE).
    assert (low, high) == pytest.approx((0.90454, 0.91574), abs=1e-5)


def test_an_inaccurate_artifact_is_not_in_the_headline(tmp_path: Path) -> None:
    view = measured(
        tmp_path,
        report_sample.measurement("baseline-fp32", "fp32", 0.001, 3_000_000, 0.91, seed=1),
        report_sample.measurement("compact-fp32", "fp32", 0.0004, 900_000, 0.905, seed=2),
        report_sample.measurement("compact-int8", "int8", 0.0002, 300_000, 0.70, seed=3),
    )
    assert view.chosen == "compact fp32"


def test_a_slower_compact_model_is_called_slower(tmp_path: Path) -> None:
    view = measured(
        tmp_path,
        report_sample.measurement("baseline-fp32", "fp32", 0.001, 3_000_000, 0.91, seed=1),
        report_sample.measurement("compact-fp32", "fp32", 0.003, 900_000, 0.905, seed=2),
    )
    assert view.headline.endswith("3.0× slower")


def test_devices_are_not_compared_with_each_other(tmp_path: Path) -> None:
    board = report_sample.environment(device_model="Raspberry Pi 5", cpu_model="Cortex-A76")
    view = measured(
        tmp_path,
        report_sample.measurement("baseline-fp32", "fp32", 0.001, 3_000_000, 0.91, seed=1),
        report_sample.measurement(
            "compact-fp32", "fp32", 0.004, 900_000, 0.91, seed=2, environment=board, session="two"
        ),
    )
    assert [device.name for device in view.devices] == [
        "Intel(R) Xeon(R) Platinum 8488C",
        "Raspberry Pi 5",
    ]
    assert all(row.speed_up is None for device in view.devices for row in device.rows)
    lines = side_by_side(view.devices)
    assert [line.name for line in lines] == ["baseline fp32", "compact fp32"]
    assert lines[0].cells[1] is NONE
    assert lines[1].cells[1].figure.endswith(" ms")


def test_threads_and_batch_sizes_are_separate_settings(tmp_path: Path) -> None:
    view = measured(
        tmp_path,
        report_sample.measurement("baseline-fp32", "fp32", 0.001, 3_000_000, 0.91, seed=1),
        report_sample.measurement(
            "baseline-fp32", "fp32", 0.0006, 3_000_000, 0.91, seed=2, threads=2
        ),
        report_sample.measurement("baseline-fp32", "fp32", 0.008, 3_000_000, 0.91, seed=3, batch=8),
    )
    assert [device.setting for device in view.devices] == [
        "1 thread",
        "2 threads",
        "1 thread, batch 8",
    ]


def test_emulated_time_has_no_speed_up_but_a_warning(tmp_path: Path) -> None:
    emulated = report_sample.environment(emulator="qemu-aarch64 10.0")
    view = measured(
        tmp_path,
        report_sample.measurement(
            "baseline-fp32", "fp32", 0.3, 3_000_000, 0.91, seed=1, environment=emulated
        ),
        report_sample.measurement(
            "compact-fp32", "fp32", 0.1, 900_000, 0.91, seed=2, environment=emulated
        ),
    )
    assert "faster" not in view.headline
    assert not any("faster" in change.remark for change in view.changes)
    assert [line for line in view.warnings if "emulated time is not the device's latency" in line]
    assert all(
        "(emulated)" in line.name
        for device in view.devices
        for line in table(device)
        if line.name.startswith(("Latency", "Throughput", "Load"))
    )


def test_emulated_time_is_not_in_the_headline(tmp_path: Path) -> None:
    emulated = report_sample.environment(emulator="qemu-aarch64 10.0")
    view = measured(
        tmp_path,
        report_sample.measurement(
            "compact-fp32", "fp32", 0.1, 900_000, 0.91, seed=2, environment=emulated
        ),
    )
    assert (
        view.headline
        == "compact fp32: runs under qemu-aarch64 10.0, whose times are not a device's latency"
    )


def test_each_warning_is_shown_once_with_its_artifacts(tmp_path: Path) -> None:
    view = measured(
        tmp_path,
        report_sample.measurement(
            "baseline-fp32", "fp32", 0.001, 3_000_000, 0.91, seed=1, warnings=["hot", "loaded"]
        ),
        report_sample.measurement(
            "compact-fp32",
            "fp32",
            0.0004,
            900_000,
            0.91,
            seed=2,
            warnings=["loaded"],
            session="two",
        ),
    )
    assert view.warnings[:2] == ("baseline fp32: hot", "loaded")
    assert "not all artifacts were measured interleaved" in view.warnings[2]


def test_the_table_marks_the_best_and_leaves_out_unknown_figures(tmp_path: Path) -> None:
    view = overview(load_run(report_sample.write_run(tmp_path / "run")))
    lines = {line.name: line for line in table(view.devices[0])}
    assert [cell.best for cell in lines["Latency, p50"].cells] == [False, False, True]
    assert [cell.best for cell in lines["Top-1"].cells] == [True, False, False]
    assert lines["Speed-up"].cells[0] is NONE
    assert "Energy per inference" not in lines
    assert lines["Peak memory above the floor"].cells[0].figure == "10.6 MB"


def test_artifacts_without_measurements_have_a_table(tmp_path: Path) -> None:
    made = report_sample.report()
    for model in made["models"].values():
        for artifact in model["artifacts"]:
            artifact["measurement"] = None
    view = overview(load_run(report_sample.write_run(tmp_path / "run", **made)))
    assert view.headline == "0.80 M → 0.23 M parameters, 91.3 → 91.0 % top-1"
    assert [line.name for line in table(view.devices[0])] == [
        "Parameters",
        "Multiply-adds (MACs)",
        "Files",
        "Top-1",
    ]


def test_the_stream_is_shown_once_or_per_block_where_it_differs() -> None:
    branches = [KeptBranch.model_validate(entry) for entry in report_sample.kept()]
    kept = kept_blocks(branches)
    assert kept.embed is not None
    assert (kept.embed.kept, kept.embed.total) == (80, 128)
    assert kept.columns == ("head", "qk", "v", "ffn")
    assert [block.name for block in kept.blocks] == ["block 0", "block 1", "block 2", "block 3"]
    assert [(bar.kept, bar.total) for bar in kept.totals] == [
        (9, 16),
        (52, 128),
        (78, 128),
        (476, 2048),
    ]
    uneven = report_sample.kept()
    uneven[2]["dims"]["embed"] = [64, 128]
    other = kept_blocks([KeptBranch.model_validate(entry) for entry in uneven])
    assert other.embed is None
    assert other.columns[-1] == "embed"


def test_a_removed_branch_is_labelled_and_does_not_change_the_stream() -> None:
    entries = report_sample.kept()
    entries[0] = {
        "branch": "blocks.0.attn",
        "kind": "removed",
        "dims": {"embed": [0, 128], "head": [0, 4], "qk": [0, 32], "v": [0, 32]},
    }
    entries[3] = {"branch": "blocks.1.mlp", "kind": "constant", "dims": {}}
    kept = kept_blocks([KeptBranch.model_validate(entry) for entry in entries])
    assert kept.embed is not None
    assert [bar.word for bar in kept.blocks[0].bars] == ["removed", "removed", "removed", None]
    assert [bar.word for bar in kept.blocks[1].bars] == [None, None, None, "a constant"]
    assert kept.totals[0].total == 16
