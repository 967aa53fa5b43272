"""Measures the tiles of a network's kernels on this machine, in turns, for as long as it may."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compress.network.modules.model import CompactModel
from ...core.errors import InputError, UnsupportedModel
from ...targets.detect import detect_host
from ...targets.profile import TargetProfile
from .attention import Attend, attend
from .codes import Range
from .coverage import reason_against
from .dense import Dense, Operand, dense
from .keys import packed_size
from .lanes import Lanes
from .log import Trial, append
from .network import kernel_specs
from .precision import Name, precision_named
from .schedule import Schedule, Shape, Tile, candidates, default_schedule
from .targets import tvm_target

# Shorter than this a call is repeated within one measurement, so that the clock does not show.
_LEAST_S = 2e-3
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Tuned:
    """Shapes that were measured, of how many; trials; and by what share of their time the quickest
    tiles beat the usual one, over the network.
    """

    shapes: int
    of: int
    trials: int
    usual_s: float
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
) -> Tuned:
    """Tries tiles for every shape of the network and appends to `log` what each took. report: told
    the shape and the share of the time that is gone.

    The shapes that cost most come first; each gets a share of what is left of the time. Errors:
    InputError if this machine cannot run the target's instructions, UnsupportedModel if our kernels
    do not cover the network.
    """
    reason = reason_against(compact.architecture)
    if reason is not None:
        raise UnsupportedModel(f"there is no kernel of ours for {reason}, hence nothing to tune")
    host = detect_host()
    if host.architecture != profile.architecture or not set(profile.features) <= set(host.features):
        raise InputError(
            f"target {profile.name!r} is not this machine; tune on the device, and give the log to the export"
        )
    target = tvm_target(profile)
    lanes, usual = Lanes.of(profile.vector), default_schedule(profile.vector, threads)
    counted: dict[Shape, list[Any]] = defaultdict(list)
    for spec in kernel_specs(
        compact, lanes, usual, batch, precision_named(precision, profile.vector, ranges)
    ):
        counted[spec.shape].append(spec)
    shapes = sorted(counted, key=lambda shape: -len(counted[shape]) * _macs(counted[shape][0]))
    began, trials, done, sums = time.perf_counter(), 0, 0, [0.0, 0.0]
    for number, shape in enumerate(shapes):
        left = time_limit_s - (time.perf_counter() - began)
        if left <= 0:
            break
        if report is not None:
            report(f"{shape.kind} {' x '.join(map(str, shape.sizes))}", 1 - left / time_limit_s)
        weights = [len(counted[other]) * _macs(counted[other][0]) for other in shapes[number:]]
        times = _measure(
            counted[shape][0],
            target,
            lanes,
            usual,
            candidates(profile.vector),
            left * weights[0] / sum(weights),
        )
        append(
            log,
            (
                Trial(
                    target=profile.name,
                    processor=host.title[:200],
                    threads=threads,
                    kind=shape.kind,
                    sizes=shape.sizes,
                    rows=tile.rows,
                    vectors=tile.vectors,
                    steps=tile.steps,
                    latency_s=latency_s,
                )
                for tile, latency_s in times.items()
            ),
        )
        trials, done = trials + len(times), done + 1
        count = len(counted[shape])
        sums[0] += count * times[usual.tile(shape)]
        sums[1] += count * min(times.values())
    return Tuned(done, len(shapes), trials, sums[0], sums[1])


def _macs(spec: Dense | Attend) -> int:
    if isinstance(spec, Dense):
        return spec.images * spec.rows * spec.depth * spec.width
    return spec.images * spec.heads * spec.asked * spec.tokens * (spec.keys.each + spec.values.each)


def _measure(
    spec: Dense | Attend,
    target: Any,
    lanes: Lanes,
    usual: Schedule,
    tiles: tuple[Tile, ...],
    limit_s: float,
) -> dict[Tile, float]:
    """Seconds of each tile, the usual one always among them."""
    import tvm

    deadline = time.perf_counter() + limit_s
    first = usual.tile(spec.shape)
    calls: dict[Tile, Callable[[], object]] = {}
    inputs = [tvm.runtime.tensor(_anything(operand)) for operand in _operands(spec, lanes)]
    for tile in dict.fromkeys((first, *tiles)):
        if calls and time.perf_counter() > deadline - limit_s / 2:
            break
        schedule = Schedule(tile, usual.threads, {spec.shape: tile})
        kernel = (
            dense(spec, lanes, schedule)
            if isinstance(spec, Dense)
            else attend(spec, lanes, schedule)
        )
        module = tvm.tirx.build(
            tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target=target
        )
        # Panels of another width are the same numbers in another order: time does not depend on
        # which.
        calls[tile] = lambda function=module["kernel"]: function(*inputs)  # type: ignore[misc]
    took: dict[Tile, list[float]] = {tile: [] for tile in calls}
    repeats = max(1, int(_LEAST_S / _seconds(calls[first], 1)))
    while len(took[first]) < _LEAST_ROUNDS or time.perf_counter() < deadline:
        for tile, call in calls.items():
            took[tile].append(_seconds(call, repeats))
    # The lower quartile: other work on the machine only ever adds time.
    return {tile: sorted(times)[len(times) // 4] for tile, times in took.items()}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _operands(spec: Dense | Attend, lanes: Lanes) -> list[Operand]:
    if isinstance(spec, Dense):
        return list(spec.operands().values())
    packed = spec.images * spec.heads * packed_size(spec.tokens, spec.keys, spec.values, lanes)
    bias = [spec.heads * spec.asked * lanes.up(spec.tokens)] if spec.biased else []
    sizes = [
        spec.source.size(spec.images, spec.asked),
        packed,
        *bias,
        *([2] if spec.writes else []),
    ]
    out = spec.images * spec.asked * spec.heads * spec.values.each
    return [
        *map(Operand, sizes),
        Operand(out) if spec.writes is None else Operand(out, spec.writes.dot.stored),
    ]


def _anything(operand: Operand) -> NDArray[np.generic]:
    rng = np.random.default_rng(0)
    if operand.type == "float32":
        return rng.standard_normal(operand.size, np.float32)
    return rng.integers(0, 100, operand.size).astype(operand.type)
