"""Kernels for convolutions and soft splits before the patches compute what the network computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_networks import network
from t2t_vit import T2TViT
from tiny_models import add_noise
from tvm_networks import assert_lowered_as_by_all_passes, error_of, runnable
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConvSpec,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    SoftSplitSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.coverage import uncovered_part
from vitrim.export.tvm_kernels.stem_layers import by_pixel

pytest.importorskip("tvm")

SIZE = (7, 9)


@st.composite
def norms(draw: Any, width: int) -> NormSpec:
    kind = draw(st.sampled_from(["layer", "rms"]))
    return NormSpec(
        kind=kind, width=width, eps=1e-1, weight=draw(st.booleans()), bias=draw(st.booleans())
    )


@st.composite
def layers(draw: Any, channels: int) -> ConvSpec | SoftSplitSpec:
    """A layer that leaves some pixels of the image, with widths below and above a vector's."""
    geometry: dict[str, Any] = {
        "kernel": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "stride": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "padding": draw(st.tuples(st.integers(0, 1), st.integers(0, 1))),
    }
    width = draw(st.sampled_from([1, 3, 8, 16, 19]))
    if draw(st.booleans()):
        act = draw(st.sampled_from(["relu", "gelu", "identity"]))
        return ConvSpec(channels=width, act=act, bias=draw(st.booleans()), **geometry)
    linear, hidden = draw(st.booleans()), draw(st.integers(1, 20))
    ffn = FfnSpec(
        hidden=hidden,
        gated=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        norm=draw(st.none() | norms(hidden)),
    )
    window = channels * geometry["kernel"][0] * geometry["kernel"][1]
    return SoftSplitSpec(
        channels=width,
        norm=draw(norms(window)),
        qkv_bias=draw(st.booleans()),
        scale=None if linear else 0.4,
        features=draw(st.integers(1, 9)) if linear else None,
        # Without it a sum of features may be zero in fp32.
        features_eps=draw(st.sampled_from([1e-8, 1e-2])) if linear else 1e-8,
        out_bias=draw(st.booleans()),
        ffn_norm=draw(norms(width)),
        ffn=ffn,
        **geometry,
    )


@st.composite
def architectures(draw: Any) -> Architecture:
    """Networks with one or two layers before the patches."""
    channels, before = 2, []
    for _ in range(draw(st.integers(1, 2))):
        before.append(draw(layers(channels)))
        channels = before[-1].channels
    stem = StemSpec(
        patch=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        stride=(1, 2),
        padding=draw(st.tuples(st.integers(0, 1), st.integers(0, 1))),
        before=tuple(before),
    )
    assume(all(min(size) > 0 for size in stem.sizes(*SIZE)))
    patches = math.prod(stem.sizes(*SIZE)[-1])
    order = st.permutations(range(patches)).map(lambda places: tuple(places[: patches // 2 + 1]))
    return Architecture(
        image=(2, *SIZE),
        embed=11,
        stem=stem,
        prefix=draw(st.integers(0, 1)),
        position=draw(st.booleans()),
        order=draw(st.none() | order),
        steps=(
            (
                BranchSpec(
                    name="blocks.0.attn",
                    core=AttentionSpec(heads=2, qk=3, v=4, scale=0.4),
                    norm=NormSpec(width=11, eps=1e-1),
                ),
            ),
        ),
        norm=NormSpec(width=11, eps=1e-1),
        pool=PoolSpec(kind="mean"),
        head=HeadSpec(classes=5),
    )


@settings(max_examples=12)
@given(
    architecture=architectures(),
    batch=st.integers(1, 2),
    threads=st.integers(1, 2),
    unit=st.integers(0, 3),
)
def test_any_stem_computes_the_same_outputs(
    architecture: Architecture, batch: int, threads: int, unit: int
) -> None:
    assert uncovered_part(architecture) is None
    model = network(architecture)
    built = build_network(model, runnable()[unit % len(runnable())], batch=batch, threads=threads)
    assert built.route == "kernels"
    assert error_of(model, built, batch) < 1e-4


@pytest.mark.parametrize("kind", ["transformer", "performer"])
def test_passes_that_are_left_out_would_change_no_kernel_of_a_stem(kind: str) -> None:
    assert_lowered_as_by_all_passes(build_network(t2t_vit(kind, {"ffn": 0.7}), runnable()[0]))


def t2t_vit(kind: Any, keep: Any) -> CompactModel:
    torch.manual_seed(0)
    shape: Any = {"token_dim": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "classes": 5}
    model = vitrim.lift(add_noise(T2TViT(kind, img_size=64, **shape)))
    small = vitrim.compact(model, vitrim.StructuredMask.random(model, keep, seed=5))
    return small.double().eval()


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_pruned_t2t_vit_runs_on_our_kernels(kind: str, precision: Any) -> None:
    model = t2t_vit(kind, {"token": 0.5, "ffn": 0.5, "embed": 0.7})
    built = build_network(model, runnable()[-1], precision=precision)
    assert built.route == "kernels"
    assert error_of(model, built, 1) < (1e-4 if precision == "fp32" else 0.05)


def test_columns_are_ordered_by_pixel() -> None:
    columns = np.arange(2 * 6, dtype=np.float32).reshape(2, 6)
    assert by_pixel(columns, 2).tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    assert by_pixel(columns[0], 3).tolist() == [0, 2, 4, 1, 3, 5]
