"""Images and logits bound on a device: equal outputs, copies timed as stated; the arena's size.

Tests that need a GPU are skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bench_samples import chain
from tiny_models import tiny_vit
from vitrim.bench.local.measure import make_plan, measure
from vitrim.compress.lift import lift
from vitrim.compress.network.named_outputs import output_specs
from vitrim.core.errors import InputError
from vitrim.export.forms import FORMS, write_network
from vitrim.runtimes import EngineError, open_engine
from vitrim.runtimes.onnxruntime_engine import arena_bytes, memory_for_second_process

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not HAS_CUDA,
    reason="this onnxruntime has no CUDAExecutionProvider; "
    "install onnxruntime-gpu on a machine with an NVIDIA GPU",
)


def job(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(chain(tmp_path / "m.onnx")), "threads": 1, **more}


@pytest.mark.parametrize("copies", [True, False])
def test_bound_outputs_equal_unbound_ones(tmp_path: Path, copies: bool) -> None:
    # Binding to the CPU's own memory needs no GPU.
    plain, bound = (
        open_engine(job(tmp_path)),
        open_engine(job(tmp_path, device="cpu", copies=copies)),
    )
    plain.load()
    bound.load()
    assert (plain.copies_timed, bound.copies_timed) == (None, copies)
    rng = np.random.default_rng(0)
    for _ in range(3):
        images = rng.standard_normal(plain.input_shape, dtype=np.float32)
        assert np.array_equal(bound.infer(images), plain.infer(images))


def test_without_copies_the_timed_call_leaves_the_output_on_the_device(tmp_path: Path) -> None:
    engine = open_engine(job(tmp_path, device="cpu", copies=False))
    engine.load()
    images = np.random.default_rng(1).standard_normal(engine.input_shape, dtype=np.float32)
    call = engine.timed_call(images)
    assert call() is None
    on_device = engine.device_outputs[0].numpy()  # type: ignore[attr-defined]
    assert np.array_equal(on_device, engine.infer(images))


def test_several_outputs_are_bound_by_name(tmp_path: Path) -> None:
    model = lift(tiny_vit())
    outputs = output_specs(model.architecture, ("logits", "patches"))
    path = tmp_path / "m.onnx"
    path.write_bytes(write_network(model, FORMS[0], outputs=outputs).SerializeToString())
    entries = [{"name": output.name, "shape": [1, *output.shape]} for output in outputs]
    both = {"model": str(path), "threads": 1, "outputs": entries}
    plain, bound = open_engine(both), open_engine({**both, "device": "cpu"})
    plain.load()
    bound.load()
    images = np.random.default_rng(0).standard_normal(plain.input_shape, dtype=np.float32)
    expected, found = plain.infer_outputs(images), bound.infer_outputs(images)
    assert list(found) == list(expected) == ["logits", "patches"]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_with_copies_the_timed_call_returns_the_output(tmp_path: Path) -> None:
    engine = open_engine(job(tmp_path, device="cpu"))
    engine.load()
    images = np.random.default_rng(1).standard_normal(engine.input_shape, dtype=np.float32)
    assert np.array_equal(engine.timed_call(images)(), engine.infer(images))


def test_options_of_the_gpu_are_part_of_the_job(tmp_path: Path) -> None:
    plan, _ = make_plan({"m": chain(tmp_path / "m.onnx")}, copies=False, cuda_graph=True)
    assert (plan["jobs"]["m"]["copies"], plan["jobs"]["m"]["cuda_graph"]) == (False, True)


@pytest.mark.skipif(HAS_CUDA, reason="a GPU is here")
def test_without_a_gpu_the_error_names_what_to_install(tmp_path: Path) -> None:
    engine = open_engine(job(tmp_path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]))
    with pytest.raises(
        EngineError,
        match=r"has no CUDAExecutionProvider \(it has .*\); "
        r"install the onnxruntime build for that device",
    ) as caught:
        engine.load()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(HAS_CUDA, reason="a GPU is here")
def test_a_missing_gpu_is_explained_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vitrim.bench.local.options import why_no_gpu

    reason = why_no_gpu()
    assert reason is not None
    assert reason.startswith("no GPU is measured here: ")
    assert "\n" not in reason


@gpu
@needs_gpu
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_gpu_returns_the_outputs_of_the_cpu(
    tmp_path: Path, copies: bool, cuda_graph: bool
) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    plain = open_engine(job(tmp_path))
    on_gpu = open_engine(job(tmp_path, providers=providers, copies=copies, cuda_graph=cuda_graph))
    plain.load()
    on_gpu.load()
    assert on_gpu.provider == "CUDAExecutionProvider"
    images = np.random.default_rng(0).standard_normal(plain.input_shape, dtype=np.float32)
    on_gpu.timed_call(images)()
    assert np.allclose(on_gpu.infer(images), plain.infer(images), rtol=1e-3, atol=1e-3)
    assert on_gpu.device_memory_peak_bytes() > 0  # type: ignore[operator]


@gpu
@needs_gpu
def test_a_gpu_is_measured_with_its_memory(tmp_path: Path) -> None:
    found = measure(
        chain(tmp_path / "m.onnx"), providers=("CUDAExecutionProvider",), time_limit_s=3, quiet=True
    )
    assert found.provider == "CUDAExecutionProvider"
    assert found.copies_timed is True
    assert found.device_memory_peak_bytes is not None


# ---- the arena -----------------------------------------------------------------------------------


def test_the_arena_reports_its_bytes(tmp_path: Path) -> None:
    engine = open_engine(job(tmp_path))
    engine.load()
    weights = Path(job(tmp_path)["model"]).stat().st_size
    arena = engine.arena_bytes()
    assert arena is not None
    # The arena holds the weights, and is not more than a few of its own extensions beyond them.
    assert 0.5 * weights < arena < weights + 64 * 2**20


def test_without_an_arena_there_is_no_size(tmp_path: Path) -> None:
    engine = open_engine(job(tmp_path, arena=False))
    engine.load()
    assert engine.arena_bytes() is None


@pytest.mark.parametrize(
    ("log", "arena"),
    [
        ("", None),
        (
            "Creating BFCArena for Cpu with\nReserving memory in BFCArena for Cpu size: 16\n"
            "Reserving memory in BFCArena for Cpu size: 24",
            40,
        ),
        (
            "Extending BFCArena for Cpu. bin_num:1\nTotal allocated bytes: 1048592\n"
            "Reserving memory in BFCArena for Cpu size: 8",
            1048600,
        ),
        ("Extending BFCArena for Cuda. bin_num:1\nTotal allocated bytes: 999", None),
    ],
)
def test_the_arenas_log_is_parsed(log: str, arena: int | None) -> None:
    assert arena_bytes(log) == arena


@pytest.mark.parametrize(("free_kb", "enough"), [(500_000, True), (150_000, False)])
def test_no_second_process_is_started_where_memory_is_short(
    tmp_path: Path, free_kb: int, enough: bool
) -> None:
    (tmp_path / "status").write_text("Name:\tpython3\nVmRSS:\t  100000 kB\n")
    (tmp_path / "meminfo").write_text(f"MemTotal:  427072 kB\nMemAvailable:  {free_kb} kB\n")
    assert memory_for_second_process(str(tmp_path / "status"), str(tmp_path / "meminfo")) is enough
    assert memory_for_second_process(str(tmp_path / "absent"), str(tmp_path / "meminfo")) is True


def test_a_measurement_contains_the_arenas_bytes(tmp_path: Path) -> None:
    found = measure(
        chain(tmp_path / "m.onnx"), time_limit_s=2, least_rounds=2, most_rounds=2, quiet=True
    )
    assert found.arena_bytes is not None
    assert found.copies_timed is None
    assert found.device_memory_peak_bytes is None


def test_a_missing_provider_is_reported_in_one_line(tmp_path: Path) -> None:
    if HAS_CUDA:
        pytest.skip("a GPU is here")
    with pytest.raises(InputError, match="CUDAExecutionProvider"):
        measure(
            chain(tmp_path / "m.onnx"),
            providers=("CUDAExecutionProvider",),
            time_limit_s=2,
            quiet=True,
        )
