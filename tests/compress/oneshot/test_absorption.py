"""Removed sub-layers: the sub-layer before takes over their linear part, with a predicted error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from tiny_models import tiny_vit
from torch import nn
from vitrim import lift
from vitrim.compress.network.modules.layers import Ffn
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.absorption import absorbed_error
from vitrim.compress.oneshot.trim import Prediction, TrimOptions, predict, trim_to

OPTIONS = TrimOptions(round_to=8)


def _images(count: int = 128) -> torch.Tensor:
    small = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(small, size=16, mode="bilinear")


def _network_with_a_linear_layer() -> CompactModel:
    """The second FFN adds nearly a linear function of the stream."""
    model = lift(tiny_vit(depth=2)).eval()
    with torch.no_grad():
        branch: Any = cast("Any", model.steps)[3][0]
        core = branch.core
        assert isinstance(core, Ffn)
        # Around a large bias, GELU is the identity.
        core.fc1.weight.mul_(0.05)
        core.fc1.bias.fill_(6.0)
    return model


def _predicted(model: CompactModel) -> Prediction:
    return predict(model, _images(), options=OPTIONS)


def test_a_sub_layer_that_is_nearly_linear_costs_less_absorbed_than_as_a_constant() -> None:
    found = _predicted(_network_with_a_linear_layer()).curves["blocks.1.ffn"]
    constant = found.curves[0].errors[-1]
    assert found.absorber == "blocks.1.attn"
    widths = [width for width, _ in found.absorbed]
    assert widths == sorted(widths, reverse=True)
    assert found.absorbed[0][1] < 0.8 * constant
    # Fewer units of the absorber reproduce less, up to the noise of the held-out images.
    assert found.absorbed[-1][1] > 0.95 * found.absorbed[0][1]


def test_the_first_sub_layer_has_nothing_before_it() -> None:
    curves = _predicted(lift(tiny_vit())).curves
    assert curves["blocks.0.attn"].absorber is None
    assert curves["blocks.0.ffn"].absorber == "blocks.0.attn"


@pytest.mark.parametrize(
    ("name", "absorber"),
    [("blocks.1.ffn", "blocks.1.attn"), ("blocks.1.attn", "blocks.0.ffn")],
)
def test_a_removed_sub_layer_is_reported_as_absorbed_and_its_absorber_measured(
    name: str, absorber: str
) -> None:
    prediction = _predicted(_network_with_a_linear_layer())

    def only_that(spec: Any, embed: int, tokens: int, queries: int) -> float:
        return 1.0 if spec.name == name else 0.0

    options = TrimOptions(round_to=8, cost=only_that)
    found = trim_to(replace(prediction, options=options), budget=1e-9, kind="cost")
    rows = {row.name: row for row in found.rows}
    assert 0 in rows[name].after.values()
    assert rows[name].measured is None
    each = prediction.curves[name]
    predicted = each.weight * each.absorbed[0][1]
    assert rows[name].predicted == pytest.approx(predicted)
    measured = rows[absorber].measured
    assert measured is not None
    assert 0.3 * predicted < measured < 1.5 * predicted
    assert "absorbed" in found.table()


@pytest.mark.parametrize(("width", "error"), [(8, 1.0), (9, 1.0), (4, 2.0), (7, 2.0), (1, None)])
def test_the_error_is_that_of_the_absorber_at_its_width(width: int, error: float | None) -> None:
    assert absorbed_error(((8, 1.0), (4, 2.0)), width) == error
