"""Learning rates equal their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vitrim.compress.train.schedule import LearningRate, Schedule
from vitrim.core.errors import InputError


def rates(schedule: Schedule, epochs: int = 8, steps: int = 10) -> list[tuple[float, float]]:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.1}]
    )
    rate = LearningRate(optimizer, schedule, epochs, steps)
    found = []
    for step in range(epochs * steps):
        assert rate.set(step) == optimizer.param_groups[0]["lr"]
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]))
    return found


def test_cosine_falls_once() -> None:
    for step, (first, second) in enumerate(rates(Schedule("cosine", min_lr=0.0))):
        assert first == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 80)))
        assert second == pytest.approx(0.1 * first)


def test_warmup_rises_before_the_cosine() -> None:
    found = [first for first, _ in rates(Schedule("cosine", warmup_epochs=2, min_lr=0.0))]
    assert found[:21] == pytest.approx([step / 20 for step in range(21)])
    assert found[50] == pytest.approx(0.5)


def test_restarts_repeat_every_four_epochs() -> None:
    found = [first for first, _ in rates(Schedule("restarts", restart_epochs=4, min_lr=1e-8))]
    assert found[:40] == pytest.approx(found[40:])
    assert found[40] == pytest.approx(1.0)
    assert found[39] < 0.01


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_rewinding_is_the_end_of_a_longer_training(share: float) -> None:
    longer = rates(Schedule("cosine", min_lr=1e-6), epochs=round(60 / share), steps=10)
    rewound = rates(Schedule("cosine", rewind=share), epochs=60)
    for group in range(2):
        wanted = [each[group] for each in longer[-600:]]
        assert [each[group] for each in rewound] == pytest.approx(wanted)


def test_rewound_rounds_repeat() -> None:
    found = [first for first, _ in rates(Schedule("restarts", restart_epochs=2, rewind=0.25))]
    assert found[:20] == pytest.approx(found[20:40])
    assert found[0] == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)), rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [{"rewind": 0.0}, {"rewind": 1.5}, {"rewind": 0.5, "warmup_epochs": 1}],
)
def test_rewinding_has_a_share_and_no_warmup(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"rewind = .* must lie in \(0, 1\]"):
        Schedule("cosine", **values)


def test_constant_stays_after_its_warmup() -> None:
    found = rates(Schedule("constant", warmup_epochs=1, min_lr=0.0))
    assert [first for first, _ in found[:10]] == pytest.approx([step / 10 for step in range(10)])
    assert set(found[10:]) == {(1.0, 0.1)}


def test_a_rate_is_a_function_of_the_step() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = LearningRate(optimizer, Schedule("restarts", warmup_epochs=1), 8, 10)
    forwards = [rate.set(step) for step in range(80)]
    backwards = [
        LearningRate(optimizer, Schedule("restarts", warmup_epochs=1), 8, 10).set(step)
        for step in reversed(range(80))
    ]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize(
    "change", [{"kind": "linear"}, {"restart_epochs": 0}, {"warmup_epochs": -1.0}, {"min_lr": -1.0}]
)
def test_invalid_schedules_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="schedule"):
        Schedule(**change)
