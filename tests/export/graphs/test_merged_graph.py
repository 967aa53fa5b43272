"""ToMe as an ONNX graph: exact matrix products, equal choices and outputs in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import vitrim
from tiny_models import relative_error, tiny_vit
from torch import Tensor, nn
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.merging.merged import MergedModel, MergingOptions, merged_tokens
from vitrim.export.graphs.torch_graph import simplify, torch_to_onnx

SORTS_AND_INDICES = {
    "TopK",
    "GatherElements",
    "GatherND",
    "ScatterElements",
    "ScatterND",
    "NonZero",
    "CumSum",
}


class _WithPlaces(nn.Module):
    """Logits, and the places of the tokens in every merge."""

    def __init__(self, merged: MergedModel) -> None:
        super().__init__()
        self.merged = merged

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        *_, (x, sizes, _) = steps = list(self.merged.trace(images))
        places = [places for _, _, places in steps if places is not None]
        return self.merged.classify(x, sizes), *places


def exported(merged: MergedModel, batch: Any) -> onnx.ModelProto:
    names = ["logits", *(f"places.{n}" for n, count in enumerate(merged.removed) if count)]
    shape = merged.model.architecture.image
    module = _WithPlaces(merged).eval()
    return simplify(torch_to_onnx(module, shape, batch=batch, opset=20, output_names=names))[0]


def run(graph: onnx.ModelProto, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return cast("list[np.ndarray]", session.run(None, {"images": images.numpy()}))


def pruned(seed: int = 0) -> CompactModel:
    """Two blocks of unequal widths on 5 x 5 patches."""
    model = vitrim.lift(tiny_vit(img_size=40, seed=seed)).eval()
    mask = vitrim.StructuredMask.random(model, {"embed": 0.7, "qk": 0.6, "ffn": 0.5}, seed=seed)
    return vitrim.compact(model, mask).eval()


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("method", ["tome", "ppt"])
def test_onnx_runtime_chooses_and_computes_the_same(method: Any, batch: int) -> None:
    merged = merged_tokens(pruned(), method, 5, blocks=[0, 1])
    graph = exported(merged, batch)
    for seed in range(4):
        torch.manual_seed(seed)
        images = torch.randn(batch, 3, 40, 40)
        with torch.no_grad():
            wanted, *chosen = _WithPlaces(merged)(images)
        logits, *places = run(graph, images)
        assert [each.tolist() for each in places] == [each.tolist() for each in chosen]
        assert relative_error(torch.from_numpy(logits), wanted) < 1e-5


@pytest.mark.parametrize("method", ["tome", "ppt"])
def test_the_graph_has_no_sort_and_no_index_of_tokens(method: Any) -> None:
    merged = merged_tokens(pruned(), method, 5, blocks=[0, 1])
    graph = exported(merged, 1)
    counts = Counter(node.op_type for node in graph.graph.node)
    assert not SORTS_AND_INDICES & set(counts)
    # One Gather reads the class token.
    assert counts["Gather"] <= 1


def test_a_batch_of_any_size() -> None:
    merged = merged_tokens(pruned(1), "ppt", 4, options=MergingOptions(threshold=1e-5))
    graph = exported(merged, "dynamic")
    for count in (1, 3):
        images = torch.randn(count, 3, 40, 40)
        with torch.no_grad():
            wanted = merged(images)
        assert relative_error(torch.from_numpy(run(graph, images)[0]), wanted) < 1e-5


def test_an_artifact_of_a_merged_network_is_verified(tmp_path: Path) -> None:
    merged = merged_tokens(pruned(), "tome", 5)
    artifact = vitrim.export(merged, tmp_path / "artifact", image=(3, 40, 40))
    assert artifact.manifest.form == "plain"
    assert all(each.max_relative_error < 1e-5 for each in artifact.manifest.parity)
