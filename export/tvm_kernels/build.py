"""A network as a Relax module for TVM: of our own kernels where they cover it, else TVM's pipeline.

This module imports TVM only inside functions: without TVM it still reports what is missing.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx

from ...compress.network.modules.model import CompactModel
from ...compress.network.named_outputs import OutputSpec
from ...compress.tokens.buckets import BucketedModel
from ...core.errors import InputError
from ...targets.instruction_sets import ARM, X86, machine_name
from ...targets.profile import TargetProfile
from ..forms import Form, write_network
from .coverage import uncovered_part
from .execution_plan import Branches

if TYPE_CHECKING:
    from tvm import IRModule
    from tvm.relax import VMExecutable
    from tvm.target import Target
    from tvm.transform import Pass

    from .precision import Name
    from .quantization import Range
    from .schedule import Schedule

INSTALL = "pip install 'vitrim[tvm]'"
# The graph that TVM's front end reads.
_PLAIN_FORM = Form(
    rows="batch",
    attention="split",
    residual="add",
    norm="layer",
    activation="gelu",
    stem="matrix",
    last_queries=True,
)


@dataclass(frozen=True)
class TvmNetwork:
    """A network in Relax, with its weights, and how it is compiled.

    Attributes:
        module: Its function `main`: images (batch, C, H, W) float32 -> logits (batch, classes).
        target: The target of the code.
        pipeline: The passes that lower the module.
        route: `kernels` (our own), or `default` (TVM's ONNX front end and pipeline).
        threads: Into how many shares parallel loops are split; 1: there are none.
        notes: One line each, for the manifest.
        profile: Name of the target's profile.
        outputs: Names of what `main` returns.
        branches: Which calls belong to which bucket, of a network with buckets. `main` then returns
            the logits of each bucket, and the place of the image's.
    """

    module: IRModule
    target: Target
    pipeline: Pass
    route: Literal["kernels", "default"]
    threads: int
    notes: tuple[str, ...] = ()
    profile: str = "host"
    outputs: tuple[str, ...] = ("logits",)
    branches: Branches | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The instruction sets that the code for a CPU uses; for a GPU, those of its host's."""
        from tvm.target import codegen

        host = self.target.host or self.target
        if host.kind.name != "llvm":
            return ()
        enabled = {str(name) for name in codegen.llvm_get_cpu_features(host)}
        triple = str(dict(host.attrs).get("mtriple") or platform.machine())
        names = {"x86_64": X86, "aarch64": ARM}.get(machine_name(triple.split("-")[0]), {})
        return tuple(name for name, compiled in names.items() if compiled in enabled)

    def compile(self, *, system_lib: bool = False) -> VMExecutable:
        """Compile to machine code, which `.export_library(path)` writes.

        Args:
            system_lib: For a static library, whose functions register when the program starts.
        """
        import tvm
        from tvm import relax

        from .program import compiling

        ours = self.route == "kernels"
        with compiling() if ours else tvm.transform.PassContext(opt_level=3):
            executable: VMExecutable = relax.build(
                self.module,
                target=self.target,
                relax_pipeline=self.pipeline,
                system_lib=system_lib,
            )
        return executable


def missing_tvm() -> str | None:
    """Why TVM cannot be used here, in one line, or None."""
    return None if importlib.util.find_spec("tvm") else f"TVM is not installed; {INSTALL}"


def tvm_target(profile: TargetProfile) -> Target:
    """TVM's target of a profile.

    Raises:
        InputError: TVM is not installed, the profile has no `tvm_target`, or TVM refuses it.
    """
    if (reason := missing_tvm()) is not None:
        raise InputError(reason)
    from tvm.target import Target

    if profile.tvm_target is None:
        raise InputError(
            f"target {profile.name!r} has no tvm_target; add one to its profile "
            '({ kind = "llvm", mcpu = ... }), or use another runtime'
        )
    options = dict(profile.tvm_target)
    if options["kind"] == "cuda" and "host" not in options:
        return Target(options, host={"kind": "llvm", "mtriple": profile.triple})
    try:
        return Target(options)
    except Exception as error:  # TVM raises its own kinds, RuntimeError and ValueError among them
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"target {profile.name!r}: TVM refuses tvm_target {options}: {reason}"
        ) from None


def build_network(
    compact: CompactModel,
    profile: TargetProfile,
    *,
    batch: int = 1,
    threads: int = 1,
    log: Path | None = None,
    precision: Name = "fp32",
    ranges: Sequence[Range] | None = None,
    outputs: Sequence[OutputSpec] = (),
) -> TvmNetwork:
    """Build a network for a target.

    Args:
        compact: The network.
        profile: The target.
        batch: Batch size.
        threads: Into how many shares parallel loops are split.
        log: The log of a tuning, whose fastest tiles are used; by default the default tiles.
        precision: The number format of the products.
        ranges: The ranges of int8-static, from `calibration.find_ranges`.
        outputs: The named outputs; empty for the logits alone.

    Raises:
        InputError: TVM is not installed, the log is malformed, or int8 is requested for a network
            that our kernels do not cover.
        UnsupportedModel: Neither our kernels nor the graph forms cover the network.
    """
    target = tvm_target(profile)
    uncovered = uncovered_part(compact.architecture)
    if uncovered is None and target.kind.name != "llvm":
        uncovered = f"code for {target.kind.name}"
    if uncovered is None:
        return _kernel_network(
            compact, profile, target, batch, threads, log, precision, ranges, outputs
        )
    if precision != "fp32":
        raise InputError(
            f"runtime tvm: {precision} is computed by our own kernels, "
            f"and they do not cover {uncovered}; use fp32, or another runtime"
        )
    graph = write_network(compact, _PLAIN_FORM, batch=batch, outputs=outputs)
    network = default_network(graph, profile, threads=threads)
    first, *rest = network.notes
    return replace(network, notes=(f"our kernels do not cover {uncovered}; {first}", *rest))


def build_bucket_network(
    model: BucketedModel,
    profile: TargetProfile,
    *,
    threads: int = 1,
    log: Path | None = None,
    precision: Name = "fp32",
) -> TvmNetwork:
    """Build a network with buckets for a target, batch 1.

    Args:
        model: The network.
        profile: The target.
        threads: Into how many shares parallel loops are split.
        log: The log of a tuning, whose fastest tiles are used; by default the default tiles.
        precision: The number format of the products, without static ranges.

    Raises:
        InputError: TVM is not installed, the log is malformed, or our kernels do not cover the
            network or the target.
    """
    target = tvm_target(profile)
    uncovered = uncovered_part(model.architecture)
    if uncovered is None and target.kind.name != "llvm":
        uncovered = f"code for {target.kind.name}"
    if uncovered is not None:
        raise InputError(
            f"runtime tvm: buckets are run by our own kernels, and they do not cover {uncovered}; "
            "export for onnxruntime, or one count: BucketedModel.fixed(count)"
        )
    from .bucket_network import bucket_module
    from .lanes import Lanes
    from .precision import precision_named
    from .program import lowering

    schedule, notes = _schedule_and_notes(profile, threads, log, precision)
    form = precision_named(precision, profile.vector, None)
    module, branches = bucket_module(model, Lanes.of(profile.vector), schedule, form)
    return TvmNetwork(
        module,
        target,
        lowering(),
        "kernels",
        threads,
        (*notes, f"{len(branches.counts)} buckets in one program, of which an image runs one"),
        profile.name,
        branches=branches,
    )


def _kernel_network(
    compact: CompactModel,
    profile: TargetProfile,
    target: Target,
    batch: int,
    threads: int,
    log: Path | None,
    precision: Name,
    ranges: Sequence[Range] | None,
    outputs: Sequence[OutputSpec],
) -> TvmNetwork:
    # These modules need TVM.
    from .lanes import Lanes
    from .network import network_module
    from .precision import precision_named
    from .program import lowering

    unit = profile.vector
    schedule, notes = _schedule_and_notes(profile, threads, log, precision)
    module = network_module(
        compact,
        Lanes.of(unit),
        schedule,
        batch,
        precision_named(precision, unit, ranges),
        outputs,
    )
    return TvmNetwork(
        module,
        target,
        lowering(),
        "kernels",
        threads,
        tuple(notes),
        profile.name,
        tuple(output.name for output in outputs) or ("logits",),
    )


def _schedule_and_notes(
    profile: TargetProfile, threads: int, log: Path | None, precision: Name
) -> tuple[Schedule, list[str]]:
    """Tiles and threads, and lines on them for the manifest."""
    from .integer_dot import INSTRUCTIONS, IntegerDot
    from .schedule import default_schedule
    from .tuning_log import fastest_tiles, read_trials

    unit = profile.vector
    plural = "s" if threads > 1 else ""
    notes = [f"{unit.kind} kernels, vectors of {unit.lanes}, {threads} thread{plural}"]
    tuned = {}
    if log is not None:
        tuned = fastest_tiles(read_trials(log), profile.name, threads, unit)
        notes.append(
            f"tiles of {len(tuned)} shapes from {log.name}"
            if tuned
            else f"{log.name} has no tiles for {profile.name} with {threads} threads"
        )
    if precision != "fp32":
        notes.append(INSTRUCTIONS[IntegerDot.of(unit).kind])
    return default_schedule(unit, threads, tuned), notes


def default_network(
    graph: onnx.ModelProto, profile: TargetProfile, *, threads: int = 1
) -> TvmNetwork:
    """A graph in TVM's own pipeline: without schedules for CPUs, with dlight's for GPUs.

    Args:
        graph: Fixed shapes, standard operators up to opset 22.
        profile: The target.
        threads: For how many threads the code is meant.

    Raises:
        InputError: TVM's front end does not support an operator.
    """
    from tvm import relax

    target = tvm_target(profile)
    module = _from_onnx(graph)
    gpu = "gpu" in target.keys
    pipeline = relax.get_default_pipeline(target) if gpu else relax.get_pipeline("default")
    note = (
        f"dlight's schedules for {target.kind.name}; it runs on such a device only"
        if gpu
        else "TVM's own pipeline, untuned"
    )
    names = tuple(output.name for output in graph.graph.output)
    return TvmNetwork(
        module, target, pipeline, "default", threads, (note,), profile.name, outputs=names
    )


def _from_onnx(graph: onnx.ModelProto) -> IRModule:
    """The Relax module of a graph, with its weights."""
    from tvm.relax.frontend.onnx import from_onnx

    try:
        return from_onnx(graph, keep_params_in_input=False)
    except Exception as error:  # the front end raises errors of any type
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        raise InputError(
            f"TVM's ONNX front end does not read this graph: {reason}; use another form of it"
        ) from None
