"""Cuts to a latency: tokens, widths and depth, within the table's budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from latency_tables import latency_table
from tiny_models import tiny_vit
from torch import Tensor
from torch.nn import functional as F
from vitrim import InputError, TrimOptions
from vitrim.compress.latency.cut import LatencyCut, LatencyCuts, LatencyOptions
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.masks.masked import masked
from vitrim.compress.surgery.compactor import compact, output_error
from vitrim.compress.tokens.counts import STEM

TABLE = latency_table()


@pytest.fixture(scope="module")
def images() -> Tensor:
    small = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, size=(48, 48), mode="bilinear")


@pytest.fixture(scope="module")
def cuts(images: Tensor) -> LatencyCuts:
    model = tiny_vit(depth=3, img_size=48)
    return LatencyCuts(model, images, TABLE, options=TrimOptions(round_to=4))


def dense_ms(cuts: LatencyCuts) -> float:
    return TABLE.latency_ms(network_shape(cuts.source.architecture))


def check(found: LatencyCut, budget_ms: float) -> None:
    """The compact network is within the budget, and the cut before the refit is exact."""
    assert found.latency_ms == TABLE.latency_ms(network_shape(found.model.architecture))
    assert 0.5 * budget_ms < found.latency_ms <= budget_ms
    trimmed, noise = found.trimmed, torch.randn(2, 3, 48, 48)
    exact = compact(trimmed.rotated, trimmed.mask)
    assert output_error(masked(trimmed.rotated, trimmed.mask), exact, noise) < 1e-4


def test_tokens_and_widths_are_cut_for_one_latency(cuts: LatencyCuts) -> None:
    budget_ms = 0.5 * dense_ms(cuts)
    found = cuts.cut(budget_ms)
    check(found, budget_ms)
    assert found.tokens is not None
    assert set(found.mask.kept) > {"token"}
    assert found.model.architecture.step_tokens()[0] < cuts.source.architecture.tokens
    assert cuts.source.architecture.tokens == 37


def test_tokens_leave_only_where_the_cut_is_nearer_to_the_dense_network(images: Tensor) -> None:
    cuts = LatencyCuts(
        tiny_vit(depth=3, img_size=48), images, TABLE, options=TrimOptions(round_to=4)
    )
    budget_ms = 0.8 * dense_ms(cuts)
    # As if nothing were lost with tokens: by the prediction nearly all of them leave.
    steps = cuts.source.architecture.attention_steps()
    wrong = {step: [0.0] * (cuts.source.architecture.tokens + 1) for step in steps}
    cuts._tokens = wrong
    predicted = cuts._token_choices(budget_ms)[0]
    assert predicted is not None
    found = cuts.cut(budget_ms)
    check(found, budget_ms)
    assert found.tokens is None
    assert cuts._distance(found.model) < cuts._distance(cuts._cut_with(predicted, budget_ms).model)


def test_tokens_that_must_stay_do(images: Tensor) -> None:
    options = LatencyOptions(tokens=False, candidates=2, file_mb=1.0)
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    cuts = LatencyCuts(
        tiny_vit(depth=2, img_size=48),
        images,
        TABLE,
        options=TrimOptions(round_to=4),
        latency=options,
        progress=progress,
    )
    budget_ms = 0.7 * dense_ms(cuts)
    found = cuts.cut(budget_ms)
    check(found, budget_ms)
    assert found.tokens is None
    assert "token" not in found.mask.kept
    assert "score" not in stages
    assert "compare" in stages


def test_losses_of_tokens_fall_with_their_number(cuts: LatencyCuts) -> None:
    def falls(row: Sequence[float]) -> bool:
        return all(left >= right for left, right in pairwise(row))

    losses = cuts.token_losses()
    assert list(losses) == [STEM, *cuts.source.architecture.attention_steps()]
    assert all(falls(row) for row in losses.values())
    assert cuts.token_losses() is losses


def test_a_latency_that_cannot_be_reached_names_the_smallest(cuts: LatencyCuts) -> None:
    with pytest.raises(InputError, match="the smallest latency that can be reached is 0"):
        cuts.cut(1e-4)
    with pytest.raises(InputError, match="candidates = -1: give 0 or more"):
        LatencyOptions(candidates=-1)
