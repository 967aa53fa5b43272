"""Error curves of linear layers: exact bookkeeping of greedy removal with refitting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrim.compress.oneshot.error_curves import (
    DAMPING,
    damped_cholesky,
    remove_heads,
    remove_units,
)
from vitrim.compress.oneshot.stream import Moments


def _layer(seed: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    rows = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return weight, torch.atleast_2d(torch.cov((rows @ mix).T))


def _refitted_error(weight: torch.Tensor, covariance: torch.Tensor, removed: torch.Tensor) -> float:
    """The error of the best weights on the other inputs, by solving for them."""
    damped = covariance.clone()
    damped.diagonal().add_(DAMPING * float(covariance.diagonal().mean()) + 1e-12)
    kept = torch.ones(len(damped), dtype=torch.bool)
    kept[removed] = False
    lost = weight[:, removed]
    inner = damped[removed][:, removed]
    if bool(kept.any()):
        cross = damped[removed][:, kept]
        inner = inner - cross @ torch.linalg.solve(damped[kept][:, kept], cross.T)
    return float((lost @ inner * lost).sum())


@settings(max_examples=25)
@given(seed=st.integers(0, 999), inputs=st.integers(2, 40), outputs=st.integers(1, 6))
def test_the_error_of_removed_units_is_that_of_the_best_refit(
    seed: int, inputs: int, outputs: int
) -> None:
    weight, covariance = _layer(seed, outputs, inputs)
    order, errors = remove_units(weight, covariance)
    assert sorted(order.tolist()) == list(range(inputs))
    assert bool((errors.diff() >= 0).all())
    for count in {1, (inputs + 1) // 2, inputs}:
        wanted = _refitted_error(weight, covariance, order[:count])
        assert abs(float(errors[count - 1]) - wanted) <= 1e-6 * max(wanted, 1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), heads=st.integers(1, 5), width=st.integers(1, 4))
def test_the_error_of_removed_heads_is_that_of_the_best_refit(
    seed: int, heads: int, width: int
) -> None:
    weight, covariance = _layer(seed, 3, heads * width)
    order, errors = remove_heads(weight, covariance, heads)
    columns = torch.arange(heads * width).view(heads, width)
    for count in range(1, heads + 1):
        wanted = _refitted_error(weight, covariance, columns[order[:count]].flatten())
        assert abs(float(errors[count - 1]) - wanted) <= 1e-6 * max(wanted, 1e-9)


def test_moments_of_activations_far_from_zero_keep_their_small_deviations() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 500 + 0.05 * torch.randn(2000, 6, generator=generator)
    moments = Moments(6)
    for part in rows.split(300):
        moments.add(part)
    wanted = torch.cov(rows.double().T, correction=0)
    torch.testing.assert_close(moments.covariance[0], wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moments.mean[0], rows.double().mean(dim=0), rtol=1e-6, atol=0.0)


def test_of_two_equal_units_one_goes_first_and_the_other_stays_to_the_end() -> None:
    weight, covariance = _layer(3, 4, 12)
    pair = torch.arange(12)
    pair[11] = 0
    order, errors = remove_units(weight, covariance[pair][:, pair])
    assert int(order[0]) in (0, 11)
    assert {0, 11} != set(order[:2].tolist())
    assert float(errors[0]) < 0.1 * float(errors[1])


def test_a_covariance_that_rounding_made_indefinite_has_error_curves() -> None:
    # Of 64 images of CIFAR-10: the least eigenvalue was -0.016 of the mean diagonal.
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    lost = -0.02 * basis[:, :2] @ basis[:, :2].T
    covariance = vectors.T @ vectors / 12 + 3 * lost * vectors.square().mean()
    assert torch.linalg.eigvalsh(covariance)[0] < -0.01 * covariance.diagonal().mean()
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    for order, errors in (remove_units(weight, covariance), remove_heads(weight, covariance, 4)):
        assert sorted(order.tolist()) == list(range(len(order)))
        assert torch.isfinite(errors).all()
        assert (errors.diff() >= 0).all()


def test_numbers_that_are_not_finite_have_no_factor() -> None:
    with pytest.raises(RuntimeError, match="cholesky"):
        damped_cholesky(torch.full((3, 3), torch.nan, dtype=torch.float64), 0.01)
