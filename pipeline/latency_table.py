"""The cost table of a latency budget: a file, one that ships, or the estimates' operator costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bench.estimate.cost_table import estimated_table
from ..compress.latency.shapes import network_shape
from ..compress.network.architecture import Architecture
from ..core.errors import InputError
from ..targets.catalog import load_target
from ..targets.cost_table import CostTable
from ..targets.shipped_tables import shipped_table
from .recipe import Recipe


@dataclass(frozen=True)
class TableRequest:
    """What a cost table has to be of.

    Attributes:
        file: A table of `vitrim bench --cost-table`; None: a shipped one, or an estimate.
        target: Name of the device profile, or the path of one.
        runtime: The runtime; None: that of the file, or the profile's preferred one.
        precision: Of the artifacts; not used for a file.
        threads: Of the runtime; not used for a file.
    """

    file: Path | str | None = None
    target: str = "host"
    runtime: str | None = None
    precision: str = "fp32"
    threads: int = 1

    def table(self, dense: Architecture, option: str = "masks.target_runtime") -> CostTable:
        """The table: the file, else one that ships with the package, else an estimate.

        Args:
            dense: The largest network that it is asked for. A shipped table covers its sizes.
            option: The name of the runtime in an error.

        Raises:
            InputError: The file cannot be read, or is of another runtime; or there is no table
                and no estimate for the target.
        """
        if self.file is not None:
            found = CostTable.load(self.file)
            if self.runtime not in (None, found.runtime):
                raise InputError(
                    f"{option} = {self.runtime!r}: {self.file} is of {found.title}; measure one "
                    f"with `vitrim bench --cost-table FILE --runtime {self.runtime}`"
                )
            return found
        profile = load_target(self.target)
        runtime = self.runtime or profile.preferred_runtime
        shipped = shipped_table(
            self.target,
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


def optional_table(recipe: Recipe, dense: Architecture) -> CostTable | None:
    """The cost table of `[masks]`; None where the budget is no latency."""
    return recipe_table(recipe, dense) if recipe.masks.has_latency else None


def table_mark(recipe: Recipe) -> str:
    """What the masks depend on where a latency has no file of a cost table; else nothing."""
    if not recipe.masks.has_latency or recipe.masks.cost_table is not None:
        return ""
    export = recipe.export
    parts = (export.target, export.runtimes[0], export.precisions[0], recipe.bench.threads)
    return f" latency of {' '.join(map(str, parts))}"


def recipe_table(recipe: Recipe, dense: Architecture) -> CostTable:
    """The cost table of `[masks]`; without a file, that of the first artifact of `[export]`.

    Args:
        recipe: The recipe.
        dense: The dense network.

    Raises:
        InputError: It cannot be read, it is of another runtime, or there is none.
    """
    section = recipe.masks
    return TableRequest(
        section.cost_table,
        recipe.export.target,
        section.target_runtime or (None if section.cost_table else recipe.export.runtimes[0]),
        recipe.export.precisions[0],
        recipe.bench.threads,
    ).table(dense)
