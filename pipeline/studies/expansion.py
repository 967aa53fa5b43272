"""From a study to its runs, each with a recipe, all validated before the first one starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import InputError
from ..recipe import Recipe, with_values
from ..train_section import FREE_KEYS
from .study_file import Grid, Study, Values, combined

MOST_RUNS = 10_000
ID_DIGITS = 10
Cell = str | int | float | None
# Keys that may change in a run that continues: they count only where a study varies them.
FREE = frozenset(f"train.{key}" for key in FREE_KEYS)


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        id: Hash of its settings: the name of its folder.
        number: Its place in the study, from 1.
        seed: `train.seed`.
        repetition: From 1; runs that differ in nothing else have equal trainings.
        values: The varied keys with the values of its recipe; None where a key is absent.
        recipe: All settings.
    """

    id: str
    number: int
    seed: int
    repetition: int
    values: Values
    recipe: Recipe

    @property
    def cells(self) -> dict[str, Cell]:
        """The varied keys with their values as the table has them."""
        return {key: cell(value) for key, value in self.values.items()}

    @property
    def title(self) -> str:
        """The values and the seed in one line."""
        return f"{settings_text(self.cells)}, seed {self.seed}".removeprefix(", ")


def cell(value: Any) -> Cell:
    """A value of a recipe as a cell: lists are joined by `+`, an empty one is `none`.

    Switches are `true` or `false`, tables are JSON.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(str(cell(each)) for each in value) or "none"
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    if value is None or isinstance(value, int | float | str):
        return value
    return str(value)


def settings_text(cells: Mapping[str, Cell]) -> str:
    """Cells in one line: `masks.lambda=1e-07, masks.sharing=full`."""
    known = ((key, value) for key, value in cells.items() if value is not None)
    return ", ".join(f"{key}={cell_text(value)}" for key, value in known)


def cell_text(value: Cell) -> str:
    """A cell for readers: numbers with at most six digits, nothing for a missing value."""
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def expand(study: Study) -> list[StudyRun]:
    """All runs of a study in order: by seed, by grid, by combination, by repetition.

    Args:
        study: The study.

    Returns:
        The runs; at least one.

    Raises:
        InputError: A key or a value is invalid in one of them, two are equal, or there are none or
            more than ten thousand. The message names the file and the values.
    """
    axes = varied_keys(study)
    section = study.section
    count = sum(math.prod(map(len, grid.factors)) for grid in study.grids)
    count *= len(study.seeds) * section.repetitions
    if count > MOST_RUNS:
        raise InputError(f"{study.path}: {count:,} runs; a study has at most {MOST_RUNS:,}")
    points = [
        (grid, values, with_values(study.base, values, f"{grid.where}: {_of(values, axes)}"))
        for grid in study.grids
        for values in _combinations(grid)
    ]
    found: dict[str, StudyRun] = {}
    for seed, (grid, _, recipe) in itertools.product(study.seeds, points):
        seeded = with_values(recipe, {"train.seed": seed}, grid.where)
        for repetition in range(1, section.repetitions + 1):
            run = _run(study, seeded, axes, len(found) + 1, repetition)
            if run.id in found:
                raise InputError(
                    f"{grid.where}: {run.title} is run {found[run.id].number} already; "
                    "exclude it from one grid"
                )
            found[run.id] = run
    if not found:
        raise InputError(f"{study.path}: [[exclude]] leaves no run; exclude fewer values")
    return list(found.values())


def varied_keys(study: Study) -> list[str]:
    """The keys that differ between the grids or within one, in the order of the file."""
    keys = dict.fromkeys(key for grid in study.grids for key in grid.varied())
    for grid in study.grids:
        for key, value in grid.fixed.items():
            if any(key not in other.fixed or other.fixed[key] != value for other in study.grids):
                keys[key] = None
    return list(keys)


def _combinations(grid: Grid) -> Iterator[Values]:
    for alternatives in itertools.product(*grid.factors):
        values = combined(grid.fixed, alternatives, grid.where)
        if not any(_matches(values, entry) for entry in grid.exclude):
            yield values


def _matches(values: Values, entry: Values) -> bool:
    return all(key in values and values[key] == value for key, value in entry.items())


def _of(values: Values, axes: Sequence[str]) -> str:
    """The values of a combination for an error line; those of [set] where nothing varies."""
    varied = {key: cell(value) for key, value in values.items() if key in axes}
    return settings_text(varied or {key: cell(value) for key, value in values.items()})


def _run(
    study: Study, recipe: Recipe, axes: Sequence[str], number: int, repetition: int
) -> StudyRun:
    tables = recipe.identity()
    identity = {**tables, "name": "", "repetition": repetition}
    identity["train"] = {
        key: value
        for key, value in tables["train"].items()
        if f"train.{key}" not in FREE or f"train.{key}" in axes
    }
    text = json.dumps(identity, sort_keys=True)
    run_id = hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]
    name = f"{study.path.stem}-{run_id}"
    return StudyRun(
        run_id,
        number,
        recipe.train.seed,
        repetition,
        {key: _at(tables, key) for key in axes},
        recipe.model_copy(update={"name": name}),
    )


def _at(tables: Mapping[str, Any], key: str) -> Any:
    value: Any = tables
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
