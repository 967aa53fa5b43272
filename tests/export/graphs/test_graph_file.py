"""Reading .onnx files: what is sorted and inlined, and the reason for what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import FLATTEN, HIDDEN, PRODUCT, classifier, tensor, value, written
from vitrim.core.errors import InputError
from vitrim.export.graphs import graph_file
from vitrim.export.graphs.graph_file import read_graph
from vitrim.export.graphs.model_proto import open_graph

IMAGES = np.random.default_rng(5).standard_normal((2, 3, 16, 16), dtype=np.float32)


def outputs(model: onnx.ModelProto) -> np.ndarray:
    found: np.ndarray = open_graph(model).run(None, {"x": IMAGES})[0]
    return found


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_graph(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def doubled(name: str = "Twice", body: str = "Add") -> onnx.FunctionProto:
    inputs = ["a", "a"] if body == "Add" else ["a"]
    nodes = [
        helper.make_node(body, inputs, ["s"], "inner"),
        helper.make_node("Add", ["a", "s"], ["b"], "outer"),
    ]
    return helper.make_function("local", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])


def branches(condition: onnx.NodeProto, inner: str = "Identity") -> list[onnx.NodeProto]:
    """Nodes that end with an If of two branches over the logits."""
    then, otherwise = (
        helper.make_graph(
            [helper.make_node(kind, ["z"], [name], f"{name}.{kind}")],
            name,
            [],
            [value(name, "n", 4)],
        )
        for name, kind in (("yes", inner), ("no", "Neg"))
    )
    branch = helper.make_node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=otherwise)
    return [FLATTEN, HIDDEN, condition, branch]


ALWAYS = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True), "c"))


def test_nodes_out_of_order_are_sorted_and_the_outputs_stay(tmp_path: Path) -> None:
    model = classifier()
    unsorted = classifier([PRODUCT, FLATTEN])
    read = read_graph(written(unsorted, tmp_path))
    assert [node.name for node in read.graph.node] == ["flatten", "product"]
    np.testing.assert_array_equal(outputs(read), outputs(model))


def test_local_functions_are_inlined_also_where_their_own_nodes_are_unsorted(
    tmp_path: Path,
) -> None:
    function = doubled()
    function.node.reverse()
    call = helper.make_node("Twice", ["z"], ["y"], "call", domain="local")
    model = classifier([FLATTEN, HIDDEN, call], functions=[function])
    read = read_graph(written(model, tmp_path))
    assert not read.functions
    assert {entry.domain for entry in read.opset_import} == {""}
    np.testing.assert_allclose(outputs(read), 3 * outputs(classifier()), rtol=1e-5)


def test_a_branch_on_a_constant_is_resolved_and_another_one_is_refused_by_name(
    tmp_path: Path,
) -> None:
    model = classifier(branches(ALWAYS))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    read = read_graph(written(model, tmp_path))
    assert "If" not in {node.op_type for node in read.graph.node}
    np.testing.assert_array_equal(outputs(read), outputs(classifier()))
    computed = helper.make_node("Cast", ["total"], ["c"], to=TensorProto.BOOL)
    total = helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0)
    nodes = branches(computed)
    model = classifier([*nodes[:2], total, *nodes[2:]])
    assert "node 'branch' (If) holds inner graphs" in refusal(written(model, tmp_path))


def random_nodes() -> dict[str, onnx.ModelProto]:
    noise = helper.make_node("RandomNormalLike", ["z"], ["r"], "noise")
    mask = helper.make_node("Bernoulli", ["z"], ["r"], "noise")
    uniform = helper.make_node("RandomUniform", [], ["r"], "noise", shape=[1, 4], seed=3.0)
    add = helper.make_node("Add", ["z", "r"], ["y"])
    training = numpy_helper.from_array(np.array(True), "t")
    call = helper.make_node("Noisy", ["z"], ["y"], "call", domain="local")
    loop = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("RandomUniformLike", ["v"], ["w2"], "noise"),
        ],
        "body",
        [
            value("i", kind=TensorProto.INT64),
            value("go", kind=TensorProto.BOOL),
            value("v", "n", 4),
        ],
        [value("on", kind=TensorProto.BOOL), value("w2", "n", 4)],
    )
    count = numpy_helper.from_array(np.array(2), "count")
    return {
        "like": classifier([FLATTEN, HIDDEN, noise, add]),
        "bernoulli": classifier([FLATTEN, HIDDEN, mask, add]),
        "seeded": classifier([FLATTEN, HIDDEN, uniform, add]),
        "dropout": classifier(
            [FLATTEN, HIDDEN, helper.make_node("Dropout", ["z", "", "t"], ["y"], "noise")],
            weights=[tensor("w", 768, 4), training],
        ),
        "function": classifier(
            [FLATTEN, HIDDEN, call], functions=[noisy_function("RandomNormalLike")]
        ),
        "branch": classifier(branches(ALWAYS, "RandomNormalLike")),
        "loop": classifier(
            [
                FLATTEN,
                HIDDEN,
                helper.make_node("Loop", ["count", "", "z"], ["y"], "loop", body=loop),
            ],
            weights=[tensor("w", 768, 4), count],
        ),
    }


def noisy_function(kind: str) -> onnx.FunctionProto:
    function = doubled("Noisy", kind)
    function.node[0].name = "noise"
    return function


@pytest.mark.parametrize("kind", list(random_nodes()))
def test_random_operators_are_refused_by_the_nodes_name_wherever_they_are(
    tmp_path: Path, kind: str
) -> None:
    message = refusal(written(random_nodes()[kind], tmp_path))
    name = "yes.RandomNormalLike" if kind == "branch" else "noise"
    assert f"node '{name}' (" in message
    assert "draws random numbers" in message
    place = {"function": "in function Noisy", "branch": "in If 'branch'", "loop": "in Loop 'loop'"}
    assert place.get(kind, "") in message


def test_random_nodes_that_no_output_reads_and_dropout_outside_of_training_are_accepted(
    tmp_path: Path,
) -> None:
    unread = helper.make_node("RandomNormalLike", ["y"], ["r"], "unread")
    read_graph(written(classifier([FLATTEN, PRODUCT, unread]), tmp_path))
    idle = helper.make_node("Dropout", ["z"], ["y"], "idle")
    read_graph(written(classifier([FLATTEN, HIDDEN, idle]), tmp_path))
    never = [
        tensor("w", 768, 4),
        numpy_helper.from_array(np.array(0.0, np.float32), "ratio"),
        numpy_helper.from_array(np.array(True), "t"),
    ]
    zero = helper.make_node("Dropout", ["z", "ratio", "t"], ["y"], "zero")
    read_graph(written(classifier([FLATTEN, HIDDEN, zero], weights=never), tmp_path))


def test_batch_norm_in_training_mode_is_refused_by_its_name(tmp_path: Path) -> None:
    names = ["scale", "bias", "mean", "variance"]
    norm = helper.make_node(
        "BatchNormalization", ["x", *names], ["n", "m", "v"], "norm", training_mode=1
    )
    flat = helper.make_node("Flatten", ["n"], ["f"])
    weights = [tensor("w", 768, 4), *(tensor(name, 3) for name in names)]
    model = classifier([norm, flat, PRODUCT], weights=weights)
    assert "node 'norm' (BatchNormalization) is in training mode" in refusal(
        written(model, tmp_path)
    )


def without_weights(model: onnx.ModelProto) -> None:
    del model.graph.initializer[:]


def in_a_circle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"
    model.graph.node.append(helper.make_node("Identity", ["y"], ["other"]))


def without_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def with_short_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"short"


def with_unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "MatMulX"


def of_a_later_format(model: onnx.ModelProto) -> None:
    model.ir_version = 99


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_weights, r"node 'product' \(MatMul\) reads 'w', which is missing"),
        (in_a_circle, r"reads 'y', which is made of its own output"),
        (without_opset, "names no version of ONNX's operators"),
        (with_short_weights, "raw_data size"),
        (with_unknown_operator, "MatMulX"),
        (of_a_later_format, "ir_version 99"),
    ],
)
def test_invalid_models_are_refused_with_the_reason(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    model = classifier()
    change(model)
    with pytest.raises(InputError, match=f"not a valid ONNX model .*{reason}"):
        read_graph(written(model, tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no graph with nodes"),
        (b"\x08\x0a not a model", "not a valid ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
    ids=["empty", "bytes", "pointer"],
)
def test_files_that_are_no_models_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_a_file_that_ends_early_is_refused_at_every_length(tmp_path: Path) -> None:
    content = classifier().SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(0, len(content), len(content) // 12):
        path.write_bytes(content[:length])
        refusal(path)


def test_a_file_larger_than_a_protobuf_message_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(classifier(), tmp_path)
    monkeypatch.setattr(graph_file, "MAX_MESSAGE_BYTES", 100)
    assert "save its weights as external data" in refusal(path)


def test_earlier_formats_and_the_runtimes_own_operators_are_read(tmp_path: Path) -> None:
    early = classifier(opset=11)
    early.ir_version = 3
    early.graph.input.append(value("w", 768, 4))
    np.testing.assert_allclose(
        outputs(read_graph(written(early, tmp_path))), outputs(classifier()), atol=1e-4
    )
    fused = helper.make_node("FusedMatMul", ["f", "w"], ["y"], domain="com.microsoft")
    read_graph(written(classifier([FLATTEN, fused]), tmp_path))


# ---- weights in other files ----------------------------------------------------------------------


def external(folder: Path, **entries: str) -> Path:
    """A model whose weights are in another file, which is not written."""
    model = classifier()
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, text in entries.items():
        weights.external_data.add(key=key, value=text)
    return written(model, folder)


def test_large_external_weights_are_read_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_file, "LARGE_BYTES", 100)
    weights = classifier().graph.initializer[0].raw_data
    (tmp_path / "weights.bin").write_bytes(b"1234" + weights)
    path = external(tmp_path, location="weights.bin", offset="4", length=str(len(weights)))
    np.testing.assert_array_equal(outputs(read_graph(path)), outputs(classifier()))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../secret.bin", "outside of its folder"),
        ("link.bin", "outside of its folder"),
        ("/secret.bin", "outside of its folder"),
        ("", "outside of its folder"),
        ("absent.bin", "a file that is missing"),
        ("short.bin", "has 10 bytes and not 12288"),
    ],
)
def test_external_weights_outside_of_the_folder_or_missing_are_refused(
    tmp_path: Path, location: str, reason: str
) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(768 * 16))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "short.bin").write_bytes(bytes(10))
    os.symlink("../secret.bin", inside / "link.bin")
    message = refusal(external(inside, location=location, length=str(768 * 16)))
    assert reason in message
    assert "weights 'w'" in message


def test_weights_of_a_download_cache_are_read_through_its_links(tmp_path: Path) -> None:
    contents, shown = tmp_path / "contents", tmp_path / "shown"
    contents.mkdir()
    shown.mkdir()
    (contents / "1234").write_bytes(classifier().graph.initializer[0].raw_data)
    external(contents, location="model.onnx.data").rename(contents / "5678")
    (shown / "model.onnx").symlink_to("../contents/5678")
    (shown / "model.onnx.data").symlink_to("../contents/1234")
    np.testing.assert_array_equal(outputs(read_graph(shown / "model.onnx")), outputs(classifier()))
