"""Measure a cost table: exported networks, chosen where the fit is least sure, saved as they come.

Points that were measured are appended to a file beside the table, so that an interrupted
measurement continues. It stops when the held-out networks are predicted well, or at a number of
networks; then random compact networks check the sums of sub-layers, and a correction is learned.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, ValidationError

from ..bench.local.measure import target_features, target_name
from ..bench.local.options import MeasureOptions
from ..bench.results.measurement import Measurement
from ..compress.network.modules.model import CompactModel
from ..core.errors import InputError
from ..core.progress import Progress, progress_bar
from ..export.exporter import export
from ..targets.catalog import load_target
from ..targets.cost_fit import Fit, fit_correction, fit_costs, least_sure
from ..targets.cost_parts import NetworkShape, Plain
from ..targets.cost_table import Correction, CostTable, Errors, MeasuredNetwork, Role
from .cost_networks import (
    CostSizes,
    compact_networks,
    dense_model,
    first_shapes,
    network_of,
    random_shapes,
)

SCHEMA = "vitrim.cost-points/1"
# Networks that are measured interleaved: so many for the fit, and so many held out.
FITTED, HELD_OUT = 4, 2
BATCH = FITTED + HELD_OUT
# The dense network, which is measured with each of these groups.
REFERENCE = "reference"
# Networks before the first fit; fewest held out before it may stop; networks to choose from.
FIRST, FEWEST_HELD_OUT, POOL = 12, 10, 300
# Errors of the held-out networks at which measuring stops.
MEDIAN, P95 = 0.02, 0.06
CALIBRATION_IMAGES = 16
# How many networks are measured, which points do not depend on: a larger number continues.
_COUNTS = ("most_points", "checks")
Measure = Callable[[dict[str, Path], MeasureOptions, Progress], dict[str, Measurement]]


@dataclass(frozen=True)
class CostRequest:
    """What a cost table is measured for.

    Attributes:
        sizes: The dense network.
        target: Name of the device profile.
        runtime: The runtime of the artifacts.
        precision: Their precision.
        threads: Threads of the runtime.
        batch: Images in an inference.
        most_points: Largest number of networks for the fit and its error.
        checks: Number of compact networks that check the sums.
        seed: Of the random networks.
    """

    sizes: CostSizes = field(default_factory=CostSizes)
    target: str = "host"
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    threads: int = 1
    batch: int = 1
    most_points: int = 72
    checks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most_points < FIRST + BATCH:
            raise InputError(
                f"{self.most_points} networks: a fit and its error need at least {FIRST + BATCH}"
            )


class About(Plain):
    """What is known beside the points: the runtime, the machine, and the power of each network."""

    runtime_version: str = ""
    environment: dict[str, Any] = Field(default_factory=dict)
    powers_w: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()


def points_file(table: Path) -> Path:
    """The file beside a table that has the points measured so far."""
    return table.with_name(f"{table.name}.points")


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
        run.check(dense or dense_model(request.sizes))
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
        total = request.most_points + request.checks
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

    def _measure(
        self,
        shapes: Sequence[NetworkShape],
        models: Sequence[CompactModel],
        roles: Sequence[Role],
        fit: Fit | None,
    ) -> None:
        done, total = len(self.points), self.request.most_points + self.request.checks
        text = "compact networks" if roles[0] == "check" else _progress_text(fit, self.points)
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
        # Each later group of networks moves the speed that the points are stated at.
        fit = fit_costs(leveled(self.points), self.tiles)
        request, about = self.request, self.about
        held_out, checks = self.of_role("held-out"), self.of_role("check")
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
        if not checks:
            return found
        predicted = fit.predict([point.network for point in checks])
        measured = np.array([point.latency_ms for point in checks])
        correction, errors = fit_correction(predicted, measured)
        uncorrected = Errors.of(predicted, measured)
        if errors.median >= uncorrected.median:
            # Fitted to the noise of few networks, a correction makes others worse.
            correction, errors = Correction(), uncorrected
        update = {"correction": correction, "whole": errors, "uncorrected": uncorrected}
        return found.model_copy(update=update)


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


def _record(request: CostRequest) -> dict[str, Any]:
    """The request as the first line of a file of points has it: what the points are of."""
    found = {key: value for key, value in asdict(request).items() if key not in _COUNTS}
    if not request.sizes.selects:
        del found["sizes"]["selects"]
    return found


def append_points(
    file: Path, request: CostRequest, points: Sequence[MeasuredNetwork], about: About
) -> None:
    """Append measured points to a file; a new file begins with the request.

    Args:
        file: The file.
        request: What is measured.
        points: The points.
        about: What is known beside all points so far.
    """
    lines = [] if file.exists() else [{"schema": SCHEMA, "request": _record(request)}]
    record: list[Any] = [*lines, *(point.model_dump(mode="json") for point in points)]
    record.append({"about": about.model_dump(mode="json")})
    text = "".join(json.dumps(line) + "\n" for line in record)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_points(file: Path, request: CostRequest) -> tuple[list[MeasuredNetwork], About]:
    """Read the points of an interrupted measurement, and what is known beside them.

    Args:
        file: The file; without it there are none.
        request: What is measured.

    Returns:
        The points of complete batches, and the last `about`; a batch that a kill cut off is
        removed from the file.

    Raises:
        InputError: The file is of another request.
    """
    if not file.exists():
        return [], About()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    points: list[MeasuredNetwork] = []
    batch: list[MeasuredNetwork] = []
    about = About()
    whole = 1
    try:
        head = json.loads(lines[0]) if lines else {}
    except ValueError:
        head = {}
    if not isinstance(head, dict) or head.get("schema") != SCHEMA:
        raise InputError(f"{file}: not the points of a cost table; name another table")
    earlier = head.get("request")
    if isinstance(earlier, dict):
        # Earlier versions wrote the counts, too.
        earlier = {key: value for key, value in earlier.items() if key not in _COUNTS}
    if earlier != json.loads(json.dumps(_record(request))):
        raise InputError(
            f"{file}: the points of another cost table; continue it with the same options, "
            "or delete the file"
        )
    for number, line in enumerate(lines[1:], start=2):
        try:
            data = json.loads(line)
            if "about" in data:
                about = About.model_validate(data["about"])
                points, batch, whole = [*points, *batch], [], number
            else:
                batch.append(MeasuredNetwork.model_validate_json(line))
        except (ValueError, ValidationError, TypeError):
            break
    if whole < len(lines):
        file.write_text("".join(f"{line}\n" for line in lines[:whole]), encoding="utf-8")
    return points, about
