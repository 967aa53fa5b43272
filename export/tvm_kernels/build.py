"""A compact network for TVM: our own kernels where they cover it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...compress.network.modules.model import CompactModel
from ...core.errors import InputError
from ...targets.profile import TargetProfile
from ..forms import Form, write_network
from .built import Built
from .coverage import reason_against
from .default import default_network
from .targets import tvm_target

if TYPE_CHECKING:
    from tvm.target import Target

    from .codes import Range
    from .precision import Name


def build_network(
    compact: CompactModel,
    profile: TargetProfile,
    *,
    batch: int = 1,
    threads: int = 1,
    log: Path | None = None,
    precision: Name = "fp32",
    ranges: Sequence[Range] | None = None,
) -> Built:
    """The network ready for `Built.compile`. threads: how many shares the parallel loops are cut
    into. log: what the tuner wrote. ranges: those of int8-static.

    Errors: InputError where TVM is missing, the log is malformed, or eight bits are wanted of a
    network that our kernels do not cover; UnsupportedModel where neither our kernels nor the graph
    forms cover it.
    """
    target = tvm_target(profile)
    reason = reason_against(compact.architecture)
    if reason is None and target.kind.name != "llvm":
        reason = f"code for {target.kind.name}"
    if reason is None:
        return _kernels(compact, profile, target, batch, threads, log, precision, ranges)
    if precision != "fp32":
        raise InputError(
            f"runtime tvm: {precision} is computed by our own kernels, and they do not cover {reason}; take fp32, or another runtime"
        )
    form = Form(
        rows="batch",
        attention="split",
        residual="add",
        norm="layer",
        activation="gelu",
        stem="matrix",
        last_queries=True,
    )
    built = default_network(write_network(compact, form, batch=batch), profile, threads=threads)
    return replace(
        built, notes=(f"our kernels do not cover {reason}; {built.notes[0]}", *built.notes[1:])
    )


def _kernels(
    compact: CompactModel,
    profile: TargetProfile,
    target: Target,
    batch: int,
    threads: int,
    log: Path | None,
    precision: Name,
    ranges: Sequence[Range] | None,
) -> Built:
    # Imported where they are needed: these need TVM.
    from .dot import INSTRUCTIONS, Dot
    from .lanes import Lanes
    from .log import quickest, read
    from .network import write_program
    from .precision import precision_named
    from .program import lowering
    from .schedule import default_schedule

    unit = profile.vector
    notes = [
        f"{unit.kind} kernels, vectors of {unit.lanes}, {threads} thread{'s' if threads > 1 else ''}"
    ]
    tuned = {}
    if log is not None:
        tuned = quickest(read(log), profile.name, threads, unit)
        notes.append(
            f"tiles of {len(tuned)} shapes from {log.name}"
            if tuned
            else f"{log.name} has no tiles for {profile.name} with {threads} threads"
        )
    if precision != "fp32":
        notes.append(INSTRUCTIONS[Dot.of(unit).kind])
    numbers = precision_named(precision, unit, ranges)
    module = write_program(
        compact, Lanes.of(unit), default_schedule(unit, threads, tuned), batch, numbers
    )
    return Built(module, target, lowering(), "kernels", threads, tuple(notes))
