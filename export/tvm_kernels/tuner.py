"""Tuning: measures tiles for a network's kernels on this machine, within a time limit."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compress.network.modules.model import CompactModel
from ...compress.network.named_outputs import OutputSpec
from ...core.errors import InputError, UnsupportedModel
from ...targets.detect import detect_host, missing_features
from ...targets.instruction_sets import machine_name
from ...targets.profile import TargetProfile
from .attention import Attend, attend
from .build import tvm_target
from .coverage import uncovered_part
from .dense import Dense, Operand, dense
from .lanes import Lanes
from .network import kernel_specs
from .precision import Name, precision_named
from .program import compile_kernels
from .quantization import Range
from .schedule import Schedule, Shape, Tile, candidates, default_schedule
from .tuning_log import Trial, append_trials

# Shorter calls are repeated within one measurement, so that the clock's resolution does not matter.
_LEAST_S = 2e-3
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class TuningResult:
    """What a tuning measured.

    Attributes:
        shapes: How many shapes were measured.
        all_shapes: How many shapes the network has.
        trials: How many tiles were measured.
        default_s: The time of the measured shapes over the network, with the default tiles.
        best_s: The same with the fastest tiles.
    """

    shapes: int
    all_shapes: int
    trials: int
    default_s: float
    best_s: float


def tune(
    compact: CompactModel,
    profile: TargetProfile,
    log: Path,
    *,
    batch: int = 1,
    threads: int = 1,
    time_limit_s: float = 60.0,
    report: Callable[[str, float], None] | None = None,
    precision: Name = "fp32",
    ranges: Sequence[Range] | None = None,
    outputs: Sequence[OutputSpec] = (),
) -> TuningResult:
    """Measure tiles for every shape of a network, the most expensive shapes first.

    Args:
        compact: The network.
        profile: The target, which must be this machine.
        log: Measurements are appended to this file.
        batch: Batch size.
        threads: Into how many shares parallel loops are split.
        time_limit_s: Each shape gets a share of the remaining time.
        report: Called before each shape with (its name, the elapsed share of the time).
        precision: The number format of the products.
        ranges: The ranges of int8-static, from `calibration.find_ranges`.
        outputs: The named outputs; empty for the logits alone.

    Raises:
        InputError: This machine does not have the target's instructions.
        UnsupportedModel: Our kernels do not cover the network.
    """
    uncovered = uncovered_part(compact.architecture)
    if uncovered is not None:
        raise UnsupportedModel(f"no kernel of ours covers {uncovered}, so there is nothing to tune")
    host = detect_host()
    machines = {machine_name(described.architecture) for described in (host, profile)}
    if len(machines) > 1 or missing_features(profile):
        raise InputError(
            f"target {profile.name!r} is not this machine; "
            "tune on the device, and give the log to the export"
        )
    lanes, schedule = (
        Lanes.of(profile.vector),
        default_schedule(profile.vector, threads),
    )
    specs: dict[Shape, list[Dense | Attend]] = defaultdict(list)
    settings = precision_named(precision, profile.vector, ranges)
    for spec in kernel_specs(compact, lanes, schedule, batch, settings, outputs):
        # The sums of columns need no tile of their own.
        plain = replace(spec, columns=False) if isinstance(spec, Attend) else spec
        specs[plain.shape].append(plain)
    cost = {shape: len(found) * _macs(found[0]) for shape, found in specs.items()}
    shapes = sorted(specs, key=lambda shape: -cost[shape])
    measurement = _Measurement(tvm_target(profile), lanes, schedule, candidates(profile.vector))
    began, trials, done, default_s, best_s = time.perf_counter(), 0, 0, 0.0, 0.0
    for number, shape in enumerate(shapes):
        left_s = time_limit_s - (time.perf_counter() - began)
        if left_s <= 0:
            break
        if report is not None:
            sizes = " x ".join(map(str, shape.sizes))
            report(f"{shape.kind} {sizes}", 1 - left_s / time_limit_s)
        share = cost[shape] / sum(cost[other] for other in shapes[number:])
        times = measurement.times(specs[shape][0], left_s * share)
        append_trials(log, _trials(profile, host.title, threads, shape, times))
        trials, done, count = trials + len(times), done + 1, len(specs[shape])
        default_s += count * times[schedule.tile(shape)]
        best_s += count * min(times.values())
    return TuningResult(done, len(shapes), trials, default_s, best_s)


def _macs(spec: Dense | Attend) -> int:
    if isinstance(spec, Dense):
        return spec.images * spec.rows * spec.depth * spec.width
    widths = spec.keys.each + spec.values.each
    return spec.images * spec.heads * spec.query_rows * spec.tokens * widths


def _trials(
    profile: TargetProfile, processor: str, threads: int, shape: Shape, times: dict[Tile, float]
) -> list[Trial]:
    return [
        Trial(
            target=profile.name,
            unit=profile.vector.kind,
            processor=processor[:200],
            threads=threads,
            kind=shape.kind,
            sizes=shape.sizes,
            rows=tile.rows,
            vectors=tile.vectors,
            steps=tile.steps,
            latency_s=latency_s,
        )
        for tile, latency_s in times.items()
    ]


@dataclass(frozen=True)
class _Measurement:
    """Measures the tiles of one shape after the other."""

    target: Any
    lanes: Lanes
    schedule: Schedule
    tiles: tuple[Tile, ...]

    def times(self, spec: Dense | Attend, limit_s: float) -> dict[Tile, float]:
        """Seconds of each tile, the default one always among them."""
        deadline = time.perf_counter() + limit_s
        default = self.schedule.tile(spec.shape)
        calls = self._compile(spec, default, deadline - limit_s / 2)
        samples: dict[Tile, list[float]] = {tile: [] for tile in calls}
        repeats = max(1, int(_LEAST_S / _seconds(calls[default], 1)))
        while len(samples[default]) < _LEAST_ROUNDS or time.perf_counter() < deadline:
            for tile, call in calls.items():
                samples[tile].append(_seconds(call, repeats))
        # The lower quartile: other work on the machine only adds time.
        return {tile: sorted(times)[len(times) // 4] for tile, times in samples.items()}

    def _compile(
        self, spec: Dense | Attend, default: Tile, deadline: float
    ) -> dict[Tile, Callable[[], object]]:
        """The kernel of each tile, as a call; as many as are compiled before the deadline."""
        import tvm

        calls: dict[Tile, Callable[[], object]] = {}
        # Panels of another width are the same numbers in another order, which takes the same time.
        inputs = [
            tvm.runtime.tensor(_random_operand(operand))
            for operand in self._operands(spec, default)
        ]
        for tile in dict.fromkeys((default, *self.tiles)):
            if calls and time.perf_counter() > deadline:
                break
            schedule = Schedule(tile, self.schedule.threads, {spec.shape: tile})
            kernel = (
                dense(spec, self.lanes, schedule)
                if isinstance(spec, Dense)
                else attend(spec, self.lanes, schedule)
            )
            module = compile_kernels(
                tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), self.target
            )
            calls[tile] = lambda function=module["kernel"]: function(*inputs)  # type: ignore[misc]
        return calls

    def _operands(self, spec: Dense | Attend, tile: Tile) -> list[Operand]:
        if isinstance(spec, Dense):
            return list(spec.operands().values())
        found = [
            Operand(spec.source.size(spec.images, spec.query_rows)),
            Operand(spec.packing(tile.vectors).size(self.lanes)),
        ]
        if spec.biased:
            found.append(Operand(spec.heads * spec.query_rows * self.lanes.up(spec.tokens)))
        out = spec.images * spec.query_rows * spec.heads * spec.values.each
        if spec.output_quantizer is None:
            return [*found, Operand(out)]
        return [*found, Operand(2), Operand(out, spec.output_quantizer.dot.stored)]


def _seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _random_operand(operand: Operand) -> NDArray[np.generic]:
    rng = np.random.default_rng(0)
    if operand.type == "float32":
        return rng.standard_normal(operand.size, np.float32)
    return rng.integers(0, 100, operand.size).astype(operand.type)
