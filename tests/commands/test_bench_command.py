"""`vitrim bench`, `report` and `compare` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_samples import chain, measurement
from vitrim.bench.local.cost_table import CostTable
from vitrim.bench.results.measurement import Environment, Measurement
from vitrim.cli import call


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    assert call([str(argument) for argument in arguments]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_batch_sweep_with_a_profile_is_saved_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chain(tmp_path / "m.onnx", width=64, batch="batch")
    out = tmp_path / "measured"
    command = [
        "bench",
        str(model),
        "--batch",
        "1,3",
        "--profile",
        "--pin",
        "0",
        "--spinning",
        "--time-limit",
        "0.5",
        "--out",
        str(out),
        "-q",
    ]
    assert call(command) == 0
    shown = capsys.readouterr().out
    assert "m, batch 1: time by operator" in shown
    assert "MatMul" in shown
    first, second = Measurement.load(out / "m-batch1.json"), Measurement.load(out / "m-batch3.json")
    assert (first.batch, second.batch) == (1, 3)
    assert first.pinning == (0,)
    assert first.spinning
    assert {row.operator for row in first.operators} >= {"MatMul", "Relu"}
    assert (out / "m-batch1-operators.svg").read_text().startswith("<svg")
    assert "exists already; --overwrite replaces it" in error_line(capsys, *command)
    # `report` ignores the pictures next to the measurements.
    assert call(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Time by operator" in page
    assert "batch 3" in page
    assert "Time by operator" in (tmp_path / "page" / "report.md").read_text()
    assert (
        json.loads((tmp_path / "page" / "report.json").read_text())["schema"] == "vitrim.report/1"
    )


def test_a_cost_table_is_measured_and_its_error_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.json"
    command = [
        "bench",
        "--cost-table",
        str(path),
        "--block",
        "tokens=8,embed=32,heads=2,head_width=8,ffn=32",
        "--time-limit",
        "4",
        "-q",
    ]
    assert call(command) == 0
    shown = capsys.readouterr().out
    assert "24 blocks measured with onnxruntime" in shown
    assert "error on the held-out blocks: median" in shown
    assert CostTable.load(path).median_error is not None
    assert "exists already" in error_line(capsys, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--on", "smoke://x"],
            "not a known kind of address; write host, ssh://user@host[:port], adb://SERIAL",
        ),
        (["--on", "ssh://pi:secret@board"], "a password does not belong in an address"),
        (["--on", "adb://"], "write adb://SERIAL"),
        (["--on", "tvm-rpc://t"], "write tvm-rpc://tracker:port/key"),
        (["--batch", "0"], "--batch '0': expected whole numbers above 0"),
        (["--pin", "3-1"], "--pin '3-1': '3-1' is no CPU or range of CPUs"),
        (["--provider", "cuda"], "has no CUDAExecutionProvider (it has"),
        (["--cost-table", "x.json"], "a cost table measures generated blocks"),
    ],
)
def test_an_invalid_option_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "bench", chain(tmp_path / "m.onnx"), "-q", *options)
    assert message in line
    assert "secret" not in line


def test_no_artifact_and_an_invalid_block_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name artifact folders or .onnx files" in error_line(capsys, "bench")
    assert "'width=3' is not valid" in error_line(
        capsys, "bench", "--cost-table", tmp_path / "c.json", "--block", "width=3"
    )


def test_devices_are_side_by_side_and_emulated_times_in_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Environment(cpu_model="Cortex-A72")
    emulated = Environment(cpu_model="Cortex-A72", emulator="qemu-aarch64 10 (cortex-a72)")
    scored = {
        "correct": 9,
        "total": 10,
        "top1": 0.9,
        "latency_s": tuple(0.001 + 1e-5 * i for i in range(40)),
        "samples_per_turn": (10,) * 4,
    }
    measurement(name="m-fp32", precision="fp32", **scored).save(tmp_path / "host" / "m-fp32.json")
    measurement(
        name="m-fp32", precision="fp32", device="ssh", environment=board, session="b", **scored
    ).save(tmp_path / "far" / "deep" / "m.json")
    measurement(
        name="m-fp32",
        precision="fp32",
        device="qemu-aarch64",
        environment=emulated,
        session="c",
        **scored,
    ).save(tmp_path / "q.json")
    measurement(
        name="m-tvm",
        precision="fp32",
        runtime="tvm",
        device="tvm-rpc rpi4",
        environment=Environment(),
        session="d",
        **scored,
    ).save(tmp_path / "far" / "t.json")
    (tmp_path / "far" / "costs.json").write_text('{"schema": "vitrim.cost-table/1"}')
    assert (
        call(
            [
                "report",
                *(str(tmp_path / name) for name in ("host", "far", "q.json")),
                "--out",
                str(tmp_path / "page"),
            ]
        )
        == 0
    )
    page, text = (
        (tmp_path / "page" / "report.html").read_text(),
        (tmp_path / "page" / "report.md").read_text(),
    )
    for title in (
        "a CPU",
        "Cortex-A72, over ssh",
        "tvm-rpc rpi4",
        "Cortex-A72, emulated by qemu-aarch64 10 (cortex-a72)",
    ):
        assert title in page
        assert title in text
    pictures = [part for part in page.split("<svg")[1:] if "emulated" in part.split("</svg>")[0]]
    assert pictures == []
    assert "emulated" in text.split("## Devices side by side")[1].split("##")[0]


def test_a_folder_without_measurements_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "contains no measurements" in error_line(capsys, "report", tmp_path)
    assert "no such file or folder" in error_line(capsys, "report", tmp_path / "nowhere")


def test_compare_fails_only_beyond_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def saved(name: str, factor: float) -> Path:
        latency_s = tuple(factor * (0.001 + 1e-6 * (i % 7)) for i in range(200))
        path = tmp_path / f"{name}.json"
        measurement(name=name, latency_s=latency_s, samples_per_turn=(10,) * 20).save(path)
        return path

    before, same, slower = saved("before", 1.0), saved("same", 1.0), saved("slower", 1.08)
    assert call(["compare", str(before), str(same), "--fail-if-slower", "5%"]) == 0
    assert "same shows no difference to before" in capsys.readouterr().out
    assert call(["compare", str(before), str(slower)]) == 0
    assert call(["compare", str(before), str(slower), "--fail-if-slower", "10%"]) == 0
    capsys.readouterr()
    assert call(["compare", str(before), str(slower), "--fail-if-slower", "5%"]) == 1
    assert "slower is slower than before: time ratio 1.080" in capsys.readouterr().out
    assert call(["compare", str(slower), str(before), "--fail-if-slower", "5%"]) == 0
    assert "not a share; write 5% or 0.05" in error_line(
        capsys, "compare", before, same, "--fail-if-slower", "much"
    )


def test_help_lists_the_addresses_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "ssh://pi@raspberry",
        "adb://",
        "tvm-rpc://",
        "qemu-aarch64",
        "--cost-table",
        "--profile",
        "--pin",
    ):
        assert word in shown
