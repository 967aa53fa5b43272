"""Measure a cost table: exported networks, chosen where the fit is least sure, saved as they come.

Points that were measured are appended to a file beside the table, so that an interrupted
measurement continues. It stops when the held-out networks are predicted well, or at a number of
networks; then random compact networks, and as many that the solver chooses by the costs, check the
sums of sub-layers, and a correction is learned. Half of the solver's are part of the fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bench.local.measure import target_features, target_name
from ..bench.local.options import MeasureOptions
from ..bench.results.measurement import Measurement
from ..compress.latency.shapes import network_shape
from ..compress.latency.trial import trial_network
from ..compress.network.modules.model import CompactModel
from ..core.progress import Progress, progress_bar
from ..export.exporter import export
from ..targets.catalog import load_target
from ..targets.cost_fit import Fit, fit_correction, fit_costs, least_sure
from ..targets.cost_parts import NetworkShape
from ..targets.cost_table import Correction, CostTable, Errors, MeasuredNetwork, Role
from .cost_networks import (
    compact_networks,
    dense_model,
    first_shapes,
    network_of,
    random_shapes,
)
from .cost_points import (
    BATCH,
    FIRST,
    FITTED,
    HELD_OUT,
    About,
    CostRequest,
    append_points,
    points_file,
    read_points,
)

# The dense network, which is measured with each of these groups.
REFERENCE = "reference"
# Fewest networks held out before it may stop; networks to choose from.
FEWEST_HELD_OUT, POOL = 10, 300
# Errors of the held-out networks at which measuring stops.
MEDIAN, P95 = 0.02, 0.06
CALIBRATION_IMAGES = 16
# Latencies of the networks that the solver chooses, as shares of the dense one's.
LARGEST, SMALLEST, ROUND_TO = 0.9, 0.3, 8
# Of their excesses over the prediction.
QUANTILE = 0.9
Measure = Callable[[dict[str, Path], MeasureOptions, Progress], dict[str, Measurement]]


def measure_cost_table(
    request: CostRequest,
    path: Path,
    measure: Measure,
    *,
    options: MeasureOptions | None = None,
    dense: CompactModel | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
) -> CostTable:
    """Measure a cost table and save it; an interrupted measurement of the same request continues.

    Args:
        request: What is measured.
        path: The file of the table. The points are in a file beside it until the goal is reached,
            so that a larger number continues with them.
        measure: Measures {name: artifact folder} with these options and progress.
        options: How networks are timed; its time limit is that of all networks together.
        dense: The network whose cuts check the sums. None: one of the sizes of the request.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        The saved table.

    Raises:
        InputError: A network cannot be exported or measured, or the points are of another request.
    """
    options = options or MeasureOptions(threads=request.threads)
    with (
        progress_bar(quiet=quiet, replacement=progress) as report,
        tempfile.TemporaryDirectory(prefix="vitrim-cost-") as folder,
    ):
        run = _Run(request, points_file(path), measure, options, report, Path(folder))
        run.measure_fit()
        network = dense or dense_model(request.sizes)
        run.check(network)
        run.check_solver(network)
        table = run.table()
    table.save(path)
    if reaches_goal(table):
        run.file.unlink(missing_ok=True)
    return table


def reaches_goal(table: CostTable) -> bool:
    """Whether the networks held out of the fit are predicted as well as a measurement aims at."""
    return _good(table.held_out)


def _good(errors: Errors | None) -> bool:
    if errors is None or errors.count < FEWEST_HELD_OUT:
        return False
    return errors.median < MEDIAN and errors.p95 < P95


class _Run:
    """The measurement of one table, with the points that are measured so far."""

    def __init__(
        self,
        request: CostRequest,
        file: Path,
        measure: Measure,
        options: MeasureOptions,
        report: Progress,
        folder: Path,
    ) -> None:
        self.request, self.file, self.measure, self.report = request, file, measure, report
        self.folder = folder
        total = _most(request)
        limit_s = options.time_limit_s * BATCH / total
        self.options = MeasureOptions(**{**vars(options), "time_limit_s": limit_s})
        self.tiles = _tiles(request.target)
        self.points, self.about = read_points(file, request)

    @cached_property
    def reference(self) -> Path:
        """The exported dense network, which is measured with every group."""
        file = self.folder / REFERENCE
        self._export(dense_model(self.request.sizes), file)
        return file

    def of_role(self, *roles: Role) -> list[MeasuredNetwork]:
        """The points of these roles, at one speed of the machine."""
        return [point for point in leveled(self.points) if point.role in roles]

    def measure_fit(self) -> None:
        """Measure until the held-out networks are predicted well, or at the limit of points."""
        request = self.request
        first = first_shapes(request.sizes, FIRST, request.seed)
        while True:
            known = len(self.of_role("fit"))
            if known < FIRST:
                shapes, fit = first[known : known + FITTED], None
            else:
                fit = fit_costs(leveled(self.points), self.tiles)
                if self._done(fit):
                    return
                pool = random_shapes(request.sizes, POOL, request.seed + 1 + len(self.points))
                shapes = [pool[place] for place in least_sure(fit, pool, FITTED)]
            seed = request.seed + 1_000_003 + len(self.points)
            others = random_shapes(request.sizes, HELD_OUT, seed)
            roles: list[Role] = ["fit" for _ in shapes]
            roles += ["held-out" for _ in others]
            every = [*shapes, *others]
            self._measure(every, [network_of(request.sizes, each) for each in every], roles, fit)

    def _done(self, fit: Fit) -> bool:
        held_out = self.of_role("held-out")
        if len(self.of_role("fit", "held-out")) + BATCH > self.request.most_points:
            return True
        return _good(fit.errors(held_out))

    def check(self, dense: CompactModel) -> None:
        """Measure the compact networks that are missing."""
        networks = compact_networks(dense, self.request.checks, self.request.seed)
        while len(found := self.of_role("check")) < len(networks):
            part = networks[len(found) : len(found) + BATCH]
            shapes, models = [shape for shape, _ in part], [model for _, model in part]
            self._measure(shapes, models, ["check"] * len(part), None)

    def check_solver(self, dense: CompactModel) -> None:
        """Measure the networks of the solver that are missing, each group by all costs so far."""
        shares = np.linspace(LARGEST, SMALLEST, self.request.checks)
        # Each group has large and small ones.
        shares = np.random.default_rng(self.request.seed).permutation(shares)
        # Where patches cannot leave, all of them are of widths.
        leaves = dense.architecture.pool.kind != "none" and not self.request.sizes.selects
        place = len(self.of_role("solved"))
        while place < len(shares):
            table = self.table()
            dense_ms = table.latency_ms(network_shape(dense.architecture))
            part: list[CompactModel] = []
            while place < len(shares) and len(part) < BATCH:
                share = float(shares[place])
                rng = np.random.default_rng((self.request.seed, place))
                tokens = leaves and place % 2 == 0
                found = trial_network(
                    dense, share * dense_ms, table, ROUND_TO, tokens=tokens, rng=rng
                )
                part += [] if found is None else [found]
                place += 1
            if part:
                shapes = [network_shape(each.architecture) for each in part]
                self._measure(shapes, part, ["solved"] * len(part), None)

    def _measure(
        self,
        shapes: Sequence[NetworkShape],
        models: Sequence[CompactModel],
        roles: Sequence[Role],
        fit: Fit | None,
    ) -> None:
        done, total = len(self.points), _most(self.request)
        compact = roles[0] in ("check", "solved")
        text = "compact networks" if compact else _progress_text(fit, self.points)
        # Fewer networks than an earlier attempt measured are complete at once.
        begun, share = min(1.0, done / total), len(shapes) / total
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            files = {str(number): Path(folder) / str(number) for number in range(len(models))}
            for number, (model, file) in enumerate(zip(models, files.values(), strict=True)):
                self.report(begun + 0.5 * share * number / len(models), f"exporting: {text}")
                self._export(model, file)
            found = self.measure(
                {**files, REFERENCE: self.reference},
                self.options,
                lambda part, _: self.report(begun + share * (0.5 + 0.5 * part), text),
            )
        latencies = [1e3 * found[name].summary().p50_s for name in files]
        reference_ms = 1e3 * found[REFERENCE].summary().p50_s
        points = [
            MeasuredNetwork(network=shape, latency_ms=latency, role=role, reference_ms=reference_ms)
            for shape, latency, role in zip(shapes, latencies, roles, strict=True)
        ]
        last = found[next(iter(files))]
        powers_w = [
            measured.energy_per_inference_j / measured.summary().p50_s
            for measured in found.values()
            if measured.energy_per_inference_j
        ]
        self.about = About(
            runtime_version=last.runtime_version,
            environment=last.environment.model_dump(mode="json"),
            powers_w=(*self.about.powers_w, *powers_w),
        )
        append_points(self.file, self.request, points, self.about)
        self.points += points

    def _export(self, model: CompactModel, folder: Path) -> None:
        request = self.request
        images = None
        if request.precision == "int8-static":
            generator = torch.Generator().manual_seed(0)
            size = (CALIBRATION_IMAGES, *model.architecture.image)
            images = torch.randn(size, generator=generator)
        export(
            model,
            folder,
            target=request.target,
            runtime=request.runtime,
            precision=request.precision,  # type: ignore[arg-type]
            batch=request.batch,
            threads=request.threads,
            images=images,
        )

    def table(self) -> CostTable:
        """The table with its errors and its correction."""
        solved = self.of_role("solved")
        half = min(self.request.checks // 2, len(solved))
        # The costs are fitted to the first half of them, too: they are where costs are used.
        fitted = [point.model_copy(update={"role": "fit"}) for point in solved[:half]]
        # Each later group of networks moves the speed that the points are stated at.
        fit = fit_costs([*leveled(self.points), *fitted], self.tiles)
        request, about = self.request, self.about
        held_out = self.of_role("held-out")
        target = target_name(request.target)
        found = CostTable(
            target=target,
            target_features=target_features(target),
            runtime=request.runtime,
            runtime_version=about.runtime_version,
            precision=request.precision,
            threads=request.threads,
            batch=request.batch,
            tile=fit.tile,
            costs_ms=fit.costs,
            points=tuple(leveled(self.points)),
            held_out=fit.errors(held_out),
            environment=about.environment,
            power_w=float(np.median(about.powers_w)) if about.powers_w else None,
        )
        return found.model_copy(update=_checked(fit, self.of_role("check"), solved[half:]))


def _most(request: CostRequest) -> int:
    """The largest number of networks that are measured."""
    return request.most_points + 2 * request.checks


def _checked(
    fit: Fit, checks: Sequence[MeasuredNetwork], solved: Sequence[MeasuredNetwork]
) -> dict[str, Any]:
    """The correction, and the errors of whole networks, as fields of a table.

    Args:
        fit: The costs.
        checks: Random compact networks.
        solved: Networks of the solver.
    """
    networks = [*checks, *solved]
    if not networks:
        return {}
    predicted = fit.predict([point.network for point in networks])
    measured = np.array([point.latency_ms for point in networks])
    correction, corrected = fit_correction(predicted, measured)
    if Errors.of(corrected, measured).median >= Errors.of(predicted, measured).median:
        # Fitted to the noise of few networks, a correction makes others worse.
        correction, corrected = Correction(), predicted
    update: dict[str, Any] = {"correction": correction}
    count = len(checks)
    if checks:
        update["whole"] = Errors.of(corrected[:count], measured[:count])
        update["uncorrected"] = Errors.of(predicted[:count], measured[:count])
    if solved:
        over = measured[count:] / corrected[count:] - 1
        update["excess"] = float(np.quantile(over, QUANTILE))
    return update


def leveled(points: Sequence[MeasuredNetwork]) -> list[MeasuredNetwork]:
    """The points as if the machine had had one speed.

    Networks that are measured together share the speed of that moment, and minutes later the clock
    of the processor or the load is another one. The reference, which is measured with each of them,
    shows it: latencies are multiplied by its median over its own.
    """
    references = [point.reference_ms for point in points if point.reference_ms is not None]
    if not references:
        return list(points)
    middle = float(np.median(references))
    return [
        point
        if point.reference_ms is None
        else point.model_copy(
            update={
                "latency_ms": point.latency_ms * middle / point.reference_ms,
                "reference_ms": None,
            }
        )
        for point in points
    ]


def _progress_text(fit: Fit | None, points: Sequence[MeasuredNetwork]) -> str:
    held_out = [point for point in leveled(points) if point.role == "held-out"]
    errors = None if fit is None else fit.errors(held_out)
    if errors is None:
        return "first networks"
    return f"held-out error {100 * errors.median:.1f} %, p95 {100 * errors.p95:.1f} %"


def _tiles(target: str) -> list[int]:
    """The tiles to choose from: no tile, and multiples of the processor's vectors."""
    lanes = load_target(target).vector.lanes
    return list(dict.fromkeys([1, *(lanes * factor for factor in (1, 2, 4))]))
