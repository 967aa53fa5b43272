"""Which artifacts a run makes: each precision of the compact model for each runtime that has it,
and the baseline in fp32 to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..core.errors import InputError
from ..export.artifact import Precision
from ..export.runtimes import runtime_named, runtime_names

if TYPE_CHECKING:
    from .recipe_sections import ExportSection

ONNX_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Planned:
    """One artifact of a run."""

    model: Literal["baseline", "compact"]
    runtime: str
    precision: Precision

    @property
    def name(self) -> str:
        """Of its folder and its measurement. ONNX Runtime goes without saying."""
        return "-".join(
            [self.model, *([] if self.runtime == ONNX_RUNTIME else [self.runtime]), self.precision]
        )


def planned_artifacts(section: ExportSection) -> dict[str, Planned]:
    """By name, the baseline of the first runtime first: it is what the others are held against."""
    plans = [Planned("baseline", runtime, "fp32") for runtime in section.runtimes]
    plans += [
        Planned("compact", runtime, precision)
        for runtime in section.runtimes
        for precision in section.precisions
        if precision in offered(runtime)
    ]
    return {plan.name: plan for plan in plans}


def offered(runtime: str) -> tuple[str, ...]:
    """The precisions of a runtime. Errors: InputError with the runtimes that there are."""
    return (
        get_args(Precision) if runtime == ONNX_RUNTIME else tuple(runtime_named(runtime).precisions)
    )


def require_runtimes(section: ExportSection) -> None:
    """Refuse, before anything is trained, what could not be exported in the end. Errors:
    InputError.
    """
    for runtime in section.runtimes:
        if runtime == ONNX_RUNTIME:
            continue
        if runtime not in runtime_names():
            known = ", ".join((ONNX_RUNTIME, *runtime_names()))
            raise InputError(
                f"export.runtimes: {runtime!r} is unknown; this vitrim exports for {known}"
            )
        if reason := runtime_named(runtime).missing():
            raise InputError(f"export.runtimes: {reason}")
        if not set(section.precisions) & set(offered(runtime)):
            raise InputError(
                f"export.runtimes: {runtime} has {', '.join(offered(runtime))}, and export.precisions asks for {', '.join(section.precisions)}"
            )
        if section.batch == "dynamic" and not runtime_named(runtime).dynamic_batch:
            raise InputError(
                f"export.batch: {runtime} holds one batch size; give a number, or leave {runtime} out of export.runtimes"
            )
