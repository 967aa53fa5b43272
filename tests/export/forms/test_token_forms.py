"""Graph forms drop tokens in prefix form: selected once in the stem, a Slice at each drop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import vitrim
from graph_forms import NCNN, error_of, well_conditioned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processors import HOST_BITS
from random_networks import GRID, architectures, network
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    least_tokens,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.named_outputs import output_specs
from vitrim.core.errors import InputError
from vitrim.export.forms import FORMS, INT8_FORMS, STREAM_FORMS, Form, write_network
from vitrim.export.forms.stem import FEW_PATCHES
from vitrim.export.parity import model_outputs, relative_error
from vitrim.export.quantization.quantize import half, int8_static, weights_only

TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "depth": 3,
    "embed_dim": 24,
    "num_heads": 3,
    "num_classes": 5,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "class token and mean": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "relative bias": ("beit_base_patch16_224", {}),
    "rope": ("eva02_tiny_patch14_224", {}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "parallel things": ("vit_tiny_patch16_224", {"block_fn": ParallelThingsBlock}),
    "parallel scaling": ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}),
}
ALL_FORMS = [
    *FORMS,
    *STREAM_FORMS,
    *INT8_FORMS,
    NCNN,
    Form(tile=4),
    Form(rows="batch", tile=8, last_queries=False),
    Form(rows="batch", attention="runtime", norm="layer", stem="matrix", last_keys=False),
]
NO_WIDTHS: Mapping[str, float] = {}
WIDTHS: Mapping[str, float] = {"embed": 0.6, "head": 0.7, "qk": 0.5, "v": 0.5, "ffn": 0.5}


def cut(
    kind: str = "class token", ratios: Mapping[str, float] = NO_WIDTHS, *, seed: int = 0
) -> CompactModel:
    """A tiny model of a kind with a random token mask, and widths where ratios are given."""
    torch.manual_seed(0)
    name, overrides = MODELS[kind]
    model = timm.create_model(name, **TINY, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mask = vitrim.StructuredMask.random(model, {"token": 0.4, **ratios}, seed=seed)
    compact: CompactModel = vitrim.compact(model, mask).eval()
    return compact


def dropping(model: CompactModel, site: str) -> CompactModel:
    """The same network with a mask that drops one patch at a site."""
    kept = torch.ones(model.architecture.tokens, dtype=torch.bool)
    kept[model.architecture.prefix + 2] = False
    mask = vitrim.StructuredMask.random(model, 1.0)
    mask = replace(mask, kept={**mask.kept, "token": {site: kept}})
    compact: CompactModel = vitrim.compact(model, mask).eval()
    return compact


def computed(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes whose values depend on the images."""
    values, found = {"images"}, []
    for node in graph.graph.node:
        if values & set(node.input):
            values |= set(node.output)
            found.append(node)
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("ratios", [NO_WIDTHS, WIDTHS], ids=["tokens", "tokens and widths"])
def test_every_form_drops_tokens_as_the_network_does(
    kind: str, ratios: Mapping[str, float]
) -> None:
    model = cut(kind, ratios)
    counts = model.architecture.step_tokens()
    assert model.architecture.tokens > counts[-1]
    for form in ALL_FORMS:
        assert error_of(model, write_network(model, form)) < 5e-5, form.name


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_behind_the_stem_gathers_and_each_drop_is_one_slice_of_the_stream(
    kind: str,
) -> None:
    model = cut(kind)
    for form in ALL_FORMS:
        nodes = computed(write_network(model, form))
        moved = [node for node in nodes if node.op_type.startswith(("Gather", "Scatter"))]
        assert [node.name for node in moved] == ([] if form is NCNN else ["stem.selected"])
        architecture = model.architecture
        counts = (architecture.tokens, *architecture.step_tokens(form.last_queries))
        drops = sum(before > after for before, after in pairwise(counts))
        kept = [node for node in nodes if node.name.endswith(".kept")]
        assert {node.op_type for node in kept} == {"Slice"}
        # In tiles, a drop inside of one tile moves nothing.
        assert len(kept) == drops if form.tile == 1 else len(kept) <= drops


@pytest.mark.parametrize("batch", [4, "dynamic"])
@pytest.mark.parametrize("kind", ["class token", "relative bias", "rope"])
def test_batches_drop_the_same_tokens(kind: str, batch: int | str) -> None:
    model = cut(kind, WIDTHS)
    for form in (form for form in ALL_FORMS if form.rows == "batch"):
        graph = write_network(model, form, batch="batch" if batch == "dynamic" else batch)
        assert error_of(model, graph, batch=batch, count=4) < 5e-5, form.name


def test_patches_that_are_never_embedded_are_not_multiplied() -> None:
    model = cut()
    patches = model.architecture.patches
    assert patches <= FEW_PATCHES * 16
    for form in ALL_FORMS:
        graph = onnx.shape_inference.infer_shapes(write_network(model, form))
        shapes = {
            value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
            for value in graph.graph.value_info
        }
        stem = next(node for node in graph.graph.node if node.name == "stem")
        if form is NCNN:
            # pnnx converts no product of pixel rows; it selects patches behind the convolution.
            assert stem.op_type == "Conv"
        else:
            assert stem.op_type in ("Gemm", "MatMul")
            assert shapes[stem.output[0]][-2:] == [patches, model.architecture.embed]


def test_a_convolution_stays_where_nearly_all_patches_are_embedded() -> None:
    model = dropping(vitrim.lift(timm.create_model("vit_tiny_patch16_224", **TINY)), "stem.out")
    assert model.architecture.patches == 15
    for form, kind in ((Form(), "Conv"), (Form(stem="matrix"), "Gemm")):
        graph = write_network(model, form)
        assert [node.op_type for node in graph.graph.node if node.name == "stem"] == [kind]
        assert error_of(model, graph) < 2e-5


def test_an_order_of_all_patches_leaves_a_convolution_unchanged() -> None:
    dense = vitrim.lift(timm.create_model("vit_tiny_patch16_224", **TINY))
    model = dropping(dense, dense.architecture.steps[0][0].name)
    assert sorted(model.architecture.order or ()) == list(range(16))
    assert model.architecture.step_tokens()[0] == 16
    for form in (Form(), Form(rows="batch", attention="fused-qkv"), NCNN, FORMS[0]):
        graph = write_network(model, form)
        kinds = [node.op_type for node in graph.graph.node if node.name == "stem"]
        assert kinds == ["Gemm" if form.stem == "matrix" else "Conv"]
        assert error_of(model, graph) < 2e-5


def test_only_few_queries_are_multiplied_without_keys() -> None:
    model = cut(seed=1)
    names = [node.name for node in write_network(model, FORMS[0]).graph.node]
    attentions = [
        branch for branch in model.architecture.branches if isinstance(branch.core, AttentionSpec)
    ]
    shorter = [branch.name for branch in attentions if branch.tokens is not None]
    assert f"{shorter[0]}.queries" in names
    assert f"{shorter[0]}.k" in names
    assert f"{attentions[-1].name}.queries" in names
    assert f"{attentions[-1].name}.k" not in names


@st.composite
def networks_that_drop_tokens(draw: Any) -> Architecture:
    """Any architecture with an order of some patches and fewer tokens at any step."""
    whole = draw(architectures())
    places = draw(st.permutations(range(GRID[0] * GRID[1])))
    order = tuple(places[: draw(st.integers(1, len(places)))])
    tokens = whole.prefix + len(order)
    least = least_tokens(whole)
    assume(tokens >= least)
    steps = []
    for step in whole.steps:
        count = draw(st.integers(least, tokens))
        steps.append(
            tuple(_dropping(branch, order, None if count == tokens else count) for branch in step)
        )
        tokens = count
    changed = whole.model_copy(update={"order": order, "steps": tuple(steps)})
    return Architecture.model_validate(changed.model_dump(by_alias=True))


def _dropping(branch: BranchSpec, order: tuple[int, ...], count: int | None) -> BranchSpec:
    core = branch.core
    if isinstance(core, AttentionSpec):
        rope, bias = core.rope, core.bias
        if rope is not None:
            rope = rope.model_copy(update={"tokens": len(order)})
        if bias is not None:
            bias = bias.model_copy(update={"order": order})
        core = core.model_copy(update={"rope": rope, "bias": bias})
    return branch.model_copy(update={"core": core, "tokens": count})


@settings(max_examples=60)
@given(
    architecture=networks_that_drop_tokens(),
    form=st.sampled_from(ALL_FORMS),
    seed=st.integers(0, 9),
)
def test_every_form_covers_every_architecture_that_drops_tokens(
    architecture: Architecture, form: Form, seed: int
) -> None:
    model = network(architecture, seed)
    assume(well_conditioned(model))
    assert error_of(model, write_network(model, form)) < 2e-4


@settings(max_examples=10)
@given(
    kind=st.sampled_from(list(MODELS)),
    ratios=st.fixed_dictionaries(
        {
            name: st.sampled_from([0.3, 0.6, 1.0])
            for name in ("token", "embed", "head", "qk", "v", "ffn", "block")
        }
    ),
    sharing=st.sampled_from(["residual", "full", "unshared"]),
    seed=st.integers(0, 1000),
)
def test_the_best_form_matches_any_mask_of_tokens_and_widths(
    kind: str, ratios: dict[str, float], sharing: Any, seed: int
) -> None:
    torch.manual_seed(seed % 3)
    name, overrides = MODELS[kind]
    dense = vitrim.lift(timm.create_model(name, **TINY, **overrides).eval())
    mask = vitrim.StructuredMask.random(dense, ratios, sharing=sharing, seed=seed)
    compact = vitrim.compact(dense, mask).eval()
    for opset, form in ((20, Form(stem="matrix")), (23, FORMS[0])):
        assert error_of(compact, write_network(compact, form, opset=opset)) < 1e-4


@pytest.mark.parametrize("kind", ["class token", "mean", "rope"])
def test_eight_bits_at_run_time_drop_the_same_tokens(kind: str) -> None:
    model = cut(kind)
    for form in (FORMS[0], *INT8_FORMS):
        graph = write_network(model, form, linears="int8", weight_bits=HOST_BITS)
        assert 1e-6 < error_of(model, graph) < 0.1, form.name


def test_other_precisions_drop_the_same_tokens() -> None:
    model = cut()
    whole = write_network(model, Form(rows="batch", norm="layer", stem="matrix"), linears="product")
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16), dtype=np.float32)
    assert error_of(model, half(whole)) < 1e-2
    assert error_of(model, weights_only(whole, 8)) < 0.1
    pairs = int8_static(whole, images, weight_bits=HOST_BITS, symmetric=True)
    assert error_of(model, pairs) < 0.2


def test_static_ranges_are_those_after_the_drop() -> None:
    model = cut()
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16), dtype=np.float32)
    unused = images.copy()
    for place in set(range(16)) - set(model.architecture.order or ()):
        row, column = 4 * (place // 4), 4 * (place % 4)
        unused[:, :, row : row + 4, column : column + 4] = 1e4
    for form in (FORMS[0], INT8_FORMS[0]):
        whole = write_network(model, form, linears="product")
        made = [
            int8_static(whole, given, weight_bits=HOST_BITS, also=("patch",))
            for given in (images, unused)
        ]
        assert made[0] == made[1]
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        assert relative_error(expected, model_outputs(made[0], images)).max() < 0.1


def test_features_are_exported_and_outputs_on_the_grid_are_refused() -> None:
    model = cut()
    outputs = output_specs(model.architecture, ["logits", "features"])
    images = torch.randn(2, 3, 16, 16)
    found = model_outputs(write_network(model, FORMS[0], outputs=outputs), images.numpy())
    with torch.no_grad():
        expected = torch.cat(
            [model(images), model.forward_head(model.forward_features(images), True)], 1
        )
    assert relative_error(expected.numpy(), found).max() < 2e-5
    with pytest.raises(InputError, match="patches"):
        output_specs(model.architecture, ["patches"])
