"""The runner as on a device: a copied file, a job, JSON lines."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vitrim.bench
from bench_samples import chain, images_with_labels
from onnx_graphs import channels_last, classifier, written
from vitrim.runtimes import engine_names, requirement

FOLDER = Path(vitrim.bench.__path__[0]) / "local"
RUNTIMES = FOLDER.parents[1] / "runtimes"


def run(
    folder: Path, job: dict[str, Any], prefix: list[str] | None = None
) -> tuple[int, list[dict[str, Any]], str]:
    runner = shutil.copy(FOLDER / "runner.py", folder)
    shutil.copytree(RUNTIMES, folder / "runtimes", dirs_exist_ok=True)
    done = subprocess.run(
        [*(prefix or []), sys.executable, "-I", runner, json.dumps(job)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "runner.py",
        "conductor.py",
        "environment.py",
        "energy.py",
        *(f"../../runtimes/{file.name}" for file in RUNTIMES.glob("*.py")),
    ],
)
def test_files_for_devices_are_python_3_9_without_vitrim(name: str) -> None:
    tree = ast.parse((FOLDER / name).read_text(), feature_version=(3, 9))
    # The engines import their own base class relatively, and nothing outside of their folder.
    assert all(node.level <= 1 for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    imports = {
        node.module or "."
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
    }
    imports |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    external = {module.split(".")[0] for module in imports} - set(sys.stdlib_module_names)
    # A runtime's files are named after it. ExecuTorch's Python interface uses torch's tensors;
    # TVM's machine is not needed by compiled programs.
    own = Path(name).stem.split("_")[0] if "/" in name else ""
    allowed = {requirement(own).module} if own in engine_names() else set()
    assert external <= {"numpy"} | allowed | {"executorch": {"torch"}, "tvm": {"tvm_ffi"}}.get(
        own, set()
    )


def test_a_copied_runner_measures_without_vitrim(tmp_path: Path) -> None:
    commands = [{"do": "warm"}, {"do": "run", "count": 7}, {"do": "memory"}]
    code, events, noise = run(
        tmp_path, {"model": str(chain(tmp_path / "m.onnx")), "commands": commands}
    )
    assert code == 0, noise
    ready, warm, samples, memory = events
    assert [event["event"] for event in events] == ["ready", "warm", "samples", "memory"]
    assert ready["provider"] == "CPUExecutionProvider"
    assert ready["input_shape"] == [1, 1, 28, 28]
    assert warm["count"] >= 10
    assert len(samples["latency_s"]) == 7
    assert min(samples["latency_s"]) > 0
    assert 0 < ready["floor_rss_bytes"] < memory["peak_rss_bytes"]


@pytest.mark.parametrize(("batch", "model_batch"), [(1, 1), (None, 8), (8, "n")])
def test_top1_counts_every_image_exactly_once(
    tmp_path: Path, batch: int | None, model_batch: int | str
) -> None:
    chain(tmp_path / "one.onnx")
    data = images_with_labels(tmp_path / "d.npz", tmp_path / "one.onnx", count=20, wrong=5)
    job = {
        "model": str(chain(tmp_path / "m.onnx", batch=model_batch)),
        "batch": batch,
        "commands": [{"do": "score", "dataset": str(data)}],
    }
    _, events, _ = run(tmp_path, job)
    assert events[-1] == {"event": "score", "correct": 15, "total": 20}


def test_uint8_images_are_normalised_by_the_manifests_mean_and_std(tmp_path: Path) -> None:
    model = chain(tmp_path / "m.onnx")
    pixels = np.random.default_rng(3).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    prepared = ((pixels.astype(np.float32) / 255 - 0.3) / 0.5)[:, None]
    np.savez(tmp_path / "floats.npz", images=prepared, labels=np.zeros(12, dtype=np.int64))
    np.savez(tmp_path / "bytes.npz", images=pixels, labels=np.zeros(12, dtype=np.int64))
    job = {"model": str(model), "preprocessing": {"mean": [0.3], "std": [0.5]}}
    commands = [
        {"do": "score", "dataset": str(tmp_path / name)} for name in ("floats.npz", "bytes.npz")
    ]
    _, events, _ = run(tmp_path, {**job, "commands": commands})
    assert events[-1] == events[-2]
    code, events, _ = run(tmp_path, {"model": str(model), "commands": commands[1:]})
    assert code == 3
    assert "the data set holds bytes, and no mean and std are known" in events[-1]["message"]


@pytest.mark.parametrize("layout", [None, "NHWC"])
def test_images_are_arranged_for_a_model_with_channels_last(
    tmp_path: Path, layout: str | None
) -> None:
    first = written(classifier(), tmp_path, "first.onnx")
    last = written(channels_last(classifier()), tmp_path, "last.onnx")
    pixels = np.random.default_rng(3).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    labels = np.random.default_rng(4).integers(0, 4, 24)
    mean, std = (
        np.array(given, np.float32).reshape(1, 3, 1, 1) for given in ([0.2, 0.4, 0.6], [0.1] * 3)
    )
    prepared = (pixels.astype(np.float32) / 255 - mean) / std
    sets: dict[str, np.ndarray] = {
        "bytes": pixels,
        "floats": prepared,
        "own": prepared.transpose(0, 2, 3, 1),
    }
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    commands = [{"do": "score", "dataset": str(tmp_path / f"{name}.npz")} for name in sets]
    job = {"preprocessing": {"mean": mean.ravel().tolist(), "std": std.ravel().tolist()}}
    _, expected, _ = run(tmp_path, {**job, "model": str(first), "commands": commands[:1]})
    entry = {"name": "x", "layout": layout}
    _, events, _ = run(tmp_path, {**job, "model": str(last), "input": entry, "commands": commands})
    assert 0 < events[-1]["correct"] < 24
    assert events[-3:] == [expected[-1]] * 3


@pytest.mark.parametrize("kind", ["int64", "int16", "bool"])
def test_other_whole_numbers_are_no_images(kind: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (4, 1, 28, 28)).astype(kind)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.zeros(4, dtype=np.int64))
    job = {"model": str(chain(tmp_path / "m.onnx")), "preprocessing": {"mean": [0.3], "std": [0.5]}}
    commands = [{"do": "score", "dataset": str(tmp_path / "set.npz")}]
    code, events, _ = run(tmp_path, {**job, "commands": commands})
    assert code == 3
    assert f"images are {kind}; give pixels as uint8, or float32" in events[-1]["message"]


def test_a_folder_of_npy_files_is_a_data_set(tmp_path: Path) -> None:
    model = chain(tmp_path / "m.onnx")
    with np.load(images_with_labels(tmp_path / "d.npz", model)) as data:
        np.save(tmp_path / "images.npy", data["images"])
        np.save(tmp_path / "labels.npy", data["labels"])
    _, events, _ = run(
        tmp_path,
        {"model": str(model), "commands": [{"do": "score", "dataset": str(tmp_path), "limit": 10}]},
    )
    assert events[-1] == {"event": "score", "correct": 5, "total": 10}


def test_the_provider_that_ran_the_model_is_reported(tmp_path: Path) -> None:
    # Azure's provider is in every wheel and supports none of these operators: the CPU runs them.
    job = {
        "model": str(chain(tmp_path / "m.onnx")),
        "providers": ["AzureExecutionProvider", "CPUExecutionProvider"],
        "commands": [],
    }
    _, events, _ = run(tmp_path, job)
    assert events[0]["provider"] == "CPUExecutionProvider"
    assert set(events[0]["provider_nodes"]) == {"CPUExecutionProvider"}


def test_the_profile_has_a_row_for_every_operator(tmp_path: Path) -> None:
    _, events, _ = run(
        tmp_path,
        {
            "model": str(chain(tmp_path / "m.onnx", layers=3)),
            "commands": [{"do": "profile", "count": 4}],
        },
    )
    rows = events[-1]["rows"]
    assert [row["operator"] for row in rows].count("MatMul") == 4
    assert all(
        row["calls"] == 4 and row["seconds"] >= 0 and row["provider"] == "CPUExecutionProvider"
        for row in rows
    )
    assert not list(tmp_path.glob("*trace*"))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"model": "absent.onnx"}, "absent.onnx: no such file"),
        ({"model": "broken.onnx"}, "broken.onnx: onnxruntime .* cannot load it"),
        (
            {"model": "m.onnx", "providers": ["CUDAExecutionProvider"]},
            "has no CUDAExecutionProvider",
        ),
        (
            {"model": "m.onnx", "batch": 4},
            "input 'image' has the fixed batch 1, and batch 4 was requested",
        ),
        (
            {"model": "m.onnx", "output": "scores"},
            "the model has no output 'scores'; it has logits",
        ),
        ({"model": "m.onnx", "pinning": [4000]}, r"cannot pin to the CPUs \[4000\]"),
        ({"model": "m.onnx", "commands": [{"do": "dance"}]}, "unknown command 'dance'"),
        (
            {"model": "m.onnx", "commands": [{"do": "score", "dataset": "m.onnx"}]},
            "m.onnx: not a data set",
        ),
        (
            {"model": "m.onnx", "commands": [{"do": "score", "dataset": "small.npz"}]},
            r"images are \[1, 8, 8\], the model takes \[1, 28, 28\]",
        ),
        (
            {"model": "m.onnx", "commands": [{"do": "score", "dataset": "labels.npz"}]},
            "has labels outside of the model's 10 classes",
        ),
        ({"no": "model"}, "the job is no JSON object with a model"),
    ],
)
def test_an_invalid_job_is_reported_in_one_line(
    tmp_path: Path, job: dict[str, Any], message: str
) -> None:
    chain(tmp_path / "m.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    np.savez(
        tmp_path / "small.npz",
        images=np.zeros((2, 1, 8, 8), dtype=np.float32),
        labels=np.zeros(2, dtype=np.int64),
    )
    np.savez(
        tmp_path / "labels.npz",
        images=np.zeros((2, 1, 28, 28), dtype=np.float32),
        labels=np.array([0, 10]),
    )
    located = {
        **job,
        "commands": [
            {**c, **({"dataset": str(tmp_path / c["dataset"])} if "dataset" in c else {})}
            for c in job.get("commands", [])
        ],
    }
    if "model" in job:
        located["model"] = str(tmp_path / job["model"])
    code, events, _ = run(tmp_path, located)
    assert code == 3
    assert events[-1]["event"] == "error"
    import re

    assert re.search(message, events[-1]["message"]), events[-1]["message"]
    assert "\n" not in events[-1]["message"]


@pytest.mark.skipif(not Path("/usr/bin/time").exists(), reason="GNU time is not installed")
def test_peak_memory_agrees_with_gnu_time(tmp_path: Path) -> None:
    model = chain(tmp_path / "m.onnx", width=3000, layers=3)
    job = {"model": str(model), "commands": [{"do": "run", "count": 3}, {"do": "memory"}]}
    _, events, noise = run(tmp_path, job, prefix=["/usr/bin/time", "-v"])
    gnu_time_bytes = next(
        int(line.split(":")[1]) * 1024
        for line in noise.splitlines()
        if "Maximum resident set size" in line
    )
    assert events[-1]["peak_rss_bytes"] == pytest.approx(gnu_time_bytes, rel=0.02)
    assert events[-1]["peak_rss_bytes"] - events[0]["floor_rss_bytes"] > model.stat().st_size
