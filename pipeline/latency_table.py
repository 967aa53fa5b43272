"""The cost table of a latency budget: a file, one that ships, or the estimates' operator costs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from ..bench.estimate.cost_table import estimated_table
from ..compress.latency.shapes import network_shape
from ..compress.network.architecture import Architecture
from ..compress.network.patch_grid import format_image_size
from ..core.console import status
from ..core.errors import InputError
from ..targets.catalog import list_targets, load_target
from ..targets.cost_table import CostTable
from ..targets.shipped_tables import shipped_table, tables_of
from .artifacts import Planned, planned_artifacts
from .latency_place import elsewhere
from .recipe import Recipe

# What a choice by a table depends on; its points and the machine's state are not.
_CONTENT = {
    *("target", "runtime", "precision", "threads", "batch", "tile", "costs_ms", "correction"),
    *("whole", "power_w"),
}


@dataclass(frozen=True)
class TableRequest:
    """What a cost table has to be of.

    Attributes:
        file: A table of `vitrim bench --cost-table`; None: a shipped one, or an estimate.
        target: Name of the device profile, or the path of one; None: that of the file, or host.
        runtime: The runtime; None: that of the file, or the profile's preferred one.
        precision: Of the artifacts; not used for a file.
        threads: Of the runtime; not used for a file.
    """

    file: Path | str | None = None
    target: str | None = None
    runtime: str | None = None
    precision: str = "fp32"
    threads: int = 1

    def table(self, dense: Architecture, option: str = "masks.target_runtime") -> CostTable:
        """The table: the file, else one that ships with the package, else an estimate.

        Args:
            dense: The largest network of the search. A shipped table covers its sizes.
            option: The name of the runtime in an error.

        Raises:
            InputError: The file cannot be read, or is of another runtime or target; or there is no
                table and no estimate for the target.
        """
        if self.file is not None:
            return self._read(self.file, option)
        target = self.target or "host"
        profile = load_target(target)
        runtime = self.runtime or profile.preferred_runtime
        shipped = shipped_table(
            target,
            network_shape(dense),
            runtime=runtime,
            precision=self.precision,
            threads=self.threads,
        )
        if shipped is not None:
            return shipped
        return estimated_table(
            profile, runtime=runtime, precision=self.precision, threads=self.threads
        )

    def _read(self, file: Path | str, option: str) -> CostTable:
        found = CostTable.load(file)
        if self.runtime not in (None, found.runtime):
            raise InputError(
                f"{option} = {self.runtime!r}: {file} is of {found.title}; measure one "
                f"with `vitrim bench --cost-table FILE --runtime {self.runtime}`"
            )
        if self.target is not None and _profile_name(self.target) != found.target:
            raise InputError(
                f"--target {self.target} names another device than {file}, which is of "
                f"{found.title}; keep one"
            )
        return found


def optional_table(recipe: Recipe, dense: Architecture) -> CostTable | None:
    """The cost table of `[masks]`; None where the budget is no latency."""
    return recipe_table(recipe, dense) if recipe.masks.has_latency else None


def table_mark(recipe: Recipe) -> str:
    """What the masks depend on where the budget is a latency; else nothing.

    That is the content of the table, and the device that corrects it.
    """
    section = recipe.masks
    if not section.has_latency:
        return ""
    measured = section.latency_rounds and recipe.bench.on is not None
    return _table_content(recipe) + (f", measured on {recipe.bench.on}" if measured else "")


def _table_content(recipe: Recipe) -> str:
    section, export = recipe.masks, recipe.export
    if section.cost_table is not None:
        # A table that cannot be read fails its own run, not the plan of a study.
        with contextlib.suppress(InputError):
            return f" latency by {_digest([CostTable.load(section.cost_table)])}"
        return " latency by no table"
    parts = (export.target, export.runtimes[0], export.precisions[0], recipe.bench.threads)
    mark = f" latency of {' '.join(map(str, parts))}"
    tables: list[CostTable] = []
    with contextlib.suppress(InputError):
        tables += _candidates(recipe)
    return f"{mark} by {_digest(tables)}" if tables else mark


def _candidates(recipe: Recipe) -> Iterator[CostTable]:
    """The tables without a file, of which one is taken by the network, which is in the hash."""
    target, threads = recipe.export.target, recipe.bench.threads
    runtime = recipe.masks.target_runtime or recipe.export.runtimes[0]
    precision = _precision(recipe, runtime)
    yield from tables_of(target, runtime=runtime, precision=precision, threads=threads)
    if target != "host":
        # The clock of this machine, and with it an estimate, may be another one each time.
        yield estimated_table(
            load_target(target), runtime=runtime, precision=precision, threads=threads
        )


def recipe_table(recipe: Recipe, dense: Architecture) -> CostTable:
    """The cost table of `[masks]`; without a file, that of the first artifact of `[export]`.

    Args:
        recipe: The recipe.
        dense: The dense network.

    Raises:
        InputError: It cannot be read, there is none, no artifact of the recipe is of it, or it
            would be extrapolated and nothing measured.
    """
    section = recipe.masks
    runtime = section.target_runtime
    if section.cost_table is None:
        if recipe.bench.on is not None and recipe.export.target == "host":
            raise InputError(
                "bench.on: the cost table without a file is of this machine, not of the device; "
                "name the device's target in export.target, or its table in masks.cost_table"
            )
        runtime = runtime or recipe.export.runtimes[0]
    found = TableRequest(
        section.cost_table,
        None if section.cost_table is not None else recipe.export.target,
        runtime,
        recipe.export.precisions[0] if runtime is None else _precision(recipe, runtime),
        recipe.bench.threads,
    ).table(dense)
    _require_size(recipe, dense)
    _artifact_of(recipe, found)
    beyond = found.beyond(network_shape(dense))
    if beyond is not None and not is_measured(recipe, found):
        raise InputError(
            f"{_extrapolated(recipe, beyond)}, or let the cut be measured with "
            "masks.latency_rounds on a target that this machine is, or on a device (bench.on)"
        )
    return found


def is_measured(recipe: Recipe, table: CostTable) -> bool:
    """Whether files of the cut are measured, here or on `bench.on`, and the budget corrected."""
    place = (recipe.export.target, recipe.bench.on)
    return recipe.masks.latency_rounds > 0 and elsewhere(table, *place) is None


def show_reach(recipe: Recipe, dense: Architecture, table: CostTable, *, quiet: bool) -> None:
    """Print which sizes of the dense network a cost table extrapolates to, if there are any.

    Args:
        recipe: The recipe.
        dense: The dense network.
        table: The table, of `recipe_table`.
        quiet: Print nothing.
    """
    beyond = table.beyond(network_shape(dense))
    if beyond is not None:
        status(escape(f"{_extrapolated(recipe, beyond)}; the cut is measured"), quiet=quiet)


def shipped_artifact(recipe: Recipe, dense: Architecture) -> str | None:
    """The artifact that a latency is the budget of; None where its device is not measured.

    Args:
        recipe: The recipe.
        dense: The dense network.
    """
    table = optional_table(recipe, dense)
    if table is None or elsewhere(table, recipe.export.target, recipe.bench.on) is not None:
        return None
    return _artifact_of(recipe, table).name


def extrapolation(file: Path | str, beyond: str) -> str:
    """A line on costs that a table extrapolates, and how to measure others.

    Args:
        file: The table.
        beyond: What `CostTable.beyond` returned.
    """
    return (
        f"{file} extrapolates to {beyond}: measure a table of this network with `vitrim bench "
        "--cost-table FILE --like MODEL`"
    )


def _extrapolated(recipe: Recipe, beyond: str) -> str:
    return f"masks.cost_table = {extrapolation(recipe.masks.cost_table or '', beyond)}"


def _compact_artifacts(recipe: Recipe) -> list[Planned]:
    plans = planned_artifacts(recipe.export).values()
    return [plan for plan in plans if plan.model == "compact"]


def _precision(recipe: Recipe, runtime: str) -> str:
    """The precision of the first compact artifact of a runtime, or of any."""
    wanted = [plan.precision for plan in _compact_artifacts(recipe) if plan.runtime == runtime]
    return (wanted or recipe.export.precisions)[0]


def _artifact_of(recipe: Recipe, table: CostTable) -> Planned:
    """The planned artifact of the compact model that a cost table is of.

    Raises:
        InputError: There is none; the message has both sides and what to change.
    """
    export, threads, section = recipe.export, recipe.bench.threads, recipe.masks
    plans = _compact_artifacts(recipe)
    # A table that ships for this machine has the name of its class.
    target = _profile_name(export.target) if section.cost_table is not None else table.target
    # A file with a dynamic batch is measured with one image.
    batch = 1 if export.batch == "dynamic" else export.batch
    nearest = max(
        plans, key=lambda plan: (plan.runtime == table.runtime, plan.precision == table.precision)
    )
    given = {
        "export.runtimes": (table.runtime, nearest.runtime),
        "export.precisions": (table.precision, nearest.precision),
        "export.target": (table.target, target),
        "bench.threads": (table.threads, threads),
        "export.batch": (table.batch, batch),
    }
    other = {key: values for key, values in given.items() if values[0] != values[1]}
    if not other:
        return nearest
    what = f'masks.cost_table = "{section.cost_table}"'
    if section.cost_table is None:
        runtime = f'masks.target_runtime = "{section.target_runtime}"'
        what = runtime if "export.runtimes" in other else "the cost table without a file"
    options = (
        f"--target {export.target} --runtime {nearest.runtime} --precision {nearest.precision} "
        f"--threads {threads} --batch {batch}"
    )
    keys = " and ".join(f"{key} = {_toml(key, values[0])}" for key, values in other.items())
    raise InputError(
        f"{what} is of {_sides(values[0] for values in given.values())}, and no artifact of the "
        f"run is ({nearest.name}: {_sides(values[1] for values in given.values())}); write {keys}, "
        f"or measure a table with `vitrim bench --cost-table FILE {options}`"
    )


def _require_size(recipe: Recipe, dense: Architecture) -> None:
    """Check that artifacts have the image size that the latency is of."""
    size = recipe.export.image_size
    if size is not None and tuple(size) != tuple(dense.image[1:]):
        raise InputError(
            f"export.image_size = {format_image_size(size)}: the latency of [masks] is that of "
            f"{format_image_size(dense.image[1:])}, and artifacts of another size have another; "
            "leave it out, or train at that size"
        )


def _sides(values: Iterable[object]) -> str:
    runtime, precision, target, threads, batch = values
    count = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{runtime} {precision} on {target}, {count}, batch {batch}"


def _toml(key: str, value: object) -> str:
    if key == "export.target" and value not in ("host", *list_targets()):
        return f"the TOML of {value}"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"[{text}]" if key in ("export.runtimes", "export.precisions") else text


def _profile_name(target: str) -> str:
    # The profile of `host` would have to be detected.
    return target if target == "host" else load_target(target).name


def _digest(tables: Iterable[CostTable]) -> str:
    content = [table.model_dump(mode="json", include=_CONTENT) for table in tables]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
