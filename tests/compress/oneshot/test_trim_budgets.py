"""Budgets of a cut: shares, bytes of a file, and tables of measured costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_networks import architectures, network
from source_tree import ROOT
from tiny_models import tiny_vit
from torch import nn
from vitrim import InputError, lift, trim
from vitrim.compress.latency.shapes import latency_cost
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.count import branch_tokens, count_macs, count_params
from vitrim.compress.oneshot.budgets import PARTS, file_bytes, table_cost
from vitrim.compress.oneshot.trim import TrimOptions
from vitrim.targets.cost_table import CostTable

OPTIONS = TrimOptions(round_to=4)
COSTS = {part: 1e-9 * (number + 1) for number, part in enumerate(PARTS)}


def _images(count: int = 40) -> torch.Tensor:
    small = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(small, size=16, mode="bilinear")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_is_at_most_as_large_as_its_budget(precision: Any) -> None:
    model = tiny_vit(depth=3)
    dense = file_bytes(lift(model).architecture, precision)
    options = TrimOptions(round_to=4, precision=precision)
    found = trim(model, _images(), budget=0.7 * dense, kind="file", options=options)
    size = file_bytes(found.model.architecture, precision)
    assert 0.6 * dense < size <= 0.7 * dense
    assert found.cost == pytest.approx(size / dense, rel=0.01)


def test_the_size_of_a_file_is_its_parameters_and_a_fixed_part() -> None:
    architecture = lift(tiny_vit(depth=3)).architecture
    fixed = file_bytes(architecture, "fp32") - 4 * count_params(architecture)
    assert file_bytes(architecture, "fp16") == 2 * count_params(architecture) + fixed
    assert file_bytes(architecture, "int8") < 2 * count_params(architecture) + fixed


def test_a_cost_table_prices_both_sub_layers_of_a_block_as_its_measured_latency() -> None:
    path = ROOT / "benchmarks/results/cost_table_demo_avx512.json"
    data = json.loads(path.read_text())
    branches = lift(tiny_vit()).architecture.steps
    costs = [table_cost(data["costs_s"]), latency_cost(CostTable.load(path))]
    # A table of the earlier schema has the same costs by sub-layer.
    both, loaded = (
        sum(cost(branch, 24, 17, 17) for step in branches[:2] for branch in step) for cost in costs
    )
    assert loaded == pytest.approx(both)
    measured = {tuple(point["shape"].values()): point["latency_s"] for point in data["points"]}
    (n, m, heads, qk, v, ffn, embed), seconds = next(iter(measured.items()))
    table = CostTable.load(path)
    found = table.attention_ms(embed, n, m, heads, qk, v) + table.ffn_ms(embed, m, ffn)
    assert float(found) == pytest.approx(1e3 * seconds, rel=0.1)


def _milliseconds(architecture: Architecture) -> float:
    cost = table_cost(COSTS)
    computed = architecture.model_copy(update={"last_queries": True})
    return sum(cost(spec, architecture.embed, *tokens) for spec, *tokens in branch_tokens(computed))


def test_a_budget_in_milliseconds_is_met() -> None:
    model = tiny_vit(depth=3)
    dense = _milliseconds(lift(model).architecture)
    options = TrimOptions(round_to=4, cost=COSTS)
    found = trim(model, _images(), budget=0.6 * dense, kind="cost", options=options)
    assert 0.4 * dense < _milliseconds(found.model.architecture) <= 0.6 * dense
    assert 0.4 < found.cost <= 0.6


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(architecture=architectures())
def test_every_network_has_a_size(architecture: Architecture) -> None:
    network(architecture)
    sizes = [file_bytes(architecture, precision) for precision in ("fp32", "fp16")]
    assert sizes[0] - sizes[1] == 2 * count_params(architecture)


def test_the_options_of_macs_and_budget_give_the_same_cut() -> None:
    model = tiny_vit()
    named = trim(model, _images(), macs=0.7, options=OPTIONS)
    general = trim(model, _images(), budget=0.7, kind="macs", options=OPTIONS)
    assert named.widths == general.widths
    assert count_macs(named.model.architecture) == count_macs(general.model.architecture)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"budget": 0.5}, {}, "give one budget, macs or params"),
        ({"macs": 0.5, "kind": "macs"}, {}, "give one budget, macs or params"),
        ({"budget": 0.5, "kind": "watts"}, {}, "kind = 'watts': choose macs, params, file, cost"),
        ({"budget": 0.5, "kind": "file"}, {}, "file = 0.5: give the size of the file in bytes"),
        ({"budget": 1e6, "kind": "file"}, {"precision": "int3"}, "precision = 'int3': choose fp32"),
        ({"budget": 2, "kind": "params"}, {}, "params = 2: give the share to keep"),
        ({"budget": 2, "kind": "cost"}, {}, "needs options.cost: a function or a cost table"),
        ({"budget": -2, "kind": "cost"}, {"cost": COSTS}, "cost = -2: give a number above 0"),
        (
            {"budget": 2, "kind": "cost"},
            {"cost": {"ffn": 1.0}},
            "'block' needs a number of seconds",
        ),
        ({"budget": 2, "kind": "file"}, {}, "give a larger budget"),
    ],
)
def test_a_budget_that_is_not_one_is_refused(
    arguments: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trim(tiny_vit(), _images(8), options=TrimOptions(round_to=4, **options), **arguments)
