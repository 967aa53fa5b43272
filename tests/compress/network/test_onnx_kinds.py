"""ONNX of a compact model equals torch, for every kind of block."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import relative_error
from vitrim import StructuredMask, compact
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConvSpec,
    DifferentialSpec,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    RefineSpec,
    RelativeBiasSpec,
    RopeSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel

WIDTH, GRID = 24, (2, 3)


def norm(width: int = WIDTH, kind: Any = "layer") -> NormSpec:
    return NormSpec(kind=kind, width=width)


def attention(**options: Any) -> AttentionSpec:
    settings: dict[str, Any] = {"heads": 4, "qk": 8, "v": 6, "scale": 8**-0.5}
    return AttentionSpec(**settings | options)


def step(*cores: AttentionSpec | FfnSpec, **options: Any) -> tuple[BranchSpec, ...]:
    return tuple(
        BranchSpec(**{"norm": norm()} | options, core=core, name=f"{core.kind}.{number}.{id(core)}")
        for number, core in enumerate(cores)
    )


PLAIN, FFN = attention(), FfnSpec(hidden=32)
NETWORKS: dict[str, dict[str, Any]] = {
    "plain, layer scale, class token": {"steps": (step(PLAIN, layer_scale=True), step(FFN))},
    "rope in halves, norms of q and k, grouped queries, RMSNorm": {
        "steps": (
            step(
                attention(
                    rope=RopeSpec(layout="half", tokens=6, prefix=1),
                    q_norm=norm(8, "rms"),
                    k_norm=norm(8, "rms"),
                    kv_of=(0, 0, 1, 1),
                ),
                norm=norm(kind="rms"),
            ),
            step(FfnSpec(hidden=32, gated=True, act="silu", norm=norm(32))),
        )
    },
    "interleaved rope with a table per head, gate, norm before the projection": {
        "steps": (
            step(
                attention(
                    rope=RopeSpec(tokens=6, prefix=1, per_head=True), gated=True, out_norm=norm(24)
                )
            ),
            step(FFN),
        ),
    },
    "relative bias with a class token, norm after the sub-layer": {
        "steps": (
            step(
                attention(bias=RelativeBiasSpec(grid=GRID, prefix=1, prefix_rows=True)),
                norm=None,
                post_norm=norm(),
            ),
            step(FFN),
        ),
    },
    "relative bias without a class token, parallel attention and FFN": {
        "steps": (step(attention(bias=RelativeBiasSpec(grid=GRID, prefix=1)), FFN),),
        "pool": PoolSpec(kind="avgmax"),
        "pool_norm": norm(),
    },
    "differential": {
        "steps": (
            step(
                attention(
                    differential=DifferentialSpec(start=0.2, width=8), head_norm=norm(6, "rms")
                )
            ),
            step(FfnSpec(hidden=32, act="gelu_tanh")),
        ),
    },
    "attention pooling, two convolutions in the stem, norm on patches": {
        "stem": StemSpec(
            patch=(4, 4), before=(ConvSpec(channels=5, kernel=(3, 3), padding=(1, 1), act="relu"),)
        ),
        "patch_norm": norm(),
        "steps": (step(PLAIN), step(FfnSpec(hidden=32, act="quick_gelu"))),
        "pool": PoolSpec(kind="attention", attention=PLAIN, norm=norm(), ffn=FFN, width=WIDTH),
    },
    "refining pool, features without a classifier": {
        "steps": (step(PLAIN),),
        "pool": PoolSpec(kind="token", refine=RefineSpec(channels=(8, 8, 8), scale=0.3)),
        "head": None,
    },
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_onnx_equals_torch(kind: str) -> None:
    options: dict[str, Any] = {
        "stem": StemSpec(patch=(4, 4)),
        "head": HeadSpec(classes=5),
        "norm": norm(),
    } | NETWORKS[kind]
    architecture = Architecture(image=(3, 8, 12), embed=WIDTH, prefix=1, **options)
    torch.manual_seed(0)
    model = CompactModel(architecture).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.2 * torch.randn_like(tensor))
    # Unshared masks with different columns per head need gathers and scatters on the stream, and
    # tables and norms per head.
    small = compact(
        model, StructuredMask.random(model, 0.6, "unshared", per_head=True), last_queries=True
    )
    images = torch.randn(2, 3, 8, 12)
    program = torch.onnx.export(small, (images,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        wanted = small(images)
    assert relative_error(torch.from_numpy(np.asarray(found)), wanted) < 1e-4
