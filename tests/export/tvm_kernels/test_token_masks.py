"""Kernels with token masks: first rows of the same memory, and the network's outputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from numpy.typing import NDArray
from random_networks import network
from timm.models.vision_transformer import ParallelScalingBlock
from tiny_models import tiny_vit
from tvm_networks import HOST, noise, quickly, ranges_of
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.parity import relative_error
from vitrim.targets.catalog import load_target
from vitrim.targets.profile import TargetProfile

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

import tvm
from tvm import relax
from vitrim.export.tvm_kernels.attention import Attend
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.lanes import Lanes
from vitrim.export.tvm_kernels.network import kernel_specs
from vitrim.export.tvm_kernels.schedule import default_schedule

TOKENS = {"token": 0.5}
TOKENS_AND_WIDTHS = {"token": 0.3, "embed": 0.6, "head": 0.7, "ffn": 0.5, "qk": 0.7, "v": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "mean": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "relative bias": ("beit_base_patch16_224", {}),
    "rotary positions": ("eva02_tiny_patch14_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "parallel": ("vit_base_patch16_224", {"block_fn": ParallelScalingBlock}),
}


@cache
def compact(kind: str, *, widths: bool) -> CompactModel:
    """A tiny network of 16 patches with a token mask, alone or with a mask of every width."""
    name, settings = MODELS[kind]
    model = tiny_vit(name, **({"img_size": 32, "depth": 3} | settings))
    ratios = TOKENS_AND_WIDTHS if widths else TOKENS
    found = vitrim.compact(model, vitrim.StructuredMask.random(model, ratios, seed=1)).eval()
    counts = (found.architecture.tokens, *found.architecture.step_tokens())
    assert found.architecture.order is not None
    assert len(set(counts)) > 1
    return found


def with_avx2() -> TargetProfile:
    """The profile of AVX2 where this machine has it, else this machine's."""
    profile = quickly(load_target("x86-64-v3"))
    able = HOST.architecture == "x86_64" and set(profile.features) <= set(HOST.features)
    return profile if able else HOST


def outputs(
    model: CompactModel, profile: TargetProfile, images: NDArray[Any], **settings: Any
) -> NDArray[Any]:
    built = build_network(model, profile, batch=len(images), **settings)
    assert built.route == "kernels"
    machine = relax.VirtualMachine(built.compile(), tvm.cpu())
    found: NDArray[Any] = machine["main"](tvm.runtime.tensor(images)).numpy()
    return found


def error_of(model: CompactModel, profile: TargetProfile, batch: int, **settings: Any) -> float:
    images = noise(model, batch)
    with torch.no_grad():
        wanted = model(torch.from_numpy(images)).numpy()
    return float(relative_error(wanted, outputs(model, profile, images, **settings)).max())


@pytest.mark.parametrize("kind", MODELS)
def test_a_token_mask_computes_torchs_outputs(kind: str) -> None:
    assert error_of(compact(kind, widths=False), HOST, 1) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_token_and_width_masks_of_several_images_compute_torchs_outputs(kind: str) -> None:
    assert error_of(compact(kind, widths=True), with_avx2(), 3) < 1e-5


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
@pytest.mark.parametrize(
    ("kind", "batch"), [("class token", 1), ("relative bias", 3), ("parallel", 3)]
)
def test_eight_bits_with_a_token_mask_are_close_to_torchs_outputs(
    kind: str, precision: str, batch: int
) -> None:
    model = compact(kind, widths=False)
    ranges = ranges_of(model) if precision == "int8-static" else None
    # The same bound as without a token mask.
    assert error_of(model, HOST, batch, precision=precision, ranges=ranges) < 0.1


def test_threads_share_the_patches_and_rows_that_stay() -> None:
    assert error_of(compact("class token", widths=False), HOST, 3, threads=2) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_a_drop_copies_nothing_and_every_product_has_the_rows_that_stay(batch: int) -> None:
    model = compact("class token", widths=False)
    architecture = model.architecture
    specs = kernel_specs(model, Lanes.of(HOST.vector), default_schedule(HOST.vector), batch)
    before = architecture.tokens
    wanted: list[tuple[int, ...]] = [(before,)]
    for step, after in zip(
        architecture.steps, architecture.step_tokens(last_queries=True), strict=True
    ):
        if isinstance(step[0].core, AttentionSpec):
            projections = [(after,)] if after == before else [(after,), (before,)]
            wanted += [*projections, (after, before), (after,)]
        else:
            wanted += [(after,), (after,)]
        before = after
    rows = [
        (spec.query_rows, spec.tokens) if isinstance(spec, Attend) else (spec.rows,)
        for spec in specs
    ]
    assert rows == [*wanted, (1,)]
    module = build_network(model, HOST, batch=batch).module
    assert not [name for name in module.get_global_vars() if "first_rows" in name.name_hint]


def test_pixels_of_patches_that_no_sublayer_reads_are_not_read() -> None:
    dense = vitrim.lift(tiny_vit(img_size=32, patch_size=8))
    keep = torch.ones(dense.architecture.tokens, dtype=torch.bool)
    # The second patch of the second row, after the class token.
    keep[1 + 5] = False
    model = vitrim.compact(dense, vitrim.StructuredMask({"token": {"stem.out": keep}})).eval()
    images = noise(model, 2)
    wanted = outputs(model, HOST, images)
    images[:, :, 8:16, 8:16] = np.nan
    np.testing.assert_array_equal(outputs(model, HOST, images), wanted)


def raw_stream(*, parallel: bool) -> CompactModel:
    """A network whose products read the residual stream itself; one patch leaves at the attention.

    The vector of that patch's position is large.
    """
    attention = AttentionSpec(heads=2, qk=9, v=14, scale=0.05)
    first = BranchSpec(name="0.attn", core=attention, norm=NormSpec(width=40), tokens=8)
    second = BranchSpec(name="0.mlp", core=FfnSpec(hidden=70))
    if parallel:
        first = first.model_copy(update={"norm": None})
        second = second.model_copy(update={"tokens": 8})
    architecture = Architecture(
        image=(1, 6, 6),
        embed=40,
        stem=StemSpec(patch=(2, 2)),
        prefix=0,
        order=(3, 1, 2, 0, 8, 5, 6, 7, 4),
        steps=((first, second),) if parallel else ((first,), (second,)),
        norm=NormSpec(width=40),
        pool=PoolSpec(kind="mean"),
        head=HeadSpec(classes=7),
    )
    model = network(architecture)
    if not parallel:
        with torch.no_grad():
            model.state_dict()["position"][-1] *= 1e4
    return model


def test_static_ranges_are_those_of_the_tokens_that_stay() -> None:
    model = raw_stream(parallel=False)
    ranges = ranges_of(model)
    # The FFN reads the stream itself.
    assert max(max(-found.low, found.high) for found in ranges) < 100
    error = error_of(model, HOST, 2, precision="int8-static", ranges=ranges)
    assert error < 0.1


@pytest.mark.parametrize("ffn_first", [False, True])
@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_quantized_rows_of_the_longer_stream_serve_the_shorter_one(
    precision: str, ffn_first: bool
) -> None:
    model = raw_stream(parallel=True)
    if ffn_first:
        (attention, ffn), architecture = model.architecture.steps[0], model.architecture
        model = network(architecture.model_copy(update={"steps": ((ffn, attention),)}))
    ranges = ranges_of(model) if precision == "int8-static" else None
    assert error_of(model, HOST, 2, precision=precision, ranges=ranges) < 0.1
