"""Eight bits on x86 without VNNI, whose products saturate: the target decides the weights' width.

The processor is emulated, or this one is taken for a smaller one.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from numpy.typing import NDArray
from processors import HOST_BITS, emulated_x86, taken_for
from tiny_models import tiny_vit
from vitrim.core.errors import InputError
from vitrim.export import export
from vitrim.export.artifact import Artifact
from vitrim.export.graphs.imported_graph import export_graph
from vitrim.export.parity import relative_error
from vitrim.runtimes import EngineError
from vitrim.runtimes.subprocess_inference import infer_in_subprocess
from vitrim.targets.instruction_sets import CPU_FEATURES, EXACT_PRODUCTS

IMAGES = np.random.default_rng(5).standard_normal((12, 3, 16, 16), dtype=np.float32)
SATURATING, EXACT = "x86-64-v3", "x86-64-v4-vnni"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A model with weights at both ends of their range, which saturate in pairs."""
    torch.manual_seed(3)
    made = tiny_vit()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def error_of(model: torch.nn.Module, logits: NDArray[np.float32]) -> float:
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    return float(relative_error(expected, logits).max())


def outputs(artifact: Artifact, command: list[str] | None = None) -> NDArray[np.float32]:
    """The logits of an artifact, without the check of its instruction sets."""
    manifest = artifact.manifest
    job = {
        "runtime": manifest.runtime,
        "model": str(artifact.model_path),
        "input": {"name": "images", "shape": [1, 3, 16, 16], "type": "float32"},
        "session": dict(manifest.session),
        "output": "logits",
    }
    found: NDArray[np.float32] = infer_in_subprocess(job, IMAGES, command=command)[0]
    return found


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_artifacts_for_avx2_are_right_on_a_core_with_avx2_alone(
    model: torch.nn.Module, tmp_path: Path, precision: str, runtime: str
) -> None:
    if runtime == "openvino":
        pytest.importorskip("nncf", reason="pip install 'vitrim[openvino]'")
    haswell = emulated_x86("Haswell", sys.executable)
    made = export(
        model,
        tmp_path / "v3",
        target=SATURATING,
        runtime=runtime,
        precision=precision,  # type: ignore[arg-type]
        images=IMAGES,
    )
    assert made.manifest.cpu is not None
    assert made.manifest.cpu.assumes == ()
    assert error_of(model, outputs(made, haswell)) < 0.1


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_whole_eight_bit_weights_assume_exact_products(
    model: torch.nn.Module, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    haswell = emulated_x86("Haswell", sys.executable)
    made = export(
        model,
        tmp_path / "vnni",
        target=EXACT,
        precision=precision,  # type: ignore[arg-type]
        images=IMAGES,
    )
    assert made.manifest.cpu is not None
    assert made.manifest.cpu.assumes == (EXACT_PRODUCTS,)
    assert made.manifest.cpu.needs == ()
    # This is what the check prevents.
    assert error_of(model, outputs(made, haswell)) > 0.1
    monkeypatch.setenv(CPU_FEATURES, taken_for(SATURATING)[CPU_FEATURES])
    with pytest.raises(InputError) as refused:
        vitrim.measure(made, time_limit_s=1.0)
    assert "eight-bit weights for x86-64-v4-vnni assume avx512_vnni or avx_vnni" in str(
        refused.value
    )
    assert "export it for --target x86-64-v3" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def graph_file(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as torch exports it."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    torch.onnx.export(model, (torch.zeros(1, 3, 16, 16),), str(path), dynamo=True)
    return path


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
@pytest.mark.parametrize("target", ["host", SATURATING, EXACT])
def test_weights_have_seven_bits_unless_the_target_has_exact_products(
    model: torch.nn.Module,
    graph_file: Path,
    tmp_path: Path,
    target: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CPU_FEATURES, taken_for(SATURATING)[CPU_FEATURES])
    options: dict[str, Any] = {"target": target, "precision": precision, "images": IMAGES}
    for made in (
        export(model, tmp_path / "model", **options),
        export_graph(graph_file, tmp_path / "graph", **options),
    ):
        largest = largest_weight(made)
        notes = " ".join(made.manifest.notes)
        stages = [stage.stage for stage in made.manifest.parity]
        if target == EXACT:
            assert 64 < largest <= 128
            # This machine is taken for one that would compute other numbers.
            assert precision not in stages
            assert f"parity of {precision} was not run: this processor has no avx512_vnni" in notes
            assert "use target x86-64-v3 or host" in notes
        else:
            assert largest <= 64
            assert precision in stages
            assert "has no eight-bit dot products" in notes


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_exact_products_of_another_architecture_are_not_compared_here(
    model: torch.nn.Module, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("products of this processor are exact")
    monkeypatch.setenv(CPU_FEATURES, taken_for(SATURATING)[CPU_FEATURES])
    monkeypatch.setenv("VITRIM_EMULATION", str(tmp_path / "empty"))
    made = export(
        model,
        tmp_path / "model",
        target="rpi5",
        precision=precision,  # type: ignore[arg-type]
        images=IMAGES,
    )
    assert largest_weight(made) > 64
    assert precision not in [stage.stage for stage in made.manifest.parity]
    assert (
        f"parity of {precision} was not run: eight-bit products saturate on this processor, and "
        "not on rpi5; verify the artifact under emulation (vitrim targets emulate) or on the "
        "device (--verify-on)"
    ) in made.manifest.notes


def largest_weight(artifact: Artifact) -> int:
    import onnx

    graph = onnx.load(artifact.model_path).graph
    return max(
        int(np.abs(onnx.numpy_helper.to_array(tensor).astype(np.int16)).max())
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    )


def test_the_best_calibration_is_refused_where_products_saturate(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_FEATURES, taken_for(SATURATING)[CPU_FEATURES])
    with pytest.raises(InputError, match="calibration 'best' compares outputs on this machine: "):
        export(
            model,
            tmp_path / "a",
            target=EXACT,
            precision="int8-static",
            calibration="best",
            images=IMAGES,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_default_target_is_this_machine(model: torch.nn.Module, tmp_path: Path) -> None:
    made = export(model, tmp_path / "a", precision="int8", images=IMAGES)
    assert made.manifest.target == "host"
    assert made.manifest.parity[-1].max_relative_error < 0.1
    assert (largest_weight(made) > 64) == (HOST_BITS == 8)
    assert error_of(model, outputs(made)) < 0.1


def test_an_engine_refuses_a_job_for_another_processor() -> None:
    cpu = {"target": EXACT, "needs": ["never_heard_of"], "assumes": []}
    with pytest.raises(EngineError, match=r"a\.onnx: its code for x86-64-v4-vnni uses never_heard"):
        infer_in_subprocess({"model": "a.onnx", "cpu": cpu}, IMAGES)
