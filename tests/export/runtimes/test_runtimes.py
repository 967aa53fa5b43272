"""Every installed runtime: its files compute the model's outputs in the engine that is timed.

A runtime that is not installed is reported with what to install.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import vitrim
from torch import nn
from vitrim.bench.local.measure import measure_interleaved
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.export import Artifact, export
from vitrim.export.exporter import export_all_runtimes
from vitrim.export.runtimes import runtime_named, runtime_names
from vitrim.runtimes import EngineError, engine_names, open_engine, requirement
from vitrim.runtimes.subprocess_inference import (
    infer_in_subprocess,
    interpreter,
    interpreter_variable,
)

# Three times the largest errors that were measured here.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1, "int8-static": 0.2}
QUICK = [
    ("torch", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("openvino", "int8-static"),
    ("ncnn", "fp32"),
    ("ncnn", "fp16"),
]
# Their converters take more than a minute.
SLOW = [("executorch", "fp32"), ("litert", "fp32"), ("executorch", "int8"), ("litert", "int8")]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
    ).eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((12, 1, 16, 16), dtype=np.float32)


def written(
    model: nn.Module,
    images: np.ndarray,
    folder: Path,
    runtime: str,
    precision: str,
    cut: CompactModel | None = None,
) -> Artifact:
    if reason := runtime_named(runtime).missing():
        pytest.skip(reason)
    if precision == "bf16" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no bfloat16")
    if cut is None:
        cut = vitrim.compact(model, vitrim.StructuredMask.random(model, keep_ratio=0.5)).eval()
    try:
        made = export(cut, folder, runtime=runtime, precision=precision, images=images)  # type: ignore[arg-type]
    except InputError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        raise
    stage = made.manifest.parity[-1]
    assert stage.stage.startswith(runtime)
    assert stage.max_relative_error < BOUNDS[precision]
    if interpreter(runtime) is None:
        engine = made.engine()
        assert engine.runtime == runtime
        logits = np.concatenate([engine.infer(image[None]) for image in images])
    else:
        job = {
            "runtime": runtime,
            "model": str(made.model_path),
            "threads": 1,
            "session": made.manifest.session,
            "input": {"name": "images", "shape": [1, 1, 16, 16], "type": "float32"},
        }
        logits = infer_in_subprocess(job, images)[0]
    # The outputs come from the compact model, not from constants.
    with torch.no_grad():
        expected = cut(torch.from_numpy(images)).numpy()
    assert np.abs(logits - expected).max() <= BOUNDS[precision] * np.abs(expected).max()
    return made


@pytest.mark.parametrize(("runtime", "precision"), QUICK)
def test_an_artifact_computes_the_models_outputs_and_is_measured(
    model: nn.Module, images: np.ndarray, tmp_path: Path, runtime: str, precision: str
) -> None:
    made = written(model, images, tmp_path / "artifact", runtime, precision)
    found = measure_interleaved({"it": made}, time_limit_s=0.2, least_rounds=2, quiet=True)["it"]
    assert (found.runtime, found.precision) == (runtime, precision)
    assert found.input_shape == (1, 1, 16, 16)
    assert found.artifact_sha256 == made.sha256
    assert found.provider == "CPU"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-static"])
def test_openvino_ignores_a_limit_that_is_set_for_another_onednn(
    model: nn.Module,
    images: np.ndarray,
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    written(model, images, tmp_path / "artifact", "openvino", precision)
    assert os.environ["DNNL_MAX_CPU_ISA"] == "AVX2"


@pytest.mark.parametrize(("runtime", "precision"), SLOW)
def test_an_artifact_of_a_subprocess_converter_computes_the_models_outputs(
    model: nn.Module, images: np.ndarray, tmp_path: Path, runtime: str, precision: str
) -> None:
    written(model, images, tmp_path / "artifact", runtime, precision)


def dropping(model: nn.Module, first: str) -> CompactModel:
    """The network with fewer tokens from `first` on: with fewer patches, or all in an order."""
    ratios = {"token": 0.5, "ffn": 0.5} if first == "the stem" else {"ffn": 0.5}
    mask = vitrim.StructuredMask.random(model, ratios, seed=0)
    if first != "the stem":
        kept = torch.ones(17, dtype=torch.bool)
        kept[[3, 9]] = False
        mask = replace(mask, kept={**mask.kept, "token": {first: kept}})
    compact: CompactModel = vitrim.compact(model, mask).eval()
    assert (compact.architecture.patches < 16) == (first == "the stem")
    assert compact.architecture.order != tuple(range(compact.architecture.patches))
    return compact


@pytest.mark.parametrize("first", ["the stem", "blocks.0.attn"])
@pytest.mark.parametrize(
    ("runtime", "precision"), [(name, "fp32") for name in ("torch", "openvino", "ncnn")]
)
def test_an_artifact_drops_the_tokens_that_the_model_drops(
    model: nn.Module, images: np.ndarray, tmp_path: Path, first: str, runtime: str, precision: str
) -> None:
    written(model, images, tmp_path / "artifact", runtime, precision, dropping(model, first))


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_openvino_drops_tokens_in_eight_bits(
    model: nn.Module, images: np.ndarray, tmp_path: Path, precision: str
) -> None:
    cut = dropping(model, "the stem")
    written(model, images, tmp_path / "artifact", "openvino", precision, cut)


@pytest.mark.parametrize("runtime", ["executorch", "litert"])
@pytest.mark.parametrize("first", ["the stem", "blocks.0.attn"])
def test_an_artifact_of_a_subprocess_converter_drops_the_tokens_that_the_model_drops(
    model: nn.Module, images: np.ndarray, tmp_path: Path, first: str, runtime: str
) -> None:
    written(model, images, tmp_path / "artifact", runtime, "fp32", dropping(model, first))


def test_every_runtime_has_an_engine_with_its_requirement() -> None:
    assert set(runtime_names()) | {"onnxruntime"} == set(engine_names())
    for name in engine_names():
        assert requirement(name).module.isidentifier()
        assert requirement(name).install


@pytest.mark.parametrize("name", ["openvino", "ncnn", "executorch", "litert", "onnxruntime"])
def test_a_missing_runtime_is_reported_in_one_line_with_what_to_install(
    name: str, tmp_path: Path
) -> None:
    module = requirement(name).module
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from vitrim.runtimes import EngineError, open_engine\n"
        f"try: open_engine({{'runtime': {name!r}, 'model': 'absent'}})\n"
        "except EngineError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1
    assert "python3 -m pip install " in lines[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"runtime": "openvino", "precision": "int4-weights"},
            "'int4-weights' was requested, and it has fp32, bf16, int8, int8-static",
        ),
        (
            {"runtime": "torch", "options": {"fast": "1"}},
            "runtime torch: no option 'fast'; it has compile",
        ),
        ({"runtime": "torch", "tune": True}, "tune is for onnxruntime"),
        (
            {"runtime": "abacus"},
            "runtime 'abacus' is unknown; this vitrim exports for onnxruntime, ",
        ),
    ],
)
def test_an_unsupported_request_is_refused_in_one_line(
    model: nn.Module, tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    if options["runtime"] == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(InputError) as caught:
        export(model, tmp_path / "artifact", **options)  # type: ignore[arg-type]
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../infer", "subprocess_inference", "engine", "os", ""])
def test_a_manifest_cannot_name_another_file_as_an_engine(name: str) -> None:
    if not name:
        assert open_engine({"runtime": name, "model": "x"}).runtime == "onnxruntime"
        return
    with pytest.raises(EngineError, match="there is no engine for the runtime"):
        open_engine({"runtime": name, "model": "x"})


def test_an_environment_variable_names_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreter_variable("litert") == "VITRIM_PYTHON_LITERT"
    monkeypatch.delenv("VITRIM_PYTHON_LITERT", raising=False)
    assert interpreter("litert") is None
    monkeypatch.setenv("VITRIM_PYTHON_LITERT", sys.executable)
    assert interpreter("litert") == sys.executable
    monkeypatch.setenv("VITRIM_PYTHON_LITERT", "no-such-python")
    with pytest.raises(
        EngineError, match="VITRIM_PYTHON_LITERT=no-such-python: no such interpreter"
    ):
        interpreter("litert")
    assert "no such interpreter" in str(runtime_named("litert").missing())


def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(EngineError, match=r"model\.xml: openvino .* cannot load it") as caught:
        infer_in_subprocess(
            {"runtime": "openvino", "model": str(tmp_path / "model.xml")},
            np.zeros((1, 1, 16, 16), np.float32),
        )
    assert "\n" not in str(caught.value)


def test_all_runtimes_are_exported_and_the_absent_have_a_reason(
    model: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("executorch", "litert", "tvm"):
        monkeypatch.setattr(
            runtime_named(name),
            "missing",
            lambda name=name: f"{name} is left out of this test",
            raising=False,
        )
    made, absent = export_all_runtimes(
        vitrim.lift(model), tmp_path / "all", precision="fp32", images=images
    )
    assert "onnxruntime" in made
    assert set(made) | set(absent) == {"onnxruntime", *runtime_names()} - {"torch"}
    assert absent["litert"] == "litert is left out of this test"
    for name, artifact in made.items():
        assert artifact.folder == tmp_path / "all" / name
        assert artifact.manifest.runtime == name
    assert sorted(os.listdir(tmp_path / "all")) == sorted(made)


SIGNAL_AFTER_ENGINES = """
import gc, os, signal, sys
from vitrim.runtimes import open_engine

job = {"runtime": "openvino", "model": sys.argv[1]}
engines = [open_engine(job) for _ in range(2)]
for engine in engines:
    engine.load()
    engine.profile(__import__("numpy").zeros(engine.input_shape, "float32"), 1)
del engine
while engines:
    del engines[0]
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_models_of_openvino_is_handled(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from openvino import opset8

    given = opset8.parameter([1, 4], np.float32, name="x")
    path = tmp_path / "m.xml"
    openvino.save_model(openvino.Model([opset8.relu(given)], [given], "m"), str(path))
    command = [sys.executable, "-c", SIGNAL_AFTER_ENGINES, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout) == (0, "handled\n"), ran.stderr
