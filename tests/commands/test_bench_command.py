"""`vitrim bench`, `report` and `compare` on the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vitrim
from bench_samples import chain, measurement
from latency_tables import latency_table
from tiny_models import tiny_vit
from vitrim.bench.results.measurement import Environment, Measurement
from vitrim.cli import call
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.network.modules.model import CompactModel
from vitrim.pipeline.cost_points import points_file
from vitrim.targets.cost_parts import NetworkShape
from vitrim.targets.cost_table import CostTable


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = latency_table(tile=1)

    def export(model: CompactModel, folder: Path, **options: Any) -> None:
        folder.write_text(network_shape(model.architecture).model_dump_json())

    def measure_at(address: str, files: dict[str, Path], *rest: Any, **options: Any) -> Any:
        found = {}
        for name, file in files.items():
            shape = NetworkShape.model_validate_json(file.read_text())
            summary = SimpleNamespace(p50_s=truth.latency_ms(shape) / 1e3)
            found[name] = SimpleNamespace(
                summary=partial(lambda value: value, summary),
                runtime_version="1.0",
                environment=Environment(),
                energy_per_inference_j=None,
            )
        return found

    monkeypatch.setattr("vitrim.pipeline.cost_measuring.export", export)
    monkeypatch.setattr("vitrim.bench.remote.measure.measure_at", measure_at)
    path = tmp_path / "costs.json"
    sizes = ["--block", "tokens=9,embed=32,heads=2,head_width=8,ffn=32,depth=2,patch=4,classes=3"]
    command = ["bench", "--cost-table", str(path), "--checks", "3", "-q"]
    assert call([*command, *sizes, "--runtime", "tvm", "--precision", "int8"]) == 0
    shown = capsys.readouterr().out
    assert "networks in the fit (tvm int8 on host, 1 thread); tiles of 1 columns" in shown
    assert "networks held out of the fit: median 0.0 %, 95th percentile" in shown
    assert "3 compact networks: median" in shown
    assert "before the correction" in shown
    assert "the goal is reached: a median under 2 % and a 95th percentile under 6 % on" in shown
    few = [*command, *sizes, "--overwrite", "--points", "18"]
    assert call([*few[:2], str(tmp_path / "few.json"), *few[3:]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the goal is NOT reached with --points 18: a median under 2 %" in shown
    assert "few.json.points, and the same command with --points 36 --overwrite continues" in shown
    assert points_file(tmp_path / "few.json").exists()
    table = CostTable.load(path)
    assert (table.runtime, table.precision, table.runtime_version) == ("tvm", "int8", "1.0")
    assert "exists already" in error_line(capsys, *command)
    vitrim.save(tiny_vit(), tmp_path / "model")
    like = ["--like", str(tmp_path / "model")]
    assert call([*command, *like, "--overwrite"]) == 0
    assert CostTable.load(path).points[0].network.embed == 24
    both = error_line(capsys, *command, *like, *sizes, "--overwrite")
    assert "--like and --block both give the sizes" in both
    absent = error_line(capsys, *command, "--like", str(tmp_path / "no"), "--overwrite")
    assert "no: no such folder; name a model that vitrim saved" in absent


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
        (["--cost-table", "x.json"], "a cost table measures generated networks"),
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
