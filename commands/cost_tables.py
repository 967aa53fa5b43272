"""`vitrim bench --cost-table`: measure the latency of sub-layers on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from ..bench.report.wording import plural
from ..core.console import show
from ..core.errors import InputError
from ..core.storage import Inputs, require_output_file
from .bench_options import COST_TABLE_TIME_LIMIT_S, DEFAULT_BLOCK, How, Table, Where

if TYPE_CHECKING:
    from pathlib import Path

    from ..bench.local.options import MeasureOptions
    from ..bench.results.measurement import Measurement
    from ..compress.network.modules.model import CompactModel
    from ..core.progress import Progress
    from ..pipeline.cost_networks import CostSizes
    from ..targets.cost_table import CostTable


class Output(Protocol):
    """Whether a table is replaced, and what is printed."""

    @property
    def overwrite(self) -> bool:
        """Whether the table may be replaced."""

    @property
    def quiet(self) -> bool:
        """Whether no progress is shown."""


def show_cost_table(
    table: Table, where: Where, how: How, options: MeasureOptions, output: Output, inputs: Inputs
) -> None:
    """Measure a cost table, save it, and show its errors.

    Args:
        table: The options of the table.
        where: The machine that runs the networks.
        how: How they are timed.
        options: The same as values.
        output: Whether the table is replaced, and what is printed.
        inputs: The files that are read, by what they are.

    Raises:
        InputError: An option is invalid, or a network cannot be exported or measured.
    """
    from ..bench.remote.measure import measure_at
    from ..pipeline.cost_measuring import measure_cost_table
    from ..pipeline.cost_points import CostRequest, points_file
    from ..targets.cost_table import COST_TABLE

    path = table.cost_table
    assert path is not None
    if table.like is not None and table.block != DEFAULT_BLOCK:
        raise InputError("--like and --block both give the sizes of the dense network; keep one")
    require_output_file(path, COST_TABLE, overwrite=output.overwrite, inputs=inputs)
    sizes, dense = _sizes(table)
    batches = [size for size in how.batch_sizes() if size is not None] or [1]
    if len(batches) > 1:
        raise InputError(f"--batch {how.batch}: a cost table is of one batch size; give one")
    request = CostRequest(
        sizes=sizes,
        target=where.target,
        runtime=table.runtime,
        precision=table.precision,
        threads=options.threads,
        batch=batches[0],
        most_points=table.points,
        checks=table.checks,
    )
    limit_s = COST_TABLE_TIME_LIMIT_S if how.time_limit_s is None else how.time_limit_s
    options = replace(options, time_limit_s=limit_s, profile_runs=0, dataset=None)
    device = where.device()

    def measure(
        models: dict[str, Path], chosen: MeasureOptions, progress: Progress
    ) -> dict[str, Measurement]:
        return measure_at(where.on, models, chosen, device, target=where.target, progress=progress)

    if points_file(path).exists() and not output.quiet:
        show(f"continuing with the points in {points_file(path)}")
    found = measure_cost_table(
        request, path, measure, options=options, dense=dense, quiet=output.quiet
    )
    _show_errors(found)
    show(f"saved: {path}")
    _show_goal(found, table.points, points_file(path))


def _sizes(table: Table) -> tuple[CostSizes, CompactModel | None]:
    """The sizes of the dense network, and the network of --like."""
    from ..pipeline.cost_networks import CostSizes, sizes_of

    if table.like is None:
        return CostSizes(**table.block_sizes()), None  # type: ignore[arg-type]
    from ..pipeline.source_model import load_folder, require_saved

    if not table.like.is_dir():
        raise InputError(f"{table.like}: no such folder; name a model that vitrim saved")
    require_saved(table.like)
    dense = load_folder(table.like).eval()
    return sizes_of(dense.architecture), dense


def _show_errors(table: CostTable) -> None:
    fitted = sum(point.role == "fit" for point in table.points)
    show(f"{fitted} networks in the fit ({table.title}); tiles of {table.tile} columns")
    if table.held_out is not None:
        show(f"{table.held_out.count} networks held out of the fit: {table.held_out.text()}")
    if table.whole is not None and table.uncorrected is not None:
        scale, offset = table.correction.scale, table.correction.offset_ms
        show(
            f"{table.whole.count} compact networks: {table.whole.text()}; before the correction "
            f"({scale:.3f} x sum {offset:+.3g} ms): {table.uncorrected.text()}"
        )
    solved = sum(point.role == "solved" for point in table.points)
    if table.excess is not None:
        show(
            f"{plural(solved, 'network')} that the solver chose: of those outside of the fit, nine "
            "of ten are at most "
            f"{100 * table.excess:.1f} % slower than predicted, by which a first file aims below "
            "its budget"
        )


def _show_goal(table: CostTable, most_points: int, points: Path) -> None:
    """Print whether the networks held out of the fit are predicted well, and how to continue."""
    from ..pipeline.cost_measuring import MEDIAN, P95, reaches_goal

    goal = f"a median under {100 * MEDIAN:g} % and a 95th percentile under {100 * P95:g} %"
    if reaches_goal(table):
        show(f"the goal is reached: {goal} on networks held out of the fit")
        return
    show(
        f"the goal is NOT reached with --points {most_points}: {goal} on networks held out of the "
        f"fit; the points stay in {points}, and the same command with --points {2 * most_points} "
        "--overwrite continues with them (delete that file to start again)"
    )
