"""What runtimes cannot do: ncnn exports every kind of Vision Transformer; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from tiny_models import tiny_vit
from torch import nn
from vitrim.core.errors import InputError
from vitrim.export import export
from vitrim.export.forms import Form
from vitrim.export.parity import ParityError, Probe
from vitrim.export.runtimes import runtime_named, runtime_names
from vitrim.export.runtimes.limits import Planned, require_within_limits
from vitrim.export.runtimes.runtime import limits_of

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "mean pooling": {"global_pool": "avg"},
    "mean pooling, no class token": {"global_pool": "avg", "class_token": False},
    "max and mean pooling": {"global_pool": "avgmax"},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "RMSNorm": {"norm_layer": "rmsnorm"},
    "norms of queries and keys": {"qk_norm": True},
    "LayerScale and registers": {"init_values": 0.5, "reg_tokens": 2},
    "distillation": {"name": "deit_tiny_distilled_patch16_224"},
    "differential attention": {"name": "vit_dwee_patch16_reg1_gap_256"},
    "rope, SwiGLU": {"name": "eva02_small_patch14_224", "patch_size": 14, "img_size": 28},
    "relative bias": {"name": "beit_base_patch16_224"},
    "features": {"num_classes": 0},
}


def needs(runtime: str) -> None:
    if reason := runtime_named(runtime).missing():
        pytest.skip(reason)


def refusal(model: nn.Module, folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        export(model, folder, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert "/tmp" not in line
    assert not folder.exists()
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_ncnn_exports_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    needs("ncnn")
    # Lifted, since torch cannot trace timm's BEiT.
    model = vitrim.lift(tiny_vit(**{**SIZES, **KINDS[kind]}))
    made = export(model, tmp_path / "artifact", runtime="ncnn")
    assert made.manifest.parity[-1].max_relative_error < 1e-5


def test_ncnn_exports_norms_that_share_their_weights(tmp_path: Path) -> None:
    needs("ncnn")
    torch.manual_seed(0)
    model: Any = tiny_vit(norm_layer="rmsnorm", qk_norm=True, **SIZES)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            nn.init.ones_(parameter)
    made = export(model, tmp_path / "artifact", runtime="ncnn")
    assert made.manifest.parity[-1].max_relative_error < 1e-5


@pytest.mark.parametrize("sharing", ["unshared", "residual", "full"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ncnn_exports_models_that_were_cut(sharing: Any, precision: Any, tmp_path: Path) -> None:
    needs("ncnn")
    model = tiny_vit(global_pool="avg", **SIZES)
    small = vitrim.compact(model, vitrim.StructuredMask.random(model, 0.5, sharing, seed=3))
    made = export(small, tmp_path / "artifact", runtime="ncnn", precision=precision)
    assert made.manifest.parity[-1].max_relative_error < (1e-5 if precision == "fp32" else 1e-2)


# ---- refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 2}, "runs one image at a time, and batch 2 was requested; export with batch 1"),
        ({"batch": "dynamic"}, "runs one image at a time, and batch dynamic was requested"),
        ({"precision": "int8"}, "precision 'int8' was requested, and it has fp32, fp16"),
        ({"form": Form(rows="batch", norm="layer")}, "has operators that pnnx does not convert"),
    ],
)
def test_ncnn_refuses_before_the_work(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr("vitrim.export.exporter._export", never)
    line = refusal(tiny_vit(**SIZES), tmp_path / "artifact", runtime="ncnn", **options)
    assert line.startswith("runtime ncnn: ")
    assert words in line


class MeanOfRows(nn.Module):
    """No Vision Transformer: pnnx has no layer for one of its operators."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).amax(dim=2)


def test_operators_that_pnnx_leaves_are_named(tmp_path: Path) -> None:
    needs("ncnn")
    line = refusal(MeanOfRows(), tmp_path / "artifact", runtime="ncnn", image=(3, 8, 8))
    assert line.startswith("runtime ncnn: ")
    assert "MeanOfRows" in line
    assert "export for onnxruntime" in line


def test_a_torch_runtime_refuses_what_vitrim_cannot_read(tmp_path: Path) -> None:
    line = refusal(MeanOfRows(), tmp_path / "artifact", runtime="torch", image=(3, 8, 8))
    assert "runtime torch: converts models that vitrim can lift: model: no rule for model" in line


def test_tvm_refuses_eight_bits_by_the_part_without_a_kernel() -> None:
    architecture = vitrim.lift(tiny_vit(global_pool="max", **SIZES)).architecture
    planned = Planned("int8", architecture=architecture)
    with pytest.raises(InputError, match="kernels, which do not cover pooling 'max'; use fp32"):
        require_within_limits("tvm", limits_of(runtime_named("tvm")), planned)
    fp32 = Planned("fp32", architecture=architecture)
    require_within_limits("tvm", limits_of(runtime_named("tvm")), fp32)


def test_every_limit_has_words_and_a_way_out() -> None:
    for name in runtime_names():
        runtime = runtime_named(name)
        for limit in limits_of(runtime):
            assert limit.what
            assert limit.instead
            assert limit.found(Planned()) is None


def test_advice_does_not_contradict_the_request() -> None:
    images = np.zeros((1, 3, 8, 8), np.float32)
    probe = Probe.of(lambda images: np.ones((len(images), 2), np.float32), (3, 8, 8), images)
    broken = np.full((1, 2), np.nan, np.float32)
    with pytest.raises(ParityError, match="missing numbers; report this model"):
        probe.compare("ncnn", broken, tolerance=None)
    with pytest.raises(ParityError, match="missing numbers; export with precision='fp32'"):
        probe.compare("ncnn fp16", broken, tolerance=None, precision="fp16")
