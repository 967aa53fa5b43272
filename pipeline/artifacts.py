"""The artifacts that a run exports.

Those are the compact model in every precision for every runtime that supports it, and the baseline
in fp32 for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..core.errors import InputError
from ..export.capabilities import lacks_int8_features
from ..export.manifest import Precision
from ..export.runtimes import runtime_named, runtime_names
from ..runtimes.cpu_features import fitting_target
from ..targets.catalog import load_target
from ..targets.detect import missing_features

if TYPE_CHECKING:
    from .recipe_sections import ExportSection

ONNX_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Planned:
    """One artifact of a run."""

    model: Literal["baseline", "compact", "exact"]
    runtime: str
    precision: Precision

    @property
    def name(self) -> str:
        """Name of its folder and of its measurement; ONNX Runtime is left out."""
        runtime = [] if self.runtime == ONNX_RUNTIME else [self.runtime]
        return "-".join([self.model, *runtime, self.precision])


def planned_artifacts(section: ExportSection, *, exact: bool = False) -> dict[str, Planned]:
    """The artifacts by name; the first one, a baseline, is what the others are compared with.

    `exact`: the compact model has zeros, and beside it is the one without what they make dead.
    """
    models: tuple[Literal["compact", "exact"], ...] = ("compact", "exact")
    plans = [Planned("baseline", runtime, "fp32") for runtime in section.runtimes]
    plans += [
        Planned(model, runtime, precision)
        for model in models[: 2 if exact else 1]
        for runtime in section.runtimes
        for precision in section.precisions
        if precision in supported_precisions(runtime)
    ]
    return {plan.name: plan for plan in plans}


def supported_precisions(runtime: str) -> tuple[str, ...]:
    """The precisions that a runtime supports.

    Raises:
        InputError: The runtime does not exist; the message lists those that do.
    """
    if runtime == ONNX_RUNTIME:
        return get_args(Precision)
    return tuple(runtime_named(runtime).precisions)


def require_runtimes(section: ExportSection) -> None:
    """Check, before any training, that every requested artifact can be exported.

    Raises:
        InputError: A runtime does not exist, is not installed, or does not support what is
            requested of it.
    """
    for runtime in section.runtimes:
        if runtime != ONNX_RUNTIME:
            _require_runtime(runtime, section)


def require_processor(section: ExportSection) -> None:
    """Check, before any training, that this machine can run the artifacts, which it measures.

    Raises:
        InputError: It lacks an instruction set that they need or assume.
    """
    profile = load_target(section.target)
    missing = missing_features(profile)
    if missing and "tvm" in section.runtimes:
        raise InputError(
            f"export.target: this processor has no {', '.join(missing)}, which code for "
            f"{profile.name} uses, and a run measures its artifacts; use {fitting_target()} or host"
        )
    eight_bits = {"int8", "int8-static"} & set(section.precisions)
    reason = lacks_int8_features(section.target)
    if eight_bits and reason and set(section.runtimes) - {"tvm"}:
        raise InputError(f"export.target: {reason}")


def _require_runtime(runtime: str, section: ExportSection) -> None:
    if runtime not in runtime_names():
        known = ", ".join((ONNX_RUNTIME, *runtime_names()))
        raise InputError(f"export.runtimes: {runtime!r} is unknown; choose from {known}")
    if reason := runtime_named(runtime).missing():
        raise InputError(f"export.runtimes: {reason}")
    supported = supported_precisions(runtime)
    if not set(section.precisions) & set(supported):
        raise InputError(
            f"export.runtimes: {runtime} supports {', '.join(supported)}, but export.precisions "
            f"is {', '.join(section.precisions)}"
        )
    if section.batch == "dynamic" and not runtime_named(runtime).dynamic_batch:
        raise InputError(
            f"export.batch: {runtime} needs a fixed batch size; give a number, or remove {runtime} "
            "from export.runtimes"
        )
