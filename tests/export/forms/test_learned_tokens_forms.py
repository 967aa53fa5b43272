"""Graph forms of networks in which learned tokens leave before patches."""

from __future__ import annotations

from typing import Any

import pytest
import vitrim
from graph_forms import NCNN, error_of, well_conditioned
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_networks import architectures, early_learned_tokens, network, token_masks
from tiny_models import tiny_vit
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, write_network

MORE = (NCNN, Form(rows="batch", attention="split", tile=4), Form(rows="batch"))


def cut(name: str, **overrides: Any) -> CompactModel:
    """A tiny network with learned tokens between its patches."""
    model = vitrim.lift(tiny_vit(name, img_size=32, depth=3, **overrides))
    found = vitrim.compact(model, early_learned_tokens(model.architecture)).eval()
    assert found.architecture.inner is not None
    return found


@pytest.mark.parametrize("form", [*FORMS, *MORE], ids=lambda form: form.name)
def test_registers_between_patches_are_joined_by_slices(form: Form) -> None:
    model = cut("vit_small_patch14_reg4_dinov2")
    graph = write_network(model, form)
    assert error_of(model, graph) < 2e-5
    nodes = [node for node in graph.graph.node if not node.name.startswith("stem.")]
    assert not [node.name for node in nodes if node.op_type in ("Gather", "ScatterElements")]


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "beit_base_patch16_224", "vit_relpos_base_patch16_clsgap_224"],
)
def test_tables_of_positions_follow_the_order(name: str) -> None:
    model = cut(name)
    for form in (FORMS[0], *MORE):
        assert error_of(model, write_network(model, form)) < 2e-5


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data(), form=st.sampled_from([*FORMS, *MORE]), seed=st.integers(0, 9))
def test_every_form_covers_learned_tokens_that_leave(data: Any, form: Form, seed: int) -> None:
    whole = network(data.draw(architectures()), seed)
    model = vitrim.compact(whole, data.draw(token_masks(whole.architecture))).eval()
    assume(well_conditioned(model))
    assert error_of(model, write_network(model, form)) < 2e-4
