"""Passes over graphs that torch exported: each is exact and reports whether it changed anything."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from vitrim.export.parity import model_outputs, relative_error
from vitrim.export.passes import PASSES, steps
from vitrim.export.sessions import open_session

IMAGES = np.random.default_rng(0).standard_normal((3, 1, 16, 16), dtype=np.float32)


def vit(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    options["init_values"] = 0.1
    made = timm.create_model("vit_tiny_patch16_224", **{**options, **overrides}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def traced(model: nn.Module, *, opset: int, dynamo: bool, fused: bool = True) -> onnx.ModelProto:
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    image = torch.zeros(1, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(
                model, (image,), dynamo=True, opset_version=opset, verbose=False
            )
            assert program is not None
            return program.model_proto
        import io

        stream = io.BytesIO()
        # The old exporter writes to a stream.
        torch.onnx.export(model, (image,), stream, dynamo=False, opset_version=opset)  # type: ignore[arg-type]
    return onnx.load_from_string(stream.getvalue())


GRAPHS: dict[str, dict[str, Any]] = {
    "dynamo, opset 18": {"opset": 18, "dynamo": True},
    "dynamo, opset 20, plain attention": {"opset": 20, "dynamo": True, "fused": False},
    "tracer, opset 17": {"opset": 17, "dynamo": False},
}


@pytest.fixture(scope="module", params=GRAPHS)
def graph(request: pytest.FixtureRequest) -> tuple[nn.Module, onnx.ModelProto]:
    model = vit()
    return model, traced(model, **GRAPHS[request.param])


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_every_pass_keeps_the_outputs_of_a_timm_graph(
    graph: tuple[nn.Module, onnx.ModelProto],
) -> None:
    model, given = graph
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    before = given.SerializeToString()
    done, last = [], given
    for step in steps(given):
        onnx.checker.check_model(step.after)
        assert relative_error(expected, model_outputs(step.after, IMAGES)).max() < 5e-6, step.name
        done.append(step.name)
        last = step.after
    assert given.SerializeToString() == before
    assert {"split-qkv", "fold-factors", "fold-attention-biases", "first-tokens"} <= set(done)
    found = kinds(last)
    assert not {"Erf", "Split", "Squeeze", "Identity", "Dropout", "Constant", "Shape"} & set(found)
    assert found.count("Gelu") == 2
    # LayerScale and the scale of attention are folded into the weights.
    assert "Mul" not in found
    assert len(found) < len(given.graph.node)


def test_passes_are_idempotent(graph: tuple[nn.Module, onnx.ModelProto]) -> None:
    last = graph[1]
    for step in steps(last):
        last = step.after
    for change in PASSES:
        result = change(last)
        assert not result.modified, change.name
        assert result.model is last


def test_each_pass_states_what_it_requires_and_ensures() -> None:
    names = [change.name for change in PASSES]
    assert len(set(names)) == len(names) == 9
    assert all(change.requires and change.ensures for change in PASSES)


def test_the_last_block_of_a_class_token_is_computed_for_one_row() -> None:
    given = traced(vit(), opset=20, dynamo=True, fused=False)
    last = given
    for step in steps(given):
        last = step.after

    def rows(model: onnx.ModelProto) -> list[int]:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        shapes = {
            value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
            for value in inferred.graph.value_info
        }
        return [shapes[node.output[0]][1] for node in model.graph.node if node.op_type == "Gelu"]

    assert rows(last) == [17, 1]


def test_a_mean_over_tokens_needs_them_all() -> None:
    model = vit(global_pool="avg", class_token=False)
    given = traced(model, opset=20, dynamo=True)
    names = [step.name for step in steps(given)]
    assert "split-qkv" in names
    assert "first-tokens" not in names


Array = np.ndarray[Any, Any] | np.generic


def made(
    nodes: list[onnx.NodeProto], constants: Mapping[str, Array], shape: list[int], opset: int = 20
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def change(name: str) -> Any:
    return next(entry for entry in PASSES if entry.name == name)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    output: np.ndarray = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    return output


F = np.float32


@pytest.mark.parametrize("order", ["(x e) half", "(x half) e", "x (half e)"])
def test_gelu_is_recognised_in_every_order_of_its_factors(order: str) -> None:
    head = [
        helper.make_node("Mul", ["x", "root"], ["z"]),
        helper.make_node("Erf", ["z"], ["erf"]),
        helper.make_node("Add", ["one", "erf"], ["e"]),
    ]
    tails = {
        "(x e) half": [
            helper.make_node("Mul", ["x", "e"], ["p"]),
            helper.make_node("Mul", ["p", "half"], ["y"]),
        ],
        "(x half) e": [
            helper.make_node("Mul", ["half", "x"], ["p"]),
            helper.make_node("Mul", ["e", "p"], ["y"]),
        ],
        "x (half e)": [
            helper.make_node("Mul", ["half", "e"], ["p"]),
            helper.make_node("Mul", ["p", "x"], ["y"]),
        ],
    }
    constants = {"root": F(0.5**0.5), "one": F(1), "half": F(0.5)}
    model = made(head + tails[order], constants, [2, 7])
    result = change("erf-to-gelu")(model)
    assert kinds(result.model) == ["Gelu"]
    x = np.random.default_rng(0).standard_normal((2, 7), dtype=F)
    np.testing.assert_allclose(run(result.model, x), run(model, x), atol=1e-6)
    constants["half"] = F(0.4)
    assert not change("erf-to-gelu")(made(head + tails[order], constants, [2, 7])).modified


def test_a_value_with_another_reader_is_unchanged() -> None:
    weight = np.random.default_rng(0).standard_normal((7, 6)).astype(F)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Mul", ["p", "two"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    model = made(nodes, {"w": weight, "two": F(2)}, [2, 7])
    assert not change("fold-factors")(model).modified
    nodes[2] = helper.make_node("Relu", ["q"], ["y"])
    model = made(nodes, {"w": weight, "two": F(2)}, [2, 7])
    result = change("fold-factors")(model)
    assert kinds(result.model) == ["MatMul", "Relu"]
    x = np.random.default_rng(1).standard_normal((2, 7), dtype=F)
    np.testing.assert_allclose(run(result.model, x), run(model, x), rtol=1e-6)


def attention(moved: bool) -> onnx.ModelProto:
    """One head over three tokens; with `moved`, the key bias differs between tokens."""
    random = np.random.default_rng(0)
    constants = {f"w{part}": random.standard_normal((4, 4)).astype(F) for part in "qkvo"}
    constants |= {f"b{part}": random.standard_normal(4).astype(F) for part in "qkvo"}
    constants["sizes"] = np.array([1, 4, 3] if moved else [1, 3, 4], np.int64)
    nodes = []
    for part in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{part}"], [f"{part}p"]),
            helper.make_node("Add", [f"{part}p", f"b{part}"], [part]),
        ]
    keys = (
        [helper.make_node("Reshape", ["k", "sizes"], ["kt"])]
        if moved
        else [helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1])]
    )
    nodes += keys
    nodes += [
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mix"]),
        helper.make_node("MatMul", ["mix", "wo"], ["op"]),
        helper.make_node("Add", ["op", "bo"], ["y"]),
    ]
    return made(nodes, constants, [1, 3, 4])


def test_a_key_bias_is_dropped_only_where_it_is_the_same_for_every_token() -> None:
    x = np.random.default_rng(1).standard_normal((1, 3, 4), dtype=F)
    for moved, left in ((False, 2), (True, 3)):
        model = attention(moved)
        result = change("fold-attention-biases")(model)
        assert kinds(result.model).count("Add") == left
        np.testing.assert_allclose(run(result.model, x), run(model, x), atol=1e-5)


def test_two_constant_sums_become_one_and_a_matrix_product_includes_its_bias() -> None:
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((7, 6)).astype(F),
        "a": random.standard_normal(6).astype(F),
        "b": random.standard_normal(6).astype(F),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["a", "p"], ["q"]),
        helper.make_node("Add", ["q", "b"], ["y"]),
    ]
    model = made(nodes, constants, [2, 7])
    last = model
    while (result := change("fold-biases")(last)).modified:
        last = result.model
    assert kinds(last) == ["Gemm"]
    x = random.standard_normal((2, 7)).astype(F)
    np.testing.assert_allclose(run(last, x), run(model, x), atol=1e-5)


def test_dropout_in_training_mode_stays() -> None:
    constants: dict[str, Array] = {"ratio": F(0.5), "on": np.array(True), "off": np.array(False)}
    for mode, left in (("off", ["Relu"]), ("on", ["Dropout", "Relu"])):
        nodes = [
            helper.make_node("Dropout", ["x", "ratio", mode], ["d"]),
            helper.make_node("Relu", ["d"], ["y"]),
        ]
        assert kinds(change("drop-identity")(made(nodes, constants, [2, 7])).model) == left
