"""TVM's programs of our own kernels compute what the network computes, for odd widths, several images, every vector unit and several threads."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import network
from vitrim.compress.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    Core,
    FfnSpec,
    HeadSpec,
    Indices,
    NormSpec,
    PoolSpec,
    StemSpec,
)
from vitrim.compress.vit.model import CompactModel
from vitrim.export.parity import relative_error
from vitrim.targets.detect import detect_host
from vitrim.targets.profile import TargetProfile, load_target

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

from vitrim.export.runtimes.tvm_schedule.build import build_network
from vitrim.export.runtimes.tvm_schedule.built import Built

HOST = detect_host()
X86 = ("x86-64", "x86-64-avx2")


@cache
def runnable() -> tuple[TargetProfile, ...]:
    """Profiles whose vector instructions this machine has, and one without any."""
    shipped = [load_target(name) for name in X86]
    able = [profile for profile in shipped if HOST.architecture == "x86_64" and set(profile.features) <= set(HOST.features)]
    plain = {"kind": "llvm"} if HOST.architecture != "x86_64" else {"kind": "llvm", "mcpu": "x86-64"}
    return (*able, HOST.model_copy(update={"features": (), "tvm_target": plain}))


def answers(built: Built, images: torch.Tensor) -> np.ndarray[Any, Any]:
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(built.compile(), tvm.cpu())
    found: np.ndarray[Any, Any] = machine["main"](tvm.runtime.tensor(images.float().numpy())).numpy()
    return found


def error_of(model: CompactModel, built: Built, batch: int) -> float:
    images = torch.randn(batch, *model.architecture.image, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = model(images).numpy()
    return float(relative_error(expected, answers(built, images)).max())


@st.composite
def architectures(draw: Any) -> Architecture:
    """Networks of the kinds that our kernels cover, with widths on both sides of a vector's."""
    embed, grid, patch = draw(st.integers(3, 40)), draw(st.tuples(st.integers(1, 5), st.integers(1, 4))), draw(st.integers(1, 3))
    channels, padding = draw(st.integers(1, 3)), (draw(st.integers(0, 1)) if patch > 1 else 0)
    pool = draw(st.sampled_from(["token", "mean", "mean_all", "distilled"]))
    prefix = draw(st.integers({"token": 1, "distilled": 2}.get(pool, 0), 3))
    steps = tuple(
        tuple(draw(branches(embed, f"blocks.{number}.{position}")) for position in range(draw(st.integers(1, 2)))) for number in range(draw(st.integers(1, 2)))
    )
    reads = draw(subset(embed))
    return Architecture(
        image=(channels, grid[0] * patch, grid[1] * patch),
        embed=embed,
        stem=StemSpec(patch=(patch, patch), padding=(padding, padding), bias=draw(st.booleans())),
        prefix=prefix,
        position=draw(st.booleans()),
        stem_norm=draw(norms(embed)),
        steps=steps,
        norm=draw(norms(len(reads or range(embed)))),
        pool=PoolSpec(kind=pool),
        pool_norm=draw(norms(len(reads or range(embed)))) if pool != "distilled" else None,
        head=HeadSpec(
            classes=draw(st.integers(1, 20)),
            bias=draw(st.booleans()),
            hidden=draw(st.sampled_from([None, 5])),
            act="identity" if pool == "distilled" else draw(st.sampled_from(["identity", "sigmoid"])),
        ),
        head_reads=reads,
    )


@st.composite
def branches(draw: Any, embed: int, name: str) -> BranchSpec:
    reads, writes = draw(subset(embed)), draw(subset(embed))
    core: Core = draw(st.one_of(attentions(), ffns(), st.just(ConstantSpec())))
    constant = isinstance(core, ConstantSpec)
    return BranchSpec(
        name=name,
        core=core,
        norm=None if constant else draw(norms(len(reads or range(embed)))),
        layer_scale=not constant and draw(st.booleans()),
        reads=None if constant else reads,
        writes=writes,
    )


@st.composite
def attentions(draw: Any) -> AttentionSpec:
    heads, qk, v = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    biases = {f"{name}_bias": draw(st.booleans()) for name in ("q", "k", "v", "out")}
    return AttentionSpec(
        heads=heads,
        qk=qk,
        v=v,
        scale=draw(st.sampled_from([0.3, 1.0])),
        q_norm=draw(norms(qk)),
        k_norm=draw(norms(qk)),
        qk_norm_per_head=draw(st.booleans()),
        out_norm=draw(norms(heads * v)),
        **biases,
    )


@st.composite
def ffns(draw: Any) -> FfnSpec:
    hidden = draw(st.integers(1, 70))
    act = draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu6", "hardswish", "tanh"]))
    flags = {name: draw(st.booleans()) for name in ("gated", "in_bias", "gate_bias", "out_bias")}
    return FfnSpec(hidden=hidden, act=act, norm=draw(norms(hidden)), **flags)


@st.composite
def norms(draw: Any, width: int) -> NormSpec | None:
    if draw(st.booleans()):
        return None
    return NormSpec(kind=draw(st.sampled_from(["layer", "rms"])), width=width, eps=1e-1, weight=draw(st.booleans()), bias=draw(st.booleans()))


@st.composite
def subset(draw: Any, size: int) -> Indices | None:
    if draw(st.integers(0, 3)):
        return None
    return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=2))))


@settings(max_examples=12, deadline=None)
@given(architecture=architectures(), batch=st.integers(1, 3), threads=st.integers(1, 2), unit=st.integers(0, 2))
def test_any_covered_network_answers_the_same(architecture: Architecture, batch: int, threads: int, unit: int) -> None:
    model = network(architecture)
    built = build_network(model, runnable()[unit % len(runnable())], batch=batch, threads=threads)
    assert built.route == "kernels"
    assert error_of(model, built, batch) < 1e-4
