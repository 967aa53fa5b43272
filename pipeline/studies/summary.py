"""What the rows of a study show: means over seeds, Pareto fronts, and who is on them."""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..recipe import SIZE_KEYS
from .expansion import Cell
from .table import FIGURE_COLUMNS, RUN_COLUMNS, Column, Row, StudyTable


@dataclass(frozen=True)
class Group:
    """The finished runs that differ in the seed and the repetition only.

    Attributes:
        cells: Their values of the axes.
        rows: One for each run.
    """

    cells: dict[str, Cell]
    rows: tuple[Row, ...]

    def mean(self, figure: str) -> float | None:
        """The mean of a column over the runs that have it."""
        values = numbers(self.rows, figure)
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """The sample standard deviation; None for fewer than two runs."""
        values = numbers(self.rows, figure)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Summary:
    """The contents of a study's table, arranged.

    Attributes:
        facts: The entries of the table `study`.
        columns: All columns.
        rows: All rows in the order of the study.
        groups: The finished runs by setting, in the order of the study.
        fronts: Cost column -> seed -> ids of the runs on the Pareto front of that seed, by cost.
        beside: Dense models beside the study.
    """

    facts: dict[str, str]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    fronts: dict[str, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    beside: tuple[Row, ...] = ()

    @cached_property
    def name(self) -> str:
        """The title of the study."""
        return self.facts.get("name", "study")

    @cached_property
    def published_top1(self) -> dict[str, float]:
        """Published accuracies of the models beside, by name, which the study file states."""
        known = {str(row["name"]) for row in self.beside}
        stated = tomllib.loads(self.facts.get("toml", "")).get("published_top1", {})
        return {name: float(top1) for name, top1 in stated.items() if name in known}

    @cached_property
    def axes(self) -> list[str]:
        """The names of the columns that vary."""
        return [column.name for column in self.columns if column.kind == "axis"]

    @cached_property
    def sizes(self) -> list[str]:
        """The columns of the sizes in which runs may differ."""
        # Where single weights are zero, all models have the shape of the dense one.
        zeros = numbers(self.done, "params_nonzero")
        return ["params_nonzero"] if zeros else ["params", "macs"]

    @cached_property
    def latencies(self) -> list[str]:
        """The columns of median latencies of compact artifacts, and of exactly cut ones."""
        names = [column.name for column in self.columns if column.kind == "figure"]
        first = ("compact_", "exact_")
        return [name for name in names if name.startswith(first) and name.endswith("_ms")]

    @cached_property
    def memories(self) -> list[str]:
        """The columns of the memory of compact artifacts."""
        names = [column.name for column in self.columns if column.kind == "figure"]
        return [n for n in names if n.startswith("compact_") and n.endswith("_memory_bytes")]

    @cached_property
    def quality(self) -> str:
        """The accuracy that is compared: of the test images where they were used."""
        return "top1" if numbers(self.done, "top1") else "val_top1"

    @cached_property
    def done(self) -> list[Row]:
        """The rows of finished runs."""
        return [row for row in self.rows if row["state"] == "done"]

    @cached_property
    def failed(self) -> list[Row]:
        """The rows of failed runs."""
        return [row for row in self.rows if row["state"] == "failed"]

    @cached_property
    def stopped(self) -> list[Row]:
        """The rows of runs that were stopped since others were better."""
        return [row for row in self.rows if row["state"] == "stopped"]

    @cached_property
    def configurations(self) -> list[str]:
        """The axes other than the one that sets the size."""
        return [axis for axis in self.axes if axis not in size_axes()]


def size_axes() -> set[str]:
    """The recipe keys that set the size of the compact model."""
    return {f"masks.{key}" for key in SIZE_KEYS}


def summarise(table: StudyTable) -> Summary:
    """Arrange the rows of a table.

    Args:
        table: The table of a study.

    Returns:
        The summary, with fronts of accuracy by parameters, multiply-adds and each latency.
    """
    columns, rows = tuple(table.columns()), tuple(table.rows())
    axes = [column.name for column in columns if column.kind == "axis"]
    done = [row for row in rows if row["state"] == "done"]
    found = Summary(table.facts(), columns, rows, tuple(grouped(done, axes)))
    fronts = {
        cost: fronts_by_seed(done, cost, found.quality)
        for cost in (*found.sizes, *found.latencies)
        # Without an accuracy there is nothing to compare it with.
        if any(None not in (row.get(cost), row.get(found.quality)) for row in done)
    }
    beside = tuple(table.beside())
    return Summary(found.facts, columns, rows, found.groups, fronts, beside)


def grouped(rows: Sequence[Row], keys: Sequence[str]) -> list[Group]:
    """Rows with equal values of some columns, in the order of their first row."""
    found: dict[tuple[Cell, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        Group(dict(zip(keys, values, strict=True)), tuple(members))
        for values, members in found.items()
    ]


def fronts_by_seed(rows: Sequence[Row], cost: str, quality: str) -> dict[int, tuple[str, ...]]:
    """The Pareto front of each seed: ids of the runs that none beats in both, by rising cost."""
    seeds = sorted({int(row["seed"] or 0) for row in rows})
    return {
        seed: tuple(
            str(row["id"])
            for row in pareto([row for row in rows if row["seed"] == seed], cost, quality)
        )
        for seed in seeds
    }


def pareto(rows: Sequence[Row], cost: str, quality: str) -> list[Row]:
    """The rows that no other one beats in cost and quality, by rising cost."""
    known = [row for row in rows if row.get(cost) is not None and row.get(quality) is not None]
    front: list[Row] = []
    best = float("-inf")
    for row in sorted(known, key=lambda row: (number(row[cost]), -number(row[quality]))):
        if number(row[quality]) > best:
            front.append(row)
            best = number(row[quality])
    return front


def on_fronts(summary: Summary, cost: str) -> list[tuple[Group, int]]:
    """How many runs of each configuration are on the fronts of their seeds, the most first."""
    on_any = {run for front in summary.fronts.get(cost, {}).values() for run in front}
    groups = grouped(summary.done, summary.configurations)
    counts = [(group, sum(row["id"] in on_any for row in group.rows)) for group in groups]
    return sorted(counts, key=lambda item: -item[1])


def numbers(rows: Sequence[Row], figure: str) -> list[float]:
    """The values of a column that are numbers."""
    return [number(row[figure]) for row in rows if isinstance(row.get(figure), int | float)]


def number(value: Cell) -> float:
    """A cell that is a number."""
    return float(value or 0.0)


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """Axes by their last part where that is unique: `masks.lambda` -> `lambda`."""
    last = [axis.rpartition(".")[2] for axis in axes]
    taken = {column.name for column in (*RUN_COLUMNS, *FIGURE_COLUMNS)}
    return {
        axis: name if last.count(name) == 1 and name not in taken else axis
        for axis, name in zip(axes, last, strict=True)
    }
