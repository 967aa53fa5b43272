"""Kernels of networks in which learned tokens leave before patches: rows between the patches."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import vitrim
from aarch64 import emulator
from bundle_sample import build, logits_in, needs_compiler
from PIL import Image
from random_networks import early_learned_tokens, network
from tiny_models import tiny_vit
from tvm_networks import quickly
from vitrim import export
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConvSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.bundle import bundle
from vitrim.export.parity import relative_error
from vitrim.targets.detect import detect_host

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

import tvm
from tvm import relax
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.calibration import find_ranges

HOST = quickly(detect_host())
Precision = Literal["fp32", "int8", "int8-static"]
WIDTHS = {"embed": 0.6, "head": 0.7, "ffn": 0.5, "qk": 0.7, "v": 0.5}


@cache
def cut(name: str, *, widths: bool = False) -> CompactModel:
    """A tiny network with learned tokens between its patches."""
    model = vitrim.lift(tiny_vit(name, img_size=32, depth=3))
    kept = dict(early_learned_tokens(model.architecture).kept)
    if widths:
        kept |= vitrim.StructuredMask.random(model, WIDTHS, seed=1).kept
    found = vitrim.compact(model, vitrim.StructuredMask(kept)).eval()
    assert found.architecture.inner is not None
    return found


def error_of(model: CompactModel, batch: int, precision: Precision = "fp32") -> float:
    images = np.random.default_rng(5).standard_normal(
        (batch, *model.architecture.image), dtype=np.float32
    )
    ranges = find_ranges(model, np.concatenate([images] * 4)) if "static" in precision else None
    built = build_network(model, HOST, batch=batch, precision=precision, ranges=ranges)
    assert built.route == "kernels"
    machine = relax.VirtualMachine(built.compile(), tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(images)).numpy()
    with torch.no_grad():
        wanted = model(torch.from_numpy(images)).numpy()
    return float(relative_error(wanted, found).max())


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "vit_relpos_base_patch16_clsgap_224",
    ],
)
def test_learned_tokens_between_patches_compute_torchs_outputs(name: str) -> None:
    assert error_of(cut(name), 2) < 1e-5


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_between_patches_follow_any_stem(before: bool, normed: bool) -> None:
    layer = ConvSpec(channels=5, kernel=(3, 3), padding=(1, 1), act="relu")
    steps = [
        BranchSpec(name=f"blocks.{number}.attn", core=AttentionSpec(heads=2, qk=4, v=4, scale=0.5))
        for number in range(6)
    ]
    architecture = Architecture(
        image=(2, 6, 8),
        embed=24,
        stem=StemSpec(patch=(2, 2), before=(layer,) if before else ()),
        prefix=4,
        patch_norm=NormSpec(width=24) if normed else None,
        steps=tuple((step,) for step in steps),
        norm=NormSpec(width=24),
        pool=PoolSpec(kind="mean"),
        head=HeadSpec(classes=3),
    )
    model = network(architecture).float()
    found = vitrim.compact(model, early_learned_tokens(architecture)).eval()
    assert found.architecture.inner is not None
    assert found.architecture.prefix == 0
    assert error_of(found, 2) < 1e-5


def test_widths_are_cut_too() -> None:
    assert error_of(cut("vit_small_patch14_reg4_dinov2", widths=True), 3) < 1e-5


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_eight_bits_are_close_to_torchs_outputs(precision: Precision) -> None:
    assert error_of(cut("vit_small_patch14_reg4_dinov2"), 2, precision) < 0.1


@pytest.mark.parametrize("target", ["host", "rpi4"])
def test_learned_tokens_leave_a_program_of_its_own(tmp_path: Path, target: str) -> None:
    """The bundle's C++ example with the network linked in, here and under qemu."""
    needs_compiler()
    command: list[object] = []
    settings: list[str] = []
    if target == "rpi4":
        command = [emulator().qemu, "-cpu", "cortex-a72"]
        if shutil.which("aarch64-linux-gnu-g++") is None:
            pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
        settings = ["-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake", "-DVITRIM_STATIC=ON"]
    model = cut("vit_small_patch14_reg4_dinov2")
    spec = Preprocessing(channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    artifact = export(
        model,
        tmp_path / "artifact",
        runtime="tvm",
        target=target,
        preprocessing=spec,
        options={"static": "yes"},
    )
    folder = bundle(artifact, tmp_path / "bundle")
    program = build(folder, tmp_path, "-DVITRIM_LINKED=ON", *settings)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    )
    picture.save(tmp_path / "picture.ppm")
    words = [str(word) for word in (*command, program, tmp_path / "picture.ppm", "--logits")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        wanted = model(torch.from_numpy(spec.apply(picture)[None]))[0].numpy()
    found = logits_in(ran.stdout.splitlines())
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
