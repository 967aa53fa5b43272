"""The closed loop: what is measured corrects the budget, and the best measured cut is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from latency_tables import latency_table
from vitrim.core.errors import InputError
from vitrim.pipeline import latency_loop
from vitrim.pipeline.cost_networks import CostSizes, dense_model
from vitrim.pipeline.latency_loop import cut_to_latency
from vitrim.targets.cost_parts import AttentionShape, FfnShape, NetworkShape
from vitrim.targets.cost_table import Errors, MeasuredNetwork


class Model(float):
    """A model that is its latency by the table."""

    architecture: ClassVar[Any] = dense_model(
        CostSizes(5, 8, 1, 8, 8, 1, patch=4, channels=1, classes=2)
    ).architecture


class Cuts:
    """Cuts whose table latency is the budget, down to a least one."""

    def __init__(self, least_ms: float = 0.0) -> None:
        self.table, self.least_ms, self.budgets = latency_table(), least_ms, list[float]()

    def cut(self, latency_ms: float) -> Any:
        if latency_ms < self.least_ms:
            raise InputError("too small")
        self.budgets.append(latency_ms)
        return SimpleNamespace(model=Model(latency_ms), latency_ms=latency_ms)


def loop(cuts: Cuts, factor: float, rounds: int = 3) -> Any:
    """Measured latencies are a factor of the table's."""

    def measure(model: Any) -> float:
        return float(factor * model)

    return cut_to_latency(cuts, 2.0, measure, rounds)  # type: ignore[arg-type]


def test_a_cut_within_the_budget_is_kept_at_once() -> None:
    cuts = Cuts()
    cut, record = loop(cuts, 0.97)
    assert cuts.budgets == [2.0]
    assert cut.latency_ms == 2.0
    assert record.met
    assert record.measured_ms == pytest.approx(1.94)
    assert record.text() == (
        "latency: budget 2 ms, 2 ms by the table, measured 1.94 ms after the first cut: met"
    )


@pytest.mark.parametrize("factor", [1.3, 0.5])
def test_a_slower_and_a_faster_file_correct_the_budget(factor: float) -> None:
    cuts = Cuts()
    _, record = loop(cuts, factor)
    assert len(cuts.budgets) == 2
    assert record.met
    assert 0.92 * 2.0 <= record.measured_ms <= 2.0
    assert [each.budget_ms for each in record.rounds] == cuts.budgets
    assert "after 2 cuts: met" in record.text()


def test_a_budget_that_is_not_met_is_reported_with_the_fastest_cut() -> None:
    _, record = loop(Cuts(least_ms=1.9), 1.3)
    assert record.met is False
    assert record.measured_ms == pytest.approx(2.6)
    assert record.text().endswith("measured 2.6 ms after the first cut: NOT met")
    assert record.record()["met"] is False
    _, record = loop(Cuts(), 1.3, rounds=1)
    assert record.met is False


def test_without_a_measurement_the_record_has_none() -> None:
    _, record = cut_to_latency(Cuts(), 2.0)  # type: ignore[arg-type]
    assert record.met is None
    assert record.text() == "latency: budget 2 ms, 2 ms by the table, not measured"


def test_the_slowest_cut_within_the_budget_is_kept() -> None:
    measured = iter([1.0, 2.5, 1.9])
    _, record = cut_to_latency(Cuts(), 2.0, lambda model: next(measured))  # type: ignore[arg-type]
    assert record.measured_ms == 1.9
    assert len(record.rounds) == 3


@pytest.mark.parametrize(("p95", "first"), [(0.01, 1.96), (0.5, 1.86)])
def test_the_first_cut_aims_below_the_budget_by_the_tables_error(p95: float, first: float) -> None:
    errors = Errors(count=20, median=p95 / 2, p95=p95, largest=p95)
    cuts = Cuts()
    cuts.table = cuts.table.model_copy(update={"whole": errors})
    _, record = loop(cuts, 1.01)
    assert cuts.budgets == pytest.approx([first])
    assert record.met
    # The smallest network lies between the two.
    cuts = Cuts(least_ms=1.99)
    cuts.table = cuts.table.model_copy(update={"whole": errors})
    _, record = loop(cuts, 0.99)
    assert cuts.budgets == [2.0]
    assert record.met


@pytest.mark.parametrize(("excess", "first"), [(-0.05, 2 / 1.01), (0.09, 2 / 1.1), (0.9, 1.6)])
def test_the_first_cut_aims_below_the_budget_by_what_the_solvers_networks_exceed(
    excess: float, first: float
) -> None:
    cuts = Cuts()
    errors = Errors(count=20, median=0.01, p95=0.5, largest=0.5)
    cuts.table = cuts.table.model_copy(update={"whole": errors, "excess": excess})
    _, record = loop(cuts, 1.01)
    assert cuts.budgets[0] == pytest.approx(first)
    assert record.met


def test_a_disturbed_measurement_is_repeated() -> None:
    measured = iter([2.6, 1.95])
    cuts = Cuts()
    _, record = cut_to_latency(cuts, 2.0, lambda model: next(measured))  # type: ignore[arg-type]
    assert cuts.budgets == [2.0]
    assert record.measured_ms == 1.95


def _network(tokens: int, hidden: int) -> NetworkShape:
    attention = AttentionShape(tokens_in=tokens, tokens_out=tokens, heads=4, qk=16, v=16)
    ffn = FfnShape(tokens=tokens, hidden=hidden)
    return NetworkShape(embed=64, tokens=50, pixels=16, classes=10, sublayers=(attention, ffn) * 4)


def test_two_kinds_of_networks_that_the_table_misjudges_differently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Networks of few tokens take half of what the table says; those of small FFNs all of it.
    few = [_network(tokens, 256) for tokens in range(4, 49, 2)]
    small = [_network(50, hidden) for hidden in range(16, 260, 16)]
    points = tuple(
        MeasuredNetwork(network=each, latency_ms=latency_table().sum_ms(each))
        for each in [*few[::3], *small]
    )
    table = latency_table(points=points)

    def measure(model: Any) -> float:
        shape = model.architecture
        wrong = shape.sublayers[0].tokens_in < 50
        return latency_table().latency_ms(shape) * (0.5 if wrong else 1.0)

    class Kinds:
        """Of the networks within the budget, one of few tokens where there is a small one."""

        def __init__(self) -> None:
            self.table, self.budgets = table, list[float]()

        def cut(self, latency_ms: float) -> Any:
            self.budgets.append(latency_ms)
            kinds = [
                [each for each in kind if self.table.latency_ms(each) <= latency_ms]
                for kind in (few, small)
            ]
            if not any(kinds):
                raise InputError("too small")
            # Each budget wins the other kind, as losses that are nearly equal do.
            kind = kinds[len(self.budgets) % 2] or kinds[0] or kinds[1]
            shape = max(kind, key=self.table.latency_ms)
            model = SimpleNamespace(architecture=shape)
            return SimpleNamespace(model=model, latency_ms=self.table.latency_ms(shape))

    monkeypatch.setattr(latency_loop, "network_shape", lambda shape: shape)
    budget_ms = 0.6 * table.latency_ms(small[-1])
    cuts = Kinds()
    _, record = cut_to_latency(cuts, budget_ms, measure, 3)  # type: ignore[arg-type]
    assert record.met
    assert record.measured_ms is not None
    assert record.measured_ms > 0.85 * budget_ms
    assert cuts.table is table
