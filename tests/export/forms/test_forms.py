"""Every graph form computes what the network computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import vitrim
from graph_forms import NCNN, error_of, well_conditioned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from torch import nn
from vitrim.compress.network.architecture import Architecture, AttentionSpec, PoolSpec
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery.stream_form import choose_stream_form
from vitrim.core.errors import InputError, UnsupportedModel
from vitrim.export.forms import FORMS, STREAM_FORMS, Form, form_named, write_network
from vitrim.export.forms.centring import applicable
from vitrim.export.forms.coverage import reason_against
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.parity import first_difference

TINY: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


# Operators that pnnx converts wrongly, or to layers that ncnn does not have.
UNCONVERTED = {"Gather", "Pad", "ReduceMean", "ReduceMax", "ReduceSum", "ScatterElements"}


def vit(seed: int = 0, model: str = "vit_tiny_patch16_224", **overrides: Any) -> nn.Module:
    """A tiny timm model with every parameter random, so that no bias is zero and no scale is
    one.
    """
    torch.manual_seed(seed)
    made = timm.create_model(model, **{**TINY, **overrides}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def lifted(seed: int = 0, **overrides: Any) -> CompactModel:
    return vitrim.lift(vit(seed, **overrides))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_matches_the_network(form: Form) -> None:
    model = lifted()
    assert error_of(model, write_network(model, form)) < 2e-5


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form.rows == "batch"], ids=lambda form: form.name
)
@pytest.mark.parametrize("batch", [3, "dynamic"])
def test_batch_forms_accept_batches(form: Form, batch: int | str) -> None:
    model = lifted()
    graph = write_network(model, form, batch="batch" if batch == "dynamic" else batch)
    assert error_of(model, graph, batch=batch, count=5) < 2e-5


def test_matrix_rows_refuse_batches() -> None:
    with pytest.raises(InputError, match="holds one image, and batch 2 was requested"):
        write_network(lifted(), FORMS[0], batch=2)


@pytest.mark.parametrize(
    "overrides",
    [
        {"init_values": 0.5},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg", "fc_norm": True},
        {"reg_tokens": 2},
        {"pre_norm": True},
        {"num_classes": 7, "in_chans": 3},
        {"model": "deit_tiny_distilled_patch16_224"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[5], FORMS[6], NCNN], ids=lambda form: form.name)
def test_forms_match_each_kind_of_model(overrides: dict[str, Any], form: Form) -> None:
    model = lifted(**overrides)
    assert error_of(model, write_network(model, form)) < 5e-5


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    ratios=st.fixed_dictionaries(
        {
            name: st.sampled_from([0.3, 0.6, 1.0])
            for name in ("embed", "head", "qk", "v", "ffn", "block")
        }
    ),
    sharing=st.sampled_from(["residual", "full", "unshared"]),
    form=st.sampled_from([*FORMS, NCNN]),
)
def test_every_form_matches_a_pruned_network(
    seed: int, ratios: dict[str, float], sharing: str, form: Form
) -> None:
    dense = lifted(seed % 3)
    mask = vitrim.StructuredMask.random(dense, keep_ratio=ratios, sharing=sharing, seed=seed)  # type: ignore[arg-type]
    cut = vitrim.compact(dense, mask).eval()
    assert error_of(cut, write_network(cut, form)) < 1e-4


def test_centring_is_applied_only_where_every_reader_is_a_layer_norm() -> None:
    assert applicable(lifted().architecture)
    assert not applicable(lifted(pre_norm=True).architecture)
    unshared = vitrim.StructuredMask.random(lifted(), keep_ratio=0.5, sharing="unshared", seed=0)
    assert not applicable(vitrim.compact(lifted(), unshared).architecture)


def test_the_chosen_form_has_fewer_nodes_than_a_plain_one() -> None:
    model = lifted()
    plain = write_network(
        model, Form(rows="batch", attention="split", norm="layer", stem="conv", last_queries=False)
    )
    # The last block without keys has fewer products, in more nodes.
    best = write_network(model, replace(FORMS[0], last_keys=False))
    assert len(best.graph.node) < 0.75 * len(plain.graph.node)
    kinds = [node.op_type for node in best.graph.node]
    # Only the patches are transposed; attention and products read rows unchanged.
    assert kinds.count("Transpose") == 1
    assert not {"Conv", "Erf", "LayerNormalization", "Softmax"} & set(kinds)


def test_form_names_round_trip() -> None:
    for form in (*FORMS, *STREAM_FORMS, NCNN, Form(last_queries=False, last_keys=False)):
        assert form_named(form.name) == form
    with pytest.raises(InputError, match="form 'fastest' is unknown; use one of plain, matrix/"):
        form_named("fastest")


class LaterPool(PoolSpec):
    """A pooling with a field that the forms do not read."""

    temperature: float = 1.0


def test_a_part_that_no_form_covers_is_named() -> None:
    architecture = lifted().architecture
    later = architecture.model_copy(update={"pool": LaterPool(temperature=2.0)})
    assert reason_against(architecture) is None
    assert reason_against(later) == "pool: temperature"
    ffn = architecture.branches[1].core.model_copy(update={"act": "mish"})
    step = (architecture.branches[1].model_copy(update={"core": ffn}),)
    assert (
        reason_against(architecture.model_copy(update={"steps": (step,)}))
        == "blocks.0.ffn.core: activation 'mish'"
    )
    model = lifted()
    model.architecture = later
    with pytest.raises(
        UnsupportedModel, match="the graph forms have no rule for pool: temperature"
    ):
        write_network(model, FORMS[0])


@settings(max_examples=40)
@given(
    architecture=architectures(),
    form=st.sampled_from([*FORMS, *STREAM_FORMS]),
    seed=st.integers(0, 9),
)
def test_every_form_covers_every_architecture(
    architecture: Architecture, form: Form, seed: int
) -> None:
    model = network(architecture, seed)
    assume(well_conditioned(model))
    assert error_of(model, write_network(model, form)) < 2e-4


@settings(max_examples=40)
@given(architecture=architectures(), rows=st.sampled_from(["matrix", "batch"]))
def test_the_form_for_pnnx_covers_every_architecture_without_operators_that_it_lacks(
    architecture: Architecture, rows: Any
) -> None:
    model = network(architecture, 0)
    assume(well_conditioned(model))
    graph = write_network(model, replace(NCNN, rows=rows))
    assert error_of(model, graph) < 2e-4
    assert not {node.op_type for node in graph.graph.node} & UNCONVERTED
    norms = [node for node in graph.graph.node if node.op_type == "LayerNormalization"]
    assert all(len(node.input) == 3 for node in norms)


def test_unequal_groups_of_heads_are_copied_for_pnnx() -> None:
    core = AttentionSpec(heads=3, qk=4, v=5, scale=0.5, kv_of=(1, 0, 1))
    architecture = lifted().architecture
    branch = architecture.branches[0].model_copy(update={"core": core})
    model = network(architecture.model_copy(update={"steps": ((branch,),)})).float()
    graph = write_network(model, NCNN)
    assert error_of(model, graph) < 2e-5
    assert not {node.op_type for node in graph.graph.node} & UNCONVERTED


@settings(max_examples=12)
@given(
    architecture=architectures(),
    form=st.sampled_from([form for form in FORMS if form.rows == "batch"]),
)
def test_batch_forms_cover_every_architecture_with_a_free_batch(
    architecture: Architecture, form: Form
) -> None:
    model = network(architecture, 0)
    assume(well_conditioned(model))
    assert (
        error_of(model, write_network(model, form, batch="batch"), batch="dynamic", count=3) < 2e-4
    )


@pytest.mark.parametrize("tile", [4, 12, 16])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_no_query_attends_to_rows_that_pad_a_tile(tile: int, pool: str) -> None:
    model = lifted(global_pool=pool)
    graph = write_network(model, Form(attention="split", tile=tile))
    assert error_of(model, graph) < 2e-5
    rows = {tuple(tensor.dims) for tensor in graph.graph.initializer if tensor.name == "padding"}
    assert rows == ({(-17 % tile, 24)})


def test_the_last_block_computes_no_keys_for_a_class_token() -> None:
    model = lifted()
    last = next(
        branch
        for branch in reversed(model.architecture.branches)
        if isinstance(branch.core, AttentionSpec)
    ).name
    names = [node.name for node in write_network(model, FORMS[0]).graph.node]
    assert f"{last}.k" not in names
    assert f"{last}.q" in names
    assert "blocks.0.attn.k" in names
    # Eight-bit products are cheaper than the float ones that would replace them.
    assert f"{last}.k" in [
        node.name for node in write_network(model, FORMS[0], linears="int8").graph.node
    ]


def test_unshared_channels_are_scattered_by_index_or_padded_with_zeros() -> None:
    dense = lifted()
    cut = vitrim.compact(
        dense, vitrim.StructuredMask.random(dense, keep_ratio=0.5, sharing="unshared", seed=3)
    ).eval()
    for form, scatters in zip(STREAM_FORMS, (False, True), strict=True):
        graph = write_network(cut, form)
        assert error_of(cut, graph) < 2e-5
        assert any(node.op_type == "ScatterElements" for node in graph.graph.node) is scatters
    # The graph follows the cost model's choice for each site.
    chosen = choose_stream_form(cut)
    writers = sum(
        choice.site.endswith(".out") and choice.form == "index" and choice.site != "stem.out"
        for choice in chosen.choices
    )
    cheaper = write_network(cut, FORMS[0])
    assert sum(node.op_type == "ScatterElements" for node in cheaper.graph.node) == writers
    assert error_of(cut, cheaper) < 2e-5


def test_an_opset_is_at_least_the_forms_own() -> None:
    model = lifted()
    graph = write_network(model, FORMS[1], opset=22)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [22]
    assert error_of(model, graph) < 2e-5
    with pytest.raises(InputError, match="needs opset 23, and 22 was requested"):
        write_network(model, FORMS[0], opset=22)


def test_the_first_node_that_differs_is_found() -> None:
    model = lifted()
    good = write_network(model, FORMS[1])
    with torch.no_grad():
        model.get_parameter("steps.3.0.core.fc1.weight").mul_(1.5)
    wrong = write_network(model, FORMS[1])
    image = np.random.default_rng(0).standard_normal((1, 1, 16, 16), dtype=np.float32)
    assert first_difference(good, good, image, 1e-6) is None
    found = first_difference(good, wrong, image, 1e-4)
    assert found is not None
    assert found.startswith("node 'blocks.1.ffn.fc1' (Gemm), by ")


def test_the_known_form_follows_batch_and_tokens() -> None:
    assert best_form("x86-64-v4-vnni", 1)[0] == best_form("x86-64", 1, 50)[0] == FORMS[0]
    large, why = best_form("x86-64-v4-vnni", 1, 197)
    assert large == replace(FORMS[0], stem="conv")
    assert "patches by convolution" in why
    assert best_form("rpi4", "dynamic", 197)[0].rows == "batch"
    assert "not measured on this target" in best_form("rpi4", 1, 197)[1]
