"""Measurements of models of microseconds: what is recorded and warned of, how runners fail."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from bench_samples import chain, images_with_labels, measurement
from vitrim.bench.local import conductor
from vitrim.bench.local.artifact_facts import artifact_facts
from vitrim.bench.local.measure import measure, measure_interleaved, profile_operators
from vitrim.bench.results.measurement import Environment, Measurement
from vitrim.bench.results.warnings import warnings_for
from vitrim.core.errors import InputError
from vitrim.core.storage import sha256_file

QUICK: dict[str, Any] = {"time_limit_s": 1.0, "least_rounds": 4, "quiet": True}


def test_two_models_are_measured_in_one_session(tmp_path: Path) -> None:
    small, large = (
        chain(tmp_path / "small.onnx", width=64),
        chain(tmp_path / "large.onnx", width=1500),
    )
    data = images_with_labels(tmp_path / "d.npz", small)
    reports: list[tuple[float, str]] = []
    found = measure_interleaved(
        {"small": small, "large": large},
        dataset=data,
        progress=lambda share, text: reports.append((share, text)),
        **QUICK,
    )
    one, two = found["small"], found["large"]
    assert one.session == two.session
    assert len(one.samples_per_turn) == len(two.samples_per_turn) >= 4
    assert two.summary().p50_s > 2 * one.summary().p50_s
    assert (one.correct, one.total, one.top1) == (15, 20, 0.75)
    assert two.total == 20
    assert one.artifact_sha256 == sha256_file(small)
    assert two.file_bytes == large.stat().st_size
    assert two.beyond_floor_rss_bytes is not None
    assert one.beyond_floor_rss_bytes is not None
    assert two.beyond_floor_rss_bytes > one.beyond_floor_rss_bytes + large.stat().st_size / 2
    assert one.environment.cpu_model
    assert one.environment.libraries["onnxruntime"] == one.runtime_version
    assert reports
    assert all(0 <= share <= 1 for share, _ in reports)
    one.save(tmp_path / "one.json")
    assert Measurement.load(tmp_path / "one.json") == one
    # The file contains no path and no host name.
    text = (tmp_path / "one.json").read_text()
    assert str(tmp_path) not in text
    assert f'"{os.uname().nodename}"' not in text


def test_settings_are_applied_and_recorded(tmp_path: Path) -> None:
    found = measure(
        chain(tmp_path / "m.onnx", batch="n"),
        threads=2,
        batch=3,
        pinning=[0],
        spinning=True,
        arena=False,
        **QUICK,
    )
    assert (found.threads, found.batch, found.pinning, found.spinning, found.arena) == (
        2,
        3,
        (0,),
        True,
        False,
    )
    assert found.input_shape == (3, 1, 28, 28)
    assert found.name == "m"


def test_runners_get_a_high_priority_where_that_is_permitted(tmp_path: Path) -> None:
    current = os.getpriority(os.PRIO_PROCESS, 0)
    model = chain(tmp_path / "m.onnx")
    assert measure(model, priority="normal", **QUICK).niceness == current
    high = measure(model, **QUICK).niceness
    assert high == (-20 if os.geteuid() == 0 else current)


def test_another_provider_than_the_requested_one_is_warned_of(tmp_path: Path) -> None:
    found = measure(chain(tmp_path / "m.onnx"), providers=["AzureExecutionProvider"], **QUICK)
    assert (
        "AzureExecutionProvider was requested, but CPUExecutionProvider ran the model"
        in found.warnings[0]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.onnx", "absent.onnx: no such file"),
        ("model.pt", "not an .onnx file"),
        (".", r"no artifact \(there is no manifest.json\)"),
        ("broken.onnx", "broken.onnx: onnxruntime .* cannot load it"),
    ],
)
def test_an_invalid_artifact_is_refused_in_one_line(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "broken.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match=message) as caught:
        measure(tmp_path / name, **QUICK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads = 0: must be at least 1"),
        ({"time_limit_s": 0}, "must be above 0"),
        ({"dataset": "absent.npz"}, "absent.npz: no such data set"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_interleaved({"m": chain(tmp_path / "m.onnx")}, **{**QUICK, **options})
    with pytest.raises(InputError, match="nothing to measure"):
        measure_interleaved({})


def test_a_killed_runner_is_reported_in_one_line(tmp_path: Path) -> None:
    model = chain(tmp_path / "m.onnx")
    runner = conductor.RunnerProcess("victim", {"model": str(model)}, 60)
    threading.Timer(0.3, lambda: os.kill(runner.process.pid, signal.SIGKILL)).start()
    with pytest.raises(
        conductor.ConductorError,
        match=r"victim: its process was ended by signal 9 \(a kill, most often because memory",
    ):
        _request_runs(runner)


def _request_runs(runner: conductor.RunnerProcess) -> None:
    for _ in range(1000):
        runner.request("run", count=1000)


def test_a_hanging_runner_is_stopped(tmp_path: Path) -> None:
    runner = conductor.RunnerProcess("sleeper", {"model": str(chain(tmp_path / "m.onnx"))}, 60)
    runner.reply_limit_s = 0.3
    os.kill(runner.process.pid, signal.SIGSTOP)
    start = time.perf_counter()
    with pytest.raises(
        conductor.ConductorError, match=r"sleeper: no event from its process for 0 s"
    ):
        runner.request("memory")
    assert time.perf_counter() - start < 10
    assert runner.process.poll() is not None


def test_rounds_run_in_a_seeded_random_order(tmp_path: Path) -> None:
    first, second = random.Random(0), random.Random(0)
    orders = []
    for source in (first, second):
        names = ["a", "b", "c"]
        orders.append([source.sample(names, 3) for _ in range(10)])
    assert orders[0] == orders[1]


def test_rounds_go_on_until_the_ratio_is_known() -> None:
    steady = [1.0 + 0.001 * (i % 3) for i in range(20)]
    wild = [1.0 + 0.5 * (i % 3) for i in range(20)]
    assert conductor.widest({"a": steady, "b": steady}) < 0.01
    assert conductor.widest({"a": steady, "b": wild}) > 0.1
    # Noise that both models share cancels in their ratio.
    assert conductor.widest({"a": wild, "b": [2 * value for value in wild]}) == 0
    assert conductor.widest({"a": [1.0, 1.0]}) == float("inf")


@pytest.mark.parametrize(
    ("p50_s", "count"), [(1e-5, 64), (0.01, 10), (0.05, 5), (0.15, 5), (0.5, 1), (15.0, 1)]
)
def test_a_turn_holds_enough_calls(p50_s: float, count: int) -> None:
    assert conductor.samples_in_a_turn(p50_s, 0.1) == count


def test_external_weights_are_part_of_the_size_and_the_digest(tmp_path: Path) -> None:
    inside = artifact_facts(chain(tmp_path / "m.onnx"))
    graph = onnx.load(str(inside.model))
    outside = tmp_path / "outside.onnx"
    onnx.save(graph, str(outside), save_as_external_data=True, location="outside.onnx.data")
    facts = artifact_facts(outside)
    assert [file.name for file in facts.files] == ["outside.onnx", "outside.onnx.data"]
    assert facts.file_bytes > 0.9 * inside.file_bytes
    weights = bytearray((tmp_path / "outside.onnx.data").read_bytes())
    weights[0] ^= 1
    (tmp_path / "outside.onnx.data").write_bytes(weights)
    assert artifact_facts(outside).sha256 != facts.sha256


def all_warnings(**changes: object) -> str:
    fields = {"latency_s": (0.01,) * 100, "samples_per_turn": (5,) * 20, **changes}
    return " | ".join(warnings_for(measurement(**fields)))


def test_a_quiet_machine_gives_no_warning() -> None:
    assert (
        all_warnings(
            environment=Environment(
                busy_cores_before=0.1, governor="performance", throttled="no", cores=4
            )
        )
        == ""
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"busy_cores_after": 1.5, "cores": 2}, "busy with other work (1.5 of 2 cores)"),
        ({"governor": "powersave"}, "the frequency governor is 'powersave'"),
        ({"virtual_machine": "QEMU"}, "a virtual machine (QEMU)"),
        ({"emulator": "qemu-user"}, "emulated by qemu-user"),
        ({"throttled": "under-voltage"}, "throttled (under-voltage)"),
        ({"temperature_after_c": 86.0}, "reached 86 °C"),
    ],
)
def test_each_problem_of_the_machine_is_warned_of(where: dict[str, object], message: str) -> None:
    assert message in all_warnings(environment=Environment.model_validate(where))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_s": (0.01,) * 10, "samples_per_turn": (5, 5)}, "only 10 samples in 2 rounds"),
        ({"latency_s": (0.01, 0.02) * 50}, "the samples spread over"),
        ({"warm_up_stable": False}, "warm-up did not become stable"),
        ({"cpu_share": 0.5}, "had the processor for only 50 % of the time"),
        ({"peak_rss_exact": False}, "read it as an upper bound"),
        (
            {
                "provider_nodes": {"CUDAExecutionProvider": 90, "CPUExecutionProvider": 10},
                "provider": "CUDAExecutionProvider",
            },
            "10 of 100 nodes ran outside",
        ),
    ],
)
def test_each_problem_of_the_samples_is_warned_of(changes: dict[str, object], message: str) -> None:
    assert message in all_warnings(**changes)


def test_operator_rows_add_up_to_the_whole(tmp_path: Path) -> None:
    table = profile_operators(chain(tmp_path / "m.onnx", width=400, layers=3), runs=5)
    assert sum(table.share(row.seconds) for row in table.rows) == pytest.approx(1)
    assert [row.seconds for row in table.rows] == sorted(
        (row.seconds for row in table.rows), reverse=True
    )
    kinds = table.by_operator()
    assert kinds["MatMul"][0] == 4
    assert sum(seconds for _, seconds, _ in kinds.values()) == pytest.approx(table.seconds)
    assert {
        shape for row in table.rows if row.operator == "MatMul" for shape in row.output_shapes
    } == {(1, 400), (1, 10)}


def test_a_profile_of_no_run_or_of_a_broken_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs = 0: must be at least 1"):
        profile_operators(chain(tmp_path / "m.onnx"), runs=0)
    (tmp_path / "broken.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot load it"):
        profile_operators(tmp_path / "broken.onnx")
