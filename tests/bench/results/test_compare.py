"""Error rates of the comparison, in simulated trials with injected samples."""

from __future__ import annotations

import numpy as np
import pytest
from bench_samples import measurement
from vitrim.bench.results.compare import (
    DEFAULT_ROUNDS,
    DEFAULT_SAMPLES,
    compare,
    compare_samples,
    parse_limit,
)
from vitrim.core.errors import InputError

PER_TURN = DEFAULT_SAMPLES // DEFAULT_ROUNDS
TURNS = [PER_TURN] * DEFAULT_ROUNDS


def noisy_machine(
    rng: np.random.Generator, drift: np.ndarray, slowdown: float = 1.0
) -> list[float]:
    """Samples of a shared machine: its drift by round, noise of 3 %, and disturbed samples.

    One sample in twenty takes up to half as long again.
    """
    samples = (
        0.010 * slowdown * np.repeat(drift, PER_TURN) * rng.lognormal(0, 0.03, DEFAULT_SAMPLES)
    )
    disturbed = rng.random(DEFAULT_SAMPLES) < 0.05
    return [
        float(value)
        for value in samples * np.where(disturbed, 1 + rng.random(DEFAULT_SAMPLES) / 2, 1)
    ]


def verdicts(slowdown: float, *, paired: bool) -> list[str]:
    found = []
    for trial in range(100):
        rng = np.random.default_rng(trial)
        drift = rng.lognormal(0, 0.1 if paired else 0.02, DEFAULT_ROUNDS)
        other = drift if paired else rng.lognormal(0, 0.02, DEFAULT_ROUNDS)
        one, two = noisy_machine(rng, drift), noisy_machine(rng, other, slowdown)
        found.append(compare_samples(one, two, TURNS, TURNS, paired=paired).verdict)
    return found


@pytest.mark.parametrize("paired", [True, False])
def test_equal_artifacts_show_no_difference(paired: bool) -> None:
    assert verdicts(1.0, paired=paired).count("no difference") >= 95


@pytest.mark.parametrize("paired", [True, False])
def test_a_true_difference_of_five_percent_is_found(paired: bool) -> None:
    assert verdicts(1.05, paired=paired).count("slower") >= 90
    assert verdicts(1 / 1.05, paired=paired).count("faster") >= 90


def samples(scale: float) -> list[float]:
    return [scale * (0.01 + 0.0001 * (i % 7)) for i in range(100)]


@pytest.mark.parametrize(
    ("scale", "limit", "code"),
    [(1.10, 0.05, 1), (1.03, 0.05, 0), (0.5, 0.05, 0), (1.0, 0.0, 0), (2.0, None, 0)],
)
def test_the_exit_code_fails_only_above_the_limit(
    scale: float, limit: float | None, code: int
) -> None:
    assert compare_samples(samples(1.0), samples(scale)).exit_code(limit) == code


def test_a_large_but_uncertain_slowdown_does_not_fail() -> None:
    rng = np.random.default_rng(0)
    wild = compare_samples(
        rng.lognormal(0, 1, 20).tolist(), (1.1 * rng.lognormal(0, 1, 20)).tolist()
    )
    assert wild.verdict == "no difference"
    assert wild.exit_code(0.0) == 0


def test_measurements_of_one_session_are_paired_and_others_are_not() -> None:
    one = measurement(name="a", latency_s=tuple(samples(1.0)), samples_per_turn=(5,) * 20)
    two = measurement(name="b", latency_s=tuple(samples(0.5)), samples_per_turn=(5,) * 20)
    paired = compare(one, two)
    assert paired.paired
    assert str(paired).startswith("b is faster than a: time ratio 0.500 (99 % interval 0.")
    separate = compare(one, two.model_copy(update={"session": "other", "threads": 2}))
    assert not separate.paired
    assert separate.notes == ("threads differs: 1 and 2; the ratio includes its effect",)


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), (" 5 %", 0.05), ("0.05", 0.05), ("0", 0.0), ("150%", 1.5)]
)
def test_a_limit_is_parsed_as_percent_or_share(text: str, share: float) -> None:
    assert parse_limit(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["five", "", "5", "-1%", "nan"])
def test_an_invalid_limit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write 5% or 0\.05"):
        parse_limit(text)
