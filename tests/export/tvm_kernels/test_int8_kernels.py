"""int8 kernels: codes dequantize to their numbers, products are exact, outputs are near fp32."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from aarch64 import emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from random_networks import network
from tiny_models import tiny_vit
from tvm_networks import compiled_kernels, noise, quickly, ranges_of
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    DifferentialSpec,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.export.exporter import export
from vitrim.export.parity import relative_error
from vitrim.targets.catalog import load_target
from vitrim.targets.detect import detect_host, missing_features
from vitrim.targets.profile import TargetProfile

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

import tvm
from tvm import relax
from tvm_sample import images
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.dense import Dense, dense
from vitrim.export.tvm_kernels.integer_dot import IntegerDot, Kind
from vitrim.export.tvm_kernels.lanes import Lanes, RowLayout
from vitrim.export.tvm_kernels.packing import padded, panels, quantize_weights
from vitrim.export.tvm_kernels.quantization import Quantize, Quantizer, Range, quantize_rows
from vitrim.export.tvm_kernels.schedule import default_schedule

HOST = quickly(detect_host())
PLAIN = quickly(
    HOST.model_copy(
        update={
            "features": (),
            "tvm_target": {"kind": "llvm", "mcpu": "x86-64"}
            if HOST.architecture == "x86_64"
            else {"kind": "llvm"},
        }
    )
)
SHIPPED = {"unsigned": "x86-64-v4-vnni", "pairs": "x86-64-v3"}


@cache
def profile_of(kind: Kind) -> TargetProfile:
    """A profile with this instruction, that this machine can run."""
    profile = PLAIN if kind == "plain" else load_target(SHIPPED[kind])
    if HOST.architecture != "x86_64" and kind != "plain":
        pytest.skip("these instructions are those of x86-64")
    if missing := missing_features(profile):
        pytest.skip(f"this processor has no {', '.join(missing)}")
    assert IntegerDot.of(profile.vector).kind == kind
    return profile


def run(
    kernel: Any, profile: TargetProfile, out: NDArray[Any], *operands: NDArray[Any]
) -> NDArray[Any]:
    module = compiled_kernels({"kernel": kernel.with_attr("global_symbol", "kernel")}, profile)
    result = tvm.runtime.tensor(out)
    module["kernel"](
        *(tvm.runtime.tensor(np.ascontiguousarray(operand)) for operand in operands), result
    )
    found: NDArray[Any] = result.numpy()
    return found


def quantized(
    x: NDArray[np.float32], profile: TargetProfile, span: Range | None, threads: int = 1
) -> tuple[NDArray[Any], Quantizer]:
    """Codes of the rows of x (rows, width), and how they were quantized."""
    dot = IntegerDot.of(profile.vector)
    quantizer, lanes = Quantizer(dot, static=span is not None), dot.lanes
    rows, used = x.shape
    # Numbers after the last column must not matter.
    wide = np.full((rows, lanes.up(used)), 1e9, np.float32)
    wide[:, :used] = x
    spec = Quantize(1, rows, used, RowLayout(rows, wide.shape[1]), quantizer)
    out = np.zeros(rows * quantizer.row_length(used), dot.stored)
    static_range = [] if span is None else [span.operand(dot)]
    codes = run(quantize_rows(spec, threads), profile, out, wide.ravel(), *static_range)
    return codes.reshape(rows, -1), quantizer


def dequantized(
    codes: NDArray[Any], quantizer: Quantizer, span: Range | None, used: int
) -> NDArray[np.float64]:
    numbers = codes[:, :used].astype(np.float64)
    if span is not None:
        return span.base(quantizer.dot) + span.step * numbers
    first = quantizer.range_offset(codes.shape[1])
    own = codes[:, first : first + 8]
    ranges = np.ascontiguousarray(own).view(np.float32)
    return ranges[:, 1:] + ranges[:, :1].astype(np.float64) * numbers


@pytest.mark.parametrize("kind", ["unsigned", "pairs", "plain"])
@settings(max_examples=8)
@given(
    rows=st.integers(1, 5),
    used=st.integers(1, 70),
    shift=st.floats(-3, 3),
    threads=st.integers(1, 2),
    static=st.booleans(),
)
def test_each_number_gets_the_nearest_code(
    kind: Kind, rows: int, used: int, shift: float, threads: int, static: bool
) -> None:
    noise = np.random.default_rng(rows * 71 + used).standard_normal((rows, used))
    x = (noise + shift).astype(np.float32)
    span = Range(float(x.min()), float(x.max())) if static else None
    codes, quantizer = quantized(x, profile_of(kind), span, threads)
    steps = (
        np.full((rows, 1), span.step) if span else (x.max(axis=1) - x.min(axis=1))[:, None] / 255
    )
    error = np.abs(dequantized(codes, quantizer, span, used) - x)
    assert (error <= 0.5001 * steps + 1e-5).all()


@pytest.mark.parametrize("kind", ["unsigned", "pairs", "plain"])
def test_rows_of_equal_numbers_are_exact_and_numbers_outside_a_static_range_are_clamped(
    kind: Kind,
) -> None:
    profile = profile_of(kind)
    equal = np.full((2, 9), 3.75, np.float32)
    codes, quantizer = quantized(equal, profile, None)
    np.testing.assert_array_equal(dequantized(codes, quantizer, None, 9), equal)
    span = Range(-1.0, 2.0)
    outside = np.array([[-50.0, -1.0, 2.0, 99.0]], np.float32)
    codes, quantizer = quantized(outside, profile, span)
    found = dequantized(codes, quantizer, span, 4)
    np.testing.assert_allclose(found, [[-1.0, -1.0, 2.0, 2.0]], atol=1e-6)


@pytest.mark.parametrize("kind", ["unsigned", "pairs", "plain"])
@settings(max_examples=8)
@given(
    rows=st.integers(1, 14),
    depth=st.integers(1, 70),
    columns=st.integers(1, 50),
    static=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 2),
)
def test_a_product_of_codes_equals_the_product_of_the_dequantized_numbers(
    kind: Kind, rows: int, depth: int, columns: int, static: bool, bias: bool, threads: int
) -> None:
    profile = profile_of(kind)
    dot, lanes = IntegerDot.of(profile.vector), Lanes.of(profile.vector)
    rng = np.random.default_rng(depth * 51 + columns)
    x = rng.standard_normal((rows, depth), np.float32)
    weight = rng.standard_normal((depth, columns), np.float32)
    summand = rng.standard_normal(columns).astype(np.float32)
    span = Range(float(x.min()), float(x.max())) if static else None
    codes, quantizer = quantized(x, profile, span)
    width = lanes.up(columns)
    schedule = default_schedule(profile.vector, threads)
    spec = Dense(
        images=1,
        rows=rows,
        depth=depth,
        width=width,
        source=RowLayout(rows, codes.shape[1]),
        bias=bias or static,
        input_quantizer=quantizer,
    )
    weight_codes, scales = quantize_weights(weight, limit_pairs=dot.limits_pairs)
    sums = scales * weight_codes.sum(axis=0)
    factors = (scales * np.float32(span.step),) if span else (scales, sums)
    shift = summand * bias + (span.base(dot) * sums if span else 0)
    operands = [
        codes.ravel(),
        panels(weight_codes, spec.panels(lanes, schedule), lanes.count, dot.group),
        *(padded(part, width) for part in factors),
    ]
    operands += [padded(shift.astype(np.float32), width)] if spec.bias else []
    out = np.zeros(rows * width, np.float32)
    found = run(dense(spec, lanes, schedule), profile, out, *operands)
    exact = dequantized(codes, quantizer, span, depth) @ (weight_codes * scales.astype(np.float64))
    wanted = exact + summand * bias
    np.testing.assert_allclose(
        found.reshape(rows, width)[:, :columns],
        wanted,
        atol=2e-5 * max(1.0, np.abs(wanted).max()),
    )


def outputs(
    model: CompactModel, profile: TargetProfile, precision: Any, batch: int = 2, threads: int = 1
) -> NDArray[Any]:
    ranges = ranges_of(model) if precision == "int8-static" else None
    compiled = build_network(
        model, profile, batch=batch, threads=threads, precision=precision, ranges=ranges
    ).compile()
    main = relax.VirtualMachine(compiled, tvm.cpu())["main"]
    found: NDArray[Any] = main(tvm.runtime.tensor(noise(model, batch))).numpy()
    return found


def sample(**changes: Any) -> CompactModel:
    """Two blocks, wide enough that the errors of single codes average out."""
    attention = {"heads": 2, "qk": 9, "v": 14, "scale": 0.3, **changes.pop("attention", {})}
    ffn = {"hidden": 70, **changes.pop("ffn", {})}
    steps = tuple(
        (BranchSpec(name=f"{number}.{name}", core=core, norm=NormSpec(width=40)),)
        for number in range(2)
        for name, core in (("attn", AttentionSpec(**attention)), ("mlp", FfnSpec(**ffn)))
    )
    architecture = Architecture(
        image=(1, 12, 8),
        embed=40,
        stem=StemSpec(patch=(2, 2)),
        steps=steps,
        norm=NormSpec(width=40),
        head=HeadSpec(classes=7),
    )
    return network(architecture.model_copy(update=changes))


KINDS: dict[str, dict[str, Any]] = {
    "mean": {"prefix": 0, "pool": PoolSpec(kind="mean")},
    "token": {"prefix": 1, "pool": PoolSpec(kind="token")},
    "distilled": {"prefix": 2, "pool": PoolSpec(kind="distilled")},
    "dense": {"prefix": 2, "pool": PoolSpec(kind="dense")},
    "gated": {
        "attention": {"gated": True, "out_norm": NormSpec(width=28)},
        "ffn": {"gated": True, "norm": NormSpec(width=70)},
    },
    "attention": {
        "prefix": 1,
        "pool": PoolSpec(
            kind="attention",
            attention=AttentionSpec(heads=2, qk=9, v=14, scale=0.3),
            width=40,
            ffn=FfnSpec(hidden=70),
        ),
    },
    "differential": {
        "attention": {
            "differential": DifferentialSpec(start=0.3, width=3),
            "head_norm": NormSpec(width=14),
        }
    },
    "normed": {
        "attention": {"q_norm": NormSpec(width=9), "k_norm": NormSpec(width=9)},
        "norm": None,
        "head_reads": tuple(range(3, 30)),
    },
}


@cache
def sample_of(kind: str) -> CompactModel:
    """The sample of a kind, one for all tests."""
    return sample(**KINDS[kind])


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_in_int8_are_close_to_fp32(kind: str, precision: str) -> None:
    model = sample_of(kind)
    with torch.no_grad():
        wanted = model(torch.from_numpy(noise(model, 2)).double()).numpy()
    # The largest is 0.03; a missing base, ranges in another order or one scale for all columns give
    # 0.19 and more.
    assert relative_error(wanted, outputs(model, PLAIN, precision)).max() < 0.1


@cache
def with_plain_instructions(
    precision: str, limits_pairs: bool
) -> tuple[CompactModel, NDArray[Any]]:
    """A model, and its outputs with the instructions of every processor."""
    model = sample_of("token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IntegerDot, "limits_pairs", limits_pairs)
        return model, outputs(model, PLAIN, precision)


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
@pytest.mark.parametrize("kind", ["unsigned", "pairs"])
def test_every_instruction_computes_the_same_outputs(kind: Kind, precision: str) -> None:
    limits_pairs = IntegerDot.of(profile_of(kind).vector).limits_pairs
    model, plain = with_plain_instructions(precision, limits_pairs)
    found = outputs(model, profile_of(kind), precision, threads=2)
    # Products of codes are exact; only sums in fp32 differ in their last digits.
    assert relative_error(plain, found).max() < 1e-5


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_weights_with_limited_pairs_are_close_to_fp32(precision: str) -> None:
    model, found = with_plain_instructions(precision, True)
    with torch.no_grad():
        wanted = model(torch.from_numpy(noise(model, 2)).double()).numpy()
    assert relative_error(wanted, found).max() < 0.1


@settings(max_examples=30)
@given(depth=st.integers(1, 9), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_pair_of_limited_weights_saturates_sixteen_bits(
    depth: int, columns: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((depth, columns)).astype(np.float32)
    codes, scales = quantize_weights(weight, limit_pairs=True)
    pairs = [codes[row : row + 2].sum(axis=0, dtype=np.int64) for row in range(0, depth, 2)]
    assert np.abs(pairs).max() * 255 < 2**15
    assert np.abs(codes * scales - weight).max() <= 0.5001 * scales.max()
    unlimited = quantize_weights(weight)[1]
    assert (scales >= unlimited).all()
    assert (scales <= 2.0001 * unlimited).all()


@pytest.mark.parametrize("kind", ["unsigned", "pairs"])
def test_the_largest_codes_times_the_largest_weights_are_exact(kind: Kind) -> None:
    profile = profile_of(kind)
    dot, lanes = IntegerDot.of(profile.vector), Lanes.of(profile.vector)
    span = Range(0.0, 255.0)
    codes, quantizer = quantized(np.full((13, 64), 255, np.float32), profile, span)
    weight, scales = quantize_weights(np.ones((64, 32), np.float32), limit_pairs=dot.limits_pairs)
    schedule = default_schedule(profile.vector)
    source = RowLayout(13, codes.shape[1])
    spec = Dense(1, 13, 64, 32, source, bias=False, input_quantizer=quantizer)
    packed = panels(weight, spec.panels(lanes, schedule), lanes.count, dot.group)
    out = np.zeros(13 * 32, np.float32)
    found = run(dense(spec, lanes, schedule), profile, out, codes.ravel(), packed, scales)
    wanted = 255 * weight.sum(axis=0, dtype=np.int64) * scales.astype(np.float64)
    np.testing.assert_allclose(found.reshape(13, 32), np.tile(wanted, (13, 1)), rtol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_the_export_reports_the_instruction_and_the_parity_of_int8(
    tmp_path: Path, precision: Any
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: apt-get install g++")
    profile_of("unsigned")
    artifact = export(
        tiny_vit(), tmp_path / "a", runtime="tvm", precision=precision, images=images(16)
    )
    assert artifact.manifest.parity[-1].stage == f"tvm {precision}"
    assert 1e-5 < artifact.manifest.parity[-1].max_relative_error < 0.1
    assert (
        "products of eight bits by vpdpbusd, four multiply-adds a lane" in artifact.manifest.notes
    )
    assert artifact.manifest.session["entry"] == "program"


def test_arms_dot_products_compute_the_outputs_of_this_machine(tmp_path: Path) -> None:
    emulator("apache-tvm-ffi")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
    artifact = export(
        tiny_vit(), tmp_path / "a", target="rpi5", runtime="tvm", precision="int8", images=images(4)
    )
    assert "products of eight bits by sdot, four multiply-adds a lane" in artifact.manifest.notes
    assert 1e-5 < artifact.manifest.parity[-1].max_relative_error < 0.1
    old = export(
        tiny_vit(), tmp_path / "b", target="rpi4", runtime="tvm", precision="int8", images=images(4)
    )
    assert any(
        "this target has no instruction for them, so int8 saves bytes and may cost time" in note
        for note in old.manifest.notes
    )


def test_int8_needs_kernels_that_cover_the_network(tmp_path: Path) -> None:
    ours = "int8 is computed by our own kernels, and "
    with pytest.raises(InputError, match=f"{ours}they do not cover pooling 'max'; use fp32"):
        build_network(sample(pool=PoolSpec(kind="max")), PLAIN, precision="int8")
    with pytest.raises(
        InputError, match=f"{ours}this network, target or schedule has none of them"
    ):
        export(
            vitrim.lift(tiny_vit()),
            tmp_path / "a",
            runtime="tvm",
            precision="int8",
            options={"schedule": "default"},
            images=images(4),
        )
