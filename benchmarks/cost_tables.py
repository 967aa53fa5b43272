"""Cost tables and latencies of files, for benchmarks of latency budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from vitrim.bench.local.measure import measure_here
from vitrim.bench.local.options import MeasureOptions
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.progress import Progress
from vitrim.pipeline.cost_measuring import measure_cost_table
from vitrim.pipeline.cost_networks import sizes_of
from vitrim.pipeline.cost_points import CostRequest
from vitrim.pipeline.latency_loop import Measure, file_measure
from vitrim.targets.cost_table import CostTable


def table_of(dense: CompactModel, path: Path, *, limit_s: float, **request: Any) -> CostTable:
    """The cost table of a file, or a new one that is measured on this machine.

    Args:
        dense: The dense network.
        path: The file.
        limit_s: Seconds of a new table.
        request: Further fields of `CostRequest`.
    """
    if path.is_file():
        return CostTable.load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = CostRequest(sizes=sizes_of(dense.architecture), **request)

    def measure(files: dict[str, Path], chosen: MeasureOptions, progress: Progress) -> Any:
        return measure_here(files, chosen, progress=progress)

    timing = MeasureOptions(threads=wanted.threads, time_limit_s=limit_s)
    return measure_cost_table(wanted, path, measure, options=timing, dense=dense)


def files_of(table: CostTable, images: Tensor, limit_s: float) -> Measure:
    """Measures the file of a network for so many seconds.

    Args:
        table: The cost table, whose runtime, precision and threads the file has.
        images: Normalized images for parity and calibration.
        limit_s: Seconds of a file.
    """

    def measure(files: dict[str, Path], chosen: MeasureOptions, progress: Progress) -> Any:
        chosen = MeasureOptions(threads=chosen.threads, time_limit_s=limit_s)
        return measure_here(files, chosen, progress=progress)

    return file_measure(table, images, measure)
