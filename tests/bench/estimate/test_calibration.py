"""Calibration recovers known factors, and its error is that of devices left out of the fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from vitrim.bench.estimate.calibration import error_factor, fit, leave_one_out
from vitrim.bench.estimate.costs import (
    OperatorCost,
    OperatorCosts,
    TimedOperator,
    fit_costs,
    rescale,
)
from vitrim.bench.estimate.machine import Machine, machine_of
from vitrim.bench.estimate.points import MEASURED, PUBLISHED, Point, known_points, read_latencies
from vitrim.bench.estimate.prediction import can_estimate, estimate, time_text
from vitrim.bench.estimate.workload import PlainVit
from vitrim.core.errors import InputError
from vitrim.targets.catalog import list_targets, load_target

COSTS = OperatorCosts(
    {
        "projection": OperatorCost(1.3, 0.0, 5000.0),
        "attention": OperatorCost(1.6, 4.0, 9000.0),
        "activation": OperatorCost(0.0, 20.0, 3000.0),
        "norm": OperatorCost(0.0, 12.0, 3000.0),
        "add": OperatorCost(0.0, 8.0, 2000.0),
    },
    "synthetic",
)
VITS = {
    "small": PlainVit(32, 8, 48, 2, 3, 192),
    "middle": PlainVit(64, 8, 96, 4, 3, 384),
    "large": PlainVit(224, 16, 192, 12, 3, 768),
}


def machine(
    name: str, threads: int = 1, gigamacs: float = 20.0, architecture: str = "aarch64"
) -> Machine:
    rate = gigamacs * 1e9 * threads
    return Machine(name, architecture, threads, "fp32", 2e9, rate, rate, 8e9 * threads)


def point(
    name: str,
    family: str,
    factor: float,
    threads: int = 1,
    vit: str = "middle",
    architecture: str = "aarch64",
) -> Point:
    work, where = VITS[vit].workload(vit), machine(name, threads, architecture=architecture)
    return Point(
        where, family, work, COSTS.seconds(work, where) * factor * threads**0.25, "synthetic"
    )


def test_operator_costs_are_recovered() -> None:
    timed = [
        TimedOperator(
            operator,
            machine("a"),
            COSTS.operator_seconds(operator, machine("a"), from_memory=False),
        )
        for vit in VITS.values()
        for operator in vit.workload("x").operators
    ]
    found = fit_costs(timed, "a")
    for kind, cost in COSTS.kinds.items():
        assert found.kinds[kind].cycles_per_node == pytest.approx(cost.cycles_per_node, rel=0.01), (
            kind
        )
        if kind not in ("attention",):
            # Scores and multiply-adds of attention are collinear, so only their sum is identified.
            assert found.kinds[kind].over_peak == pytest.approx(cost.over_peak, rel=0.01)
    large = VITS["large"].workload("x")
    assert found.seconds(large, machine("a")) == pytest.approx(
        COSTS.seconds(large, machine("a")), rel=0.01
    )


def test_the_time_that_a_profiler_adds_to_each_node_is_removed() -> None:
    slow = OperatorCosts(
        {
            kind: replace(cost, cycles_per_node=cost.cycles_per_node * 3)
            for kind, cost in COSTS.kinds.items()
        },
        "a",
    )
    whole = [
        (vit.workload(name), machine("a"), COSTS.seconds(vit.workload(name), machine("a")))
        for name, vit in VITS.items()
    ]
    found = rescale(slow, whole)
    for kind, cost in COSTS.kinds.items():
        assert found.kinds[kind].cycles_per_node == pytest.approx(cost.cycles_per_node, rel=1e-6)


def test_weights_beyond_the_cache_are_read_from_memory() -> None:
    work = VITS["large"].workload("large")
    slow = replace(machine("a", gigamacs=1e4), bandwidth_bytes_per_s=1e9, last_cache_bytes=2**20)
    reading = sum(operator.weights for operator in work.operators) * 4 / 1e9
    assert COSTS.seconds(work, slow) > reading
    assert COSTS.seconds(work, replace(slow, last_cache_bytes=2**30)) < reading / 2


def test_the_factor_of_a_runtime_and_the_loss_over_threads_are_recovered() -> None:
    points = [point(name, "fast", 2.0, threads) for name in "abc" for threads in (1, 4)] + [
        point("d", "slow", 5.0)
    ]
    found = fit(points, COSTS)
    assert found.threads_power == pytest.approx(0.25)
    assert math.exp(found.levels["fast", "aarch64"]) == pytest.approx(2.0)
    assert math.exp(found.levels["slow", "aarch64"]) == pytest.approx(5.0)
    # Without points of the runtime, those of the architecture count; without those, all points.
    assert found.cell(machine("x"), "unknown") == ("", "aarch64")
    assert found.cell(machine("x", architecture="riscv64"), "fast") == ("", "")


def test_a_left_out_device_is_left_out_with_every_thread_count() -> None:
    points = [
        point(name, "fast", factor, threads)
        for name, factor in (("a", 2.0), ("b", 2.0), ("odd", 6.0))
        for threads in (1, 4)
    ]
    left_out = leave_one_out(points, COSTS)
    odd = [entry.ratio for entry in left_out if entry.point.machine.device == "odd"]
    assert odd == pytest.approx([1 / 3, 1 / 3])
    # Two similar devices and one three times slower: the bar has to reach the third.
    assert error_factor(left_out) == pytest.approx(3.0)


def test_without_its_runtime_a_device_is_predicted_by_the_others() -> None:
    points = [point(name, "fast", 2.0, threads) for name in "ab" for threads in (1, 4)] + [
        point("c", "slow", 5.0)
    ]
    far = leave_one_out(points, COSTS, without_runtime=True)
    assert {entry.cell for entry in far} == {("", "aarch64")}
    assert {round(entry.ratio, 6) for entry in far if entry.point.machine.device == "a"} == {2.5}


# ---- the data in the package ---------------------------------------------------------------------


def test_every_published_latency_has_a_source() -> None:
    collection = read_latencies(PUBLISHED)
    assert all(entry.source for entry in collection.latencies)
    assert all(
        entry.source.startswith(("https://", "unverified:")) for entry in collection.latencies
    )
    assert all(processor.source for processor in collection.processors.values())


def test_no_emulated_time_is_among_the_points() -> None:
    for path in (PUBLISHED, MEASURED):
        assert "qemu" not in path.read_text().lower()


def test_published_latencies_are_predicted_within_a_factor_of_two() -> None:
    published = [
        entry
        for entry in leave_one_out(known_points(), OperatorCosts.load())
        if entry.point.machine.device != "host"
    ]
    within = sum(0.5 <= entry.ratio <= 2 for entry in published) / len(published)
    assert within >= 0.9


def test_an_estimate_is_marked_as_one_and_has_an_error_bar() -> None:
    found = estimate(VITS["large"].workload("vit_tiny"), load_target("rpi4"), threads=1)
    assert found.low_s < found.likely_s < found.high_s
    # No device is faster than its own peak.
    assert found.low_s > 0.5 * VITS["large"].workload("x").macs / 6e9
    assert "estimate" in str(found)
    assert "measure it on the device" in str(found)
    near = estimate(
        VITS["large"].workload("vit_tiny"), load_target("rpi4"), threads=1, runtime="ncnn"
    )
    assert near.factor < found.factor
    assert near.rests_on == "ncnn on aarch64"
    assert found.rests_on == "other runtimes on aarch64"


def test_more_threads_are_estimated_to_be_faster_but_not_in_proportion() -> None:
    one, four = (
        estimate(VITS["large"].workload("x"), load_target("rpi5"), threads=threads).likely_s
        for threads in (1, 4)
    )
    assert one / 4 < four < one


@pytest.mark.parametrize("name", list_targets())
def test_every_target_has_an_estimate_or_a_reason_against_it(name: str) -> None:
    profile = load_target(name)
    reason = can_estimate(profile, "int8")
    if reason is None:
        assert estimate(VITS["small"].workload("x"), profile, precision="int8").likely_s > 0
    else:
        assert reason.startswith("time: no estimate; ")


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(
        InputError, match="rpi4: 5 threads, but the profile has 4 cores; give 1 to 4"
    ):
        machine_of(load_target("rpi4"), "fp32", 5)


def test_a_precision_without_a_peak_is_refused() -> None:
    with pytest.raises(InputError, match="gap8: its profile states no fp32 peak"):
        machine_of(load_target("gap8"), "fp32")
    assert (
        can_estimate(load_target("gap8"), "fp32")
        == "time: no estimate; the profile states no fp32 peak for this device"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'processor = "rpi4"',
            'processor = "rpi44"',
            r"latencies\.\d+\.processor: 'rpi44' is not among the processors",
        ),
        (
            "latency_s = 1.90921",
            "latency_s = -1",
            r"latencies\.\d+\.latency_s: Input should be greater than 0",
        ),
        ("cores = 4", "corez = 4", r"processors\..*cores?z?: (Field required|Extra inputs)"),
        ("schema = ", "schema == ", "cannot be parsed"),
    ],
)
def test_a_broken_file_of_latencies_is_refused_by_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = PUBLISHED.read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        read_latencies(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00028, "280 µs"),
        (0.0036, "3.6 ms"),
        (0.12, "120 ms"),
        (1.9, "1.9 s"),
        (14.75, "15 s"),
        (0.0996, "100 ms"),
    ],
)
def test_times_are_formatted_with_two_or_three_figures(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
