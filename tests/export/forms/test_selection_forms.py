"""Graph forms select tokens by content: TopK with a constant count, and one gather of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import vitrim
from graph_forms import NCNN, error_of, well_conditioned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processors import HOST_BITS
from random_networks import network, selecting_architectures
from selecting_models import POSITIONED, positioned_selection
from tiny_models import tiny_vit
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Choices
from vitrim.compress.tokens.select import SCORERS, SelectMethod, select_tokens
from vitrim.core.errors import UnsupportedModel
from vitrim.export.choices import outputs_and_choices
from vitrim.export.forms import FORMS, INT8_FORMS, STREAM_FORMS, Form, write_network
from vitrim.export.parity import relative_error
from vitrim.export.quantization.quantize import half, int8_static, weights_only
from vitrim.export.quantization.static_kernels import eight_bit_products

ALL_FORMS = [
    *FORMS,
    *STREAM_FORMS,
    *INT8_FORMS,
    Form(tile=4),
    Form(rows="batch", tile=8, last_queries=False),
    Form(rows="batch", attention="runtime", norm="layer", stem="matrix", last_keys=False),
]
BATCH_FORMS = [form for form in ALL_FORMS if form.rows == "batch"]
METHODS = sorted(SCORERS)
WIDTHS = {"embed": 0.6, "head": 0.6, "qk": 0.5, "v": 0.5, "ffn": 0.5}


def selecting(method: SelectMethod, *, widths: bool = False, **options: Any) -> CompactModel:
    """Three blocks on 16 patches and a class token, with a selection in two of them."""
    torch.manual_seed(1)
    dense = tiny_vit(img_size=32, depth=3)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = select_tokens(dense, method, **{"stages": [0, 1], "ratio": 0.6, **options})
    if widths:
        mask = vitrim.StructuredMask.random(model, WIDTHS, "unshared", seed=3)
        model = vitrim.compact(model, mask)
    return model.eval()


def noise(model: CompactModel, count: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(4)
    return rng.standard_normal((count, *model.architecture.image), dtype=np.float32)


def names_of(model: CompactModel) -> tuple[str, ...]:
    dynamic = [spec for spec in model.architecture.selects if spec.scorer != "random"]
    return tuple(f"{spec.name}/indices" for spec in dynamic)


def assert_equal_in(
    forms: Sequence[Form], model: CompactModel, batch: Any = 1, count: int = 3
) -> None:
    """Compare the graph of each form with the network, on so many images."""
    for form in forms:
        graph = write_network(model, form, batch="batch" if batch == "dynamic" else batch)
        assert error_of(model, graph, batch=batch, count=count) < 1e-5, form.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("widths", [False, True], ids=["tokens", "tokens and widths"])
def test_every_form_selects_tokens_as_the_network_does(method: SelectMethod, widths: bool) -> None:
    assert_equal_in(ALL_FORMS, selecting(method, widths=widths))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [7, "dynamic"])
def test_each_image_of_a_batch_has_its_own_tokens(method: SelectMethod, batch: Any) -> None:
    assert_equal_in(BATCH_FORMS[::2], selecting(method), batch, count=7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", [FORMS[0], Form(rows="batch", tile=8)], ids=lambda form: form.name)
def test_indices_are_the_choices_of_the_network(method: SelectMethod, form: Form) -> None:
    model, choices = selecting(method), Choices()
    images = noise(model, 7)
    with torch.no_grad():
        model(torch.from_numpy(images), choices)
    _, chosen = outputs_and_choices(write_network(model, form), names_of(model), images)
    if method == "random":
        assert chosen is None
        return
    assert chosen is not None
    for wanted, found in zip(choices.found, chosen, strict=True):
        assert found.dtype == np.int64
        assert np.array_equal(wanted.numpy(), found)


@pytest.mark.parametrize("kind", POSITIONED)
@pytest.mark.parametrize("method", ["column-attention", "dynamicvit", "random"])
def test_every_form_gathers_the_positions_of_the_tokens_that_stay(
    kind: str, method: SelectMethod
) -> None:
    assert_equal_in(ALL_FORMS, positioned_selection(kind, method))


@pytest.mark.parametrize("kind", POSITIONED)
@pytest.mark.parametrize("batch", [7, "dynamic"])
def test_each_image_of_a_batch_has_its_own_positions(kind: str, batch: Any) -> None:
    assert_equal_in(BATCH_FORMS, positioned_selection(kind), batch, count=7)


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
@pytest.mark.parametrize("batch", [1, 4])
def test_attentions_behind_a_selection_share_the_gathered_positions(kind: str, batch: int) -> None:
    # Three attentions; the last one computes the class token alone.
    model = positioned_selection(kind, "dynamicvit", stages=[0])
    for form in ALL_FORMS if batch == 1 else BATCH_FORMS:
        graph = write_network(model, form, batch=batch).graph
        gathers = [node for node in graph.node if node.name.startswith("select.positions")]
        gathers = [node for node in gathers if node.op_type.startswith("Gather")]
        assert {node.op_type for node in gathers} == {"Gather"}
        # Cosines and sines, of all rows and without padding; or offsets, and a table for each.
        assert len(gathers) <= (4 if kind == "rope" else 2 + 3), form.name
        for node in graph.node:
            assert node.op_type not in ("GatherElements", "ScatterElements", "Where")


def behind_stem(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes behind the stem whose values depend on the images."""
    values, found = {"images"}, []
    for node in graph.graph.node:
        if values & set(node.input):
            values |= set(node.output)
            found.append(node)
    return [node for node in found if not node.name.startswith("stem")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 4])
def test_one_gather_moves_tokens_and_no_attention_has_a_mask(
    method: SelectMethod, batch: int
) -> None:
    model = selecting(method)
    for form in ALL_FORMS if batch == 1 else BATCH_FORMS:
        nodes = behind_stem(write_network(model, form, batch=batch))
        moving = [node for node in nodes if node.op_type.startswith(("Gather", "Scatter"))]
        kind = "Gather" if batch == 1 or method == "random" else "GatherND"
        weights = [node for node in moving if node.name.endswith(".fused.weights")]
        assert len(weights) == (2 if method == "evit" else 0)
        kept = [node.name for node in moving if node not in weights]
        assert kept == ["select.0.kept", "select.1.kept"]
        assert {node.op_type for node in moving} == {kind}
        assert sum(node.op_type == "TopK" for node in nodes) == (0 if method == "random" else 4)
        for node in nodes:
            if node.op_type in ("Attention", "MultiHeadAttention"):
                assert len([value for value in node.input if value]) <= 4
            assert node.op_type not in ("GatherElements", "ScatterElements", "Where")


def test_of_equal_scores_the_first_tokens_are_kept() -> None:
    model = selecting("dynamicvit", stages=[1])
    with torch.no_grad():
        for parameter in model.selects[0].parameters():
            parameter.zero_()
    for form in (FORMS[0], Form(rows="batch")):
        graph = write_network(model, form)
        _, chosen = outputs_and_choices(graph, names_of(model), noise(model, 2))
        assert chosen is not None
        assert chosen[0].tolist() == [list(range(9))] * 2


def test_class_attention_computes_no_keys_of_its_own() -> None:
    model = selecting("class-attention", stages=[1])
    width = model.architecture.embed
    graph = onnx.shape_inference.infer_shapes(write_network(model, Form(norm="layer")))
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in graph.graph.value_info
    }
    scoring = [node for node in graph.graph.node if "token_scores" in node.name]
    assert scoring
    for node in scoring:
        # The transposed or normed stream is read; no product has as many rows and columns.
        if node.op_type in ("Gemm", "MatMul"):
            assert np.prod(shapes[node.output[0]]) < 17 * width, node.name


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form.name)
def test_column_attention_reads_the_maps_of_the_attention_itself(form: Form) -> None:
    model = selecting("column-attention", widths=True)
    graph = write_network(model, form, share_maps=True)
    assert error_of(model, graph) < 1e-5
    scoring = [node for node in graph.graph.node if "token_scores" in node.name]
    assert scoring
    assert not any(node.op_type == "Softmax" for node in scoring)
    makers = {name: node for node in graph.graph.node for name in node.output}
    for node in scoring:
        if node.op_type == "Gemm":
            assert "token_scores" in makers[node.input[0]].name, "a second projection"
    # Three attentions, of which those that score are products.
    attends = [node for node in graph.graph.node if "Attention" in node.op_type]
    softmaxes = [node for node in graph.graph.node if node.op_type == "Softmax"]
    assert len(attends) + len(softmaxes) == 3


def test_an_attention_that_drops_tokens_keeps_no_maps() -> None:
    architecture = selecting("column-attention", stages=[1]).architecture
    fewer = [
        tuple(branch.model_copy(update={"tokens": 15}) for branch in step) if number >= 2 else step
        for number, step in enumerate(architecture.steps)
    ]
    behind = [tuple(branch.model_copy(update={"tokens": None}) for branch in s) for s in fewer[4:]]
    dropping = architecture.model_copy(update={"steps": (*fewer[:4], *behind)})
    model = network(dropping, 1)
    for form in (FORMS[0], Form(rows="batch", tile=8)):
        graph = write_network(model, form, share_maps=True)
        images = noise(model, 3)
        found, chosen = outputs_and_choices(graph, names_of(model), images)
        assert chosen is not None
        with torch.no_grad():
            given_choices = Choices(given=[torch.from_numpy(rows) for rows in chosen])
            wanted = model(torch.from_numpy(images).double(), given_choices).numpy()
        assert relative_error(wanted, found).max() < 1e-5


@settings(max_examples=60)
@given(
    architecture=selecting_architectures(),
    form=st.sampled_from(ALL_FORMS),
    batch=st.sampled_from([1, 3]),
    seed=st.integers(0, 9),
    share_maps=st.booleans(),
)
def test_every_form_covers_every_architecture_that_selects_tokens(
    architecture: Any, form: Form, batch: int, seed: int, share_maps: bool
) -> None:
    assume(batch == 1 or form.rows == "batch")
    model = network(architecture, seed)
    assume(well_conditioned(model))
    graph = write_network(model, form, batch=batch, share_maps=share_maps)
    images = noise(model, 3)
    names = names_of(model)
    found, chosen = outputs_and_choices(graph, names, images, batch=batch)
    given_choices = Choices(given=all_choices(model, chosen, len(images)))
    with torch.no_grad():
        wanted = model(torch.from_numpy(images).double(), given_choices).numpy()
    assert relative_error(wanted, found).max() < 2e-4


def all_choices(model: CompactModel, chosen: Any, count: int) -> list[torch.Tensor]:
    """The choices of a graph, and those of selections that do not depend on the image."""
    own = Choices()
    with torch.no_grad():
        model(torch.zeros(count, *model.architecture.image).double(), own)
    dynamic = iter(chosen or ())
    return [
        places if spec.scorer == "random" else torch.from_numpy(next(dynamic))
        for spec, places in zip(model.architecture.selects, own.found, strict=True)
    ]


def test_forms_for_pnnx_refuse_selections() -> None:
    with pytest.raises(UnsupportedModel, match=r"select\.0: pnnx converts no TopK"):
        write_network(selecting("class-attention"), NCNN)


def scorers_are_float(graph: onnx.ModelProto) -> bool:
    """Whether the nodes of selections read weights of single precision and no rounded value."""
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    allowed = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    makers = {output: node.op_type for node in graph.graph.node for output in node.output}
    nodes = [node for node in graph.graph.node if "token_scores" in node.name]
    rounded = ("DequantizeLinear", "DynamicQuantizeMatMul", "MatMulNBits")
    return bool(nodes) and all(
        {types[name] for name in node.input if name in types} <= allowed
        and node.op_type not in rounded
        and all(makers.get(name) != "DequantizeLinear" for name in node.input)
        for node in nodes
    )


def precisions(model: CompactModel, form: Form) -> dict[str, onnx.ModelProto]:
    """A model in all reduced precisions but half."""
    whole = write_network(model, form, linears="product")
    static = int8_static(whole, noise(model, 8), weight_bits=HOST_BITS)
    return {
        "int8": write_network(model, form, linears="int8", weight_bits=HOST_BITS),
        "pairs": static,
        "int8-static": eight_bit_products(static)[0],
        "int8-weights": weights_only(whole, 8),
        "int4-weights": weights_only(whole, 4),
    }


@pytest.mark.parametrize("method", [name for name in METHODS if name != "random"])
@pytest.mark.parametrize("form", [FORMS[0], INT8_FORMS[2]], ids=lambda form: form.name)
def test_scores_stay_in_single_precision_in_eight_bits(method: SelectMethod, form: Form) -> None:
    model, images = selecting(method), noise(selecting(method), 7)
    for precision, graph in precisions(model, form).items():
        assert scorers_are_float(graph), precision
        found, chosen = outputs_and_choices(graph, names_of(model), images)
        assert chosen is not None
        with torch.no_grad():
            given_choices = Choices(given=[torch.from_numpy(rows) for rows in chosen])
            wanted = model(torch.from_numpy(images), given_choices).numpy()
        limit = 0.4 if precision == "int4-weights" else 0.1
        assert relative_error(wanted, found).max() < limit, precision


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_positions_of_scores_stay_in_single_precision(kind: str) -> None:
    # The second selection scores behind the first one. Rounding weighs more in sharp attentions.
    model = positioned_selection(kind, sharpness=1)
    form = Form(rows="batch", norm="layer", stem="matrix")
    images = noise(model, 7)
    graphs = precisions(model, form) | {"fp16": half(write_network(model, form))}
    for precision, graph in graphs.items():
        assert scorers_are_float(graph), precision
        found, chosen = outputs_and_choices(graph, names_of(model), images)
        assert chosen is not None
        with torch.no_grad():
            given_choices = Choices(given=[torch.from_numpy(rows) for rows in chosen])
            wanted = model(torch.from_numpy(images), given_choices).numpy()
        limit = {"int4-weights": 0.4, "fp16": 1e-2}.get(precision, 0.1)
        assert relative_error(wanted, found).max() < limit, precision


@pytest.mark.parametrize("method", [name for name in METHODS if name != "random"])
def test_scores_stay_in_single_precision_in_half_precision(method: SelectMethod) -> None:
    model = selecting(method)
    graph = half(write_network(model, Form(rows="batch", norm="layer", stem="matrix")))
    assert scorers_are_float(graph)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert types["blocks.2.ffn.fc1.weight"] == onnx.TensorProto.FLOAT16
    images = noise(model, 7)
    found, chosen = outputs_and_choices(graph, names_of(model), images)
    assert chosen is not None
    with torch.no_grad():
        given_choices = Choices(given=[torch.from_numpy(rows) for rows in chosen])
        wanted = model(torch.from_numpy(images), given_choices).numpy()
    assert relative_error(wanted, found).max() < 1e-2
