"""Rules of buckets: a divergence is predicted from the stream, and a threshold meets a mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from vitrim.compress.tokens import bucket_rules
from vitrim.compress.tokens.bucket_rules import (
    Buckets,
    Divergence,
    coverage_of,
    divergences,
    features,
    first_enough,
    fit_divergence,
    shares_of,
    threshold_for,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def predicted(found: Divergence, inputs: Tensor) -> Tensor:
    return inputs @ torch.tensor(found.weights).double().T + torch.tensor(found.bias).double()


def test_features_are_the_first_token_and_the_mean_patch() -> None:
    x = numbers(3, 7, 4).float()
    first, mean = x[:, 0], x[:, 2:].mean(1)
    assert torch.allclose(features(x, 2)[:, :4], first - first.mean(1, keepdim=True), atol=1e-6)
    assert torch.allclose(features(x, 2)[:, 4:], mean - mean.mean(1, keepdim=True), atol=1e-6)
    assert features(x, 0).shape == (3, 4)
    # Also of networks in other precisions, since weights of a prediction are in single precision.
    assert features(x.double(), 2).dtype == features(x.half(), 2).dtype == torch.float32


def test_tokens_that_were_centred_give_the_same_prediction() -> None:
    x, drawn = numbers(3, 7, 4).float(), numbers(2, 8)
    learned = Divergence(weights=tuple(map(tuple, drawn.tolist())), bias=(0, 0), threshold=0)
    weights = torch.tensor(learned.centred_weights(4)).flatten(1)
    expected = predicted(learned, features(x, 1).double()).float()
    for stream in (x, x - x.mean(-1, keepdim=True)):
        tokens = torch.cat([stream[:, 0], stream[:, 1:].mean(1)], dim=1)
        assert torch.allclose(tokens @ weights.T, expected, atol=1e-5)


def test_divergences_are_those_of_the_last_bucket() -> None:
    logits = list(3 * numbers(3, 5, 10))
    found = divergences(logits)
    assert found.shape == (5, 2)
    for bucket in (0, 1):
        kl = F.kl_div(
            logits[bucket].log_softmax(-1),
            logits[2].log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        assert torch.allclose(found[:, bucket].exp(), kl)
    assert torch.allclose(divergences([logits[0], logits[0]]).exp(), torch.tensor(1e-4).double())


def test_a_linear_relation_is_found() -> None:
    inputs, weights = numbers(200, 6), numbers(6, 2, seed=1)
    # One feature is constant, and another one in other units.
    inputs[:, 2], inputs[:, 3] = 4.0, 1e3 * inputs[:, 3]
    wanted = inputs @ weights + 2
    found, others = fit_divergence(inputs, wanted)
    scale = float(wanted.std())
    assert float((predicted(found, inputs) - wanted).abs().max()) < 1e-2 * scale
    assert float((others - wanted).abs().max()) < 1e-2 * scale


def test_noise_is_not_learned() -> None:
    inputs, wanted = numbers(40, 100), numbers(40, 1, seed=1)
    found, others = fit_divergence(inputs, wanted)
    # As good as the mean of the other images, whose error is by 40 / 39 larger than the deviation.
    assert float((others - wanted).square().mean()) < 1.1 * float(wanted.var())
    assert float(predicted(found, numbers(50, 100, seed=2)).std()) < float(wanted.std())


def test_each_image_is_predicted_by_a_fit_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_rules, "_RIDGES", (0.05,))
    inputs, noise = numbers(30, 3), numbers(30, 1, seed=1)
    wanted = inputs.sum(1, keepdim=True) + noise
    learned, others = fit_divergence(inputs, wanted)
    scaled = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    design = torch.cat([scaled, torch.ones(30, 1)], dim=1).double()
    penalty = torch.diag(torch.tensor([1.5, 1.5, 1.5, 0.0])).double()

    def solved(rows: list[int]) -> Tensor:
        part = design[rows]
        found: Tensor = torch.linalg.solve(part.T @ part + penalty, part.T @ wanted[rows])
        return found

    for place in range(30):
        rest = solved([number for number in range(30) if number != place])
        assert torch.allclose(others[place], design[place] @ rest)
    assert torch.allclose(predicted(learned, inputs), design @ solved(list(range(30))), atol=1e-5)


@given(st.data())
def test_the_threshold_is_the_least_that_meets_the_mean(data: st.DataObject) -> None:
    images, buckets = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 4))
    counts = sorted(data.draw(st.sets(st.integers(1, 30), min_size=buckets, max_size=buckets)))
    # Few values, so that some are equal.
    values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, float("nan")])
    needs = torch.tensor(
        [[data.draw(values) for _ in range(buckets - 1)] for _ in range(images)]
    ).double()
    mean = data.draw(st.floats(counts[0], counts[-1]))

    def mean_of(threshold: float) -> float:
        return float(np.dot(shares_of(needs, threshold), counts))

    found = threshold_for(needs, counts, mean)
    least = mean_of(float("inf"))
    if least > mean:
        # Images without numbers keep the last bucket whatever is asked for.
        assert mean_of(found) == least
        return
    assert mean_of(found) <= mean + 1e-9
    for smaller in needs[needs.isfinite()].unique().tolist():
        if smaller < found and mean_of(smaller - 1e-6) <= mean - 1e-9:
            assert mean_of(smaller - 1e-6) == mean_of(found)


def test_the_first_bucket_that_suffices_is_taken() -> None:
    needs = torch.tensor([[1.0, 3.0], [3.0, 1.0], [3.0, 3.0], [float("nan"), 1.0], [2.0, 2.0]])
    assert first_enough(needs, 2.0).tolist() == [0, 1, 2, 1, 0]
    assert shares_of(needs, 2.0) == (0.4, 0.4, 0.2)


def test_a_threshold_beyond_all_shares_is_a_coverage_in_range() -> None:
    assert [coverage_of(threshold) for threshold in (-1.5, -0.25, 0.5)] == [1.0, 0.25, 1e-9]


def test_files_of_coverage_are_those_of_earlier_versions() -> None:
    record = Buckets(counts=(3, 6), coverage=0.5).model_dump(by_alias=True, mode="json")
    assert record == {
        "schema": "vitrim.buckets/1",
        "counts": [3, 6],
        "coverage": 0.5,
        "shares": None,
        "images": 0,
    }
    learned = Divergence(weights=((1.0, 2.0),), bias=(0.5,), threshold=-3.0)
    found = Buckets(counts=(3, 6), divergence=learned)
    assert "coverage" not in found.model_dump(by_alias=True, mode="json")
    assert Buckets.model_validate_json(found.model_dump_json(by_alias=True)) == found
