"""Soft splits of T2T-ViT in the graph forms, and what reduced precision spares of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import vitrim
from graph_forms import error_of
from processors import HOST_BITS
from t2t_vit import T2TViT
from tiny_models import add_noise
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.parity import model_outputs, relative_error
from vitrim.export.quantization import quantize

KINDS = ("performer", "transformer")
# What pnnx converts to ncnn.
NCNN = Form(rows="batch", norm="layer", stream="dense", operators="pnnx")


def dense(kind: Any, img_size: int) -> CompactModel:
    torch.manual_seed(0)
    shape: Any = {"token_dim": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "classes": 5}
    return vitrim.lift(add_noise(T2TViT(kind, img_size=img_size, **shape)))


@cache
def pruned(kind: str) -> CompactModel:
    model = dense(kind, img_size=32)
    return vitrim.compact(model, vitrim.StructuredMask.random(model, 0.6, "unshared", seed=1))


@pytest.mark.parametrize("form", [*FORMS, NCNN], ids=lambda form: form.name)
@pytest.mark.parametrize("kind", KINDS)
def test_each_form_matches_the_network(kind: str, form: Form) -> None:
    assert error_of(pruned(kind), write_network(pruned(kind), form)) < 1e-5


@pytest.mark.parametrize("form", [FORMS[0], Form(rows="batch"), NCNN], ids=lambda form: form.name)
@pytest.mark.parametrize("kind", KINDS)
def test_forms_select_the_tokens_that_a_mask_keeps(kind: str, form: Form) -> None:
    model = dense(kind, img_size=64)
    kept: Any = {"token": 0.4, "ffn": 0.5, "embed": 0.7}
    small = vitrim.compact(model, vitrim.StructuredMask.random(model, kept, seed=5)).eval()
    assert small.architecture.order is not None
    images = torch.randn(2, 3, 64, 64).numpy()
    assert error_of(small, write_network(small, form), images) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_batch_forms_accept_any_batch(kind: str) -> None:
    graph = write_network(pruned(kind), Form(rows="batch"), batch="batch")
    assert error_of(pruned(kind), graph, batch="dynamic") < 1e-5


def nodes_before_patches(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.name.startswith("before.")]


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_leave_the_stem_in_float(kind: str) -> None:
    dynamic = write_network(pruned(kind), FORMS[0], linears="int8", weight_bits=HOST_BITS)
    assert any(node.op_type == "DynamicQuantizeMatMul" for node in dynamic.graph.node)
    float_graph = write_network(pruned(kind), FORMS[0], linears="product")
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    graphs = [
        dynamic,
        quantize.int8_static(
            float_graph, images, weight_bits=HOST_BITS, also=("attention", "norm")
        ),
        quantize.weights_only(float_graph, 8),
        quantize.weights_only(float_graph, 4),
    ]
    kinds = {node.op_type for node in nodes_before_patches(float_graph)}
    for graph in graphs:
        before = nodes_before_patches(graph)
        assert before
        # Where a node of the float graph is a Gemm, a product and a sum stand for it.
        assert {node.op_type for node in before} <= kinds | {"Gemm"}
    assert max(error_of(pruned(kind), graph) for graph in graphs[:3]) < 0.1


def test_half_precision_leaves_the_linear_attention_in_single_precision() -> None:
    torch.manual_seed(0)
    model: Any = T2TViT("performer", img_size=32, token_dim=8, embed_dim=24, depth=1, num_heads=3)
    with torch.no_grad():
        for part in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
            # Keys and queries of length 8, whose features exp(-32) underflow in half precision.
            part.kqv.bias[:16] = 8 / 8**0.5
    lifted = vitrim.lift(add_noise(model))
    graph = quantize.half(write_network(lifted, FORMS[0]))
    casts = [node for node in nodes_before_patches(graph) if node.op_type == "Cast"]
    assert len(casts) == 2 * 4
    assert error_of(lifted, graph) < 0.02
    # This runtime computes half precision in single precision; another one does not.
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for node in nodes_before_patches(graph):
        single = ".linear_attention" in node.name
        wanted = onnx.TensorProto.FLOAT if single else onnx.TensorProto.FLOAT16
        assert {types[name] for name in node.input if name in types} <= {
            wanted,
            onnx.TensorProto.INT64,
        }


def test_a_network_without_linear_attention_gets_no_casts_in_half_precision() -> None:
    graph = quantize.half(write_network(pruned("transformer"), FORMS[0]))
    casts = [node for node in graph.graph.node if node.op_type == "Cast"]
    assert {tuple(cast.input) for cast in casts} == {("images",), ("graph_output_cast_0",)}
    assert error_of(pruned("transformer"), graph) < 0.02


def test_windows_are_copied_exactly() -> None:
    graph = write_network(pruned("performer"), FORMS[0])
    windows = next(node for node in graph.graph.node if node.name == "before.0.windows")
    del graph.graph.output[:]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(windows.output[0], onnx.TensorProto.FLOAT, None)
    )
    images = torch.randn(1, 3, 32, 32)
    found = model_outputs(graph, images.numpy())
    wanted = torch.nn.functional.unfold(images, 7, padding=2, stride=4)
    assert np.array_equal(np.asarray(found).reshape(147, -1), wanted[0].numpy())


def test_an_artifact_of_a_whole_t2t_vit_returns_the_outputs_of_the_model(tmp_path: Path) -> None:
    model = pruned("performer")
    artifact = vitrim.export(model, tmp_path / "artifact", target="host", runtime="onnxruntime")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images).numpy()
    assert float(relative_error(wanted, artifact.engine().infer(images.numpy())).max()) < 1e-5
