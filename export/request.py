"""What an export was asked for, checked as far as it can be without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..core.errors import InputError
from . import capabilities
from .forms import Form
from .manifest import Array, Batch, Precision, PreprocessingSpec
from .quantization.quantize import CALIBRATIONS, Calibration
from .runtimes import runtime_named


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of `export`, each with the meaning told there; shape is (channels, height,
    width), allowed the tolerance of each precision.
    """

    shape: tuple[int, int, int]
    allowed: Mapping[str, float]
    target: str
    runtime: str
    precision: Precision
    preprocessing: PreprocessingSpec | None
    labels: tuple[str, ...] | None
    images: Array | None
    batch: Batch
    provenance: Mapping[str, str]
    form: str | Form | None
    overwrite: bool
    name: str | None
    opset: int | None
    calibration: Calibration | Literal["best"]
    tune: bool
    threads: int
    ort_format: bool
    options: Mapping[str, str]
    # What the artifact's notes begin with.
    notes: tuple[str, ...] = ()

    @property
    def free_batch(self) -> int | str:
        """The batch as a graph states it: a size, or the name of the free dimension."""
        return "batch" if self.batch == "dynamic" else self.batch


def check(
    runtime: str,
    precision: str,
    batch: Batch,
    target: str,
    images: Any,
    tune: bool,
    ort_format: bool,
    calibration: str = "min-max",
) -> None:
    """Refuse what no model could make right. Errors: InputError."""
    found = None if runtime == "onnxruntime" else runtime_named(runtime)
    known = get_args(Precision)
    if precision not in known:
        raise InputError(f"precision {precision!r} is unknown; take one of {', '.join(known)}")
    if batch != "dynamic" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch {batch!r}: give a whole number above 0, or 'dynamic'")
    if precision == "int8-static" and images is None:
        raise InputError(
            "int8-static finds its ranges on images, and none were given; pass images, or take precision='int8', which needs none"
        )
    if calibration not in (*CALIBRATIONS, "best"):
        raise InputError(
            f"calibration {calibration!r} is unknown; take one of {', '.join(CALIBRATIONS)}, or 'best' of these"
        )
    if found is not None:
        if precision not in found.precisions:
            raise InputError(
                f"precision {precision!r}: runtime {runtime!r} has {', '.join(found.precisions)}; take one of these"
            )
        if batch == "dynamic" and not found.dynamic_batch:
            raise InputError(
                f"runtime {runtime}: a file holds one batch size; export with batch 1 or another number, or for another runtime"
            )
        if (tune and runtime != "tvm") or ort_format:
            what = "ort_format" if ort_format else "tune"
            raise InputError(
                f"{what} is for onnxruntime, and the runtime is {runtime!r}; leave it out"
            )
        if reason := found.missing():
            raise InputError(reason)
        return
    if precision in ("fp16", "bf16") and not (
        precision == "fp16" and capabilities.has_half(target)
    ):
        raise InputError(
            f"precision {precision!r}: target {target!r} does not compute in it, so it would cost time; take fp32 or int8"
        )
    if tune and not capabilities.is_host(target):
        raise InputError(
            f"tune measures on this machine, and the target is {target!r}; run it on the device, or leave tune out for the known form"
        )


def preprocessing_of(given: Any) -> PreprocessingSpec | None:
    """The manifest's preprocessing from a `Preprocessing` or a mapping of its fields. Errors:
    InputError.
    """
    if given is None or isinstance(given, PreprocessingSpec):
        return given
    data = given.model_dump() if hasattr(given, "model_dump") else dict(given)
    try:
        return PreprocessingSpec.model_validate(data)
    except ValueError as error:
        raise InputError(f"preprocessing: {' '.join(str(error).split())}") from None
