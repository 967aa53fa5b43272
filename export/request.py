"""What an export was requested to do, validated as far as possible without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from pydantic import ValidationError

from ..compress.network.named_outputs import OutputSpec
from ..core.errors import InputError
from ..targets.catalog import load_target
from . import capabilities
from .forms import Form
from .manifest import Array, Batch, Layout, Precision, PreprocessingSpec
from .parity import TOLERANCES
from .quantization.quantize import CALIBRATIONS, Calibration
from .runtimes import runtime_named
from .runtimes.limits import Planned, require_within_limits
from .runtimes.runtime import limits_of, require_options

ONNXRUNTIME = "onnxruntime"
MIN_OPSET = 20  # the first with a Gelu operator; below, Gelu is several operators and slower


@dataclass(frozen=True)
class DeviceOptions:
    """Where the artifact runs.

    Attributes:
        target: Name of a device profile, or the path of its TOML file.
        runtime: `onnxruntime`, or a runtime of `export.runtimes`.
        threads: Threads to compile, tune and time for.
        settings: Settings of the runtime's own.
    """

    target: str = "host"
    runtime: str = ONNXRUNTIME
    threads: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphOptions:
    """How the graph is written.

    Attributes:
        form: A form, its name, "plain" for torch's graph, or None for the best known one.
        opset: Version of the standard's operators; None for what the form needs.
        tune: Measure the forms on this machine and keep the fastest.
        ort_format: Also write ONNX Runtime's own format and a list of operators.
    """

    form: str | Form | None = None
    opset: int | None = None
    tune: bool = False
    ort_format: bool = False


@dataclass(frozen=True)
class NumericOptions:
    """What the artifact computes in, and how far its outputs may differ.

    Attributes:
        precision: The number format.
        images: Inputs for parity and calibration, float32 (count, channels, height, width).
        calibration: How static ranges are found; "best" tries all.
        tolerances: Largest error relative to the largest logit, for each precision.
    """

    precision: Precision = "fp32"
    images: Array | None = None
    calibration: Calibration | Literal["best"] = "min-max"
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))


@dataclass(frozen=True)
class ManifestOptions:
    """What the manifest records besides the result.

    Attributes:
        name: Name of the model; None for the source's own.
        preprocessing: From a picture to the input.
        labels: One for each class.
        provenance: The caller's own entries.
        notes: First notes of the artifact.
    """

    name: str | None = None
    preprocessing: PreprocessingSpec | None = None
    labels: tuple[str, ...] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportRequest:
    """All options of one export.

    Attributes:
        shape: Of an input image, in the order of `layout`.
        batch: Images in a batch, or "dynamic".
        overwrite: Replace a folder that is not empty.
        layout: Whether an image is (channels, height, width) or (height, width, channels).
        outputs: The named outputs; empty for the logits alone.
    """

    shape: tuple[int, int, int]
    batch: Batch = 1
    overwrite: bool = False
    device: DeviceOptions = DeviceOptions()
    graph: GraphOptions = GraphOptions()
    numeric: NumericOptions = NumericOptions()
    manifest: ManifestOptions = ManifestOptions()
    layout: Layout = "NCHW"
    outputs: tuple[OutputSpec, ...] = ()

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs of a graph."""
        return tuple(output.name for output in self.outputs) or ("logits",)

    @property
    def classes(self) -> int | None:
        """The number of logits, which come first among several outputs; None: all are logits."""
        if not self.outputs:
            return None
        return sum(output.numbers for output in self.outputs if output.kind == "logits")

    @property
    def symbolic_batch(self) -> int | str:
        """The batch as a graph states it: a size, or the name of the free dimension."""
        return "batch" if self.batch == "dynamic" else self.batch

    @property
    def input_batch(self) -> int:
        """The number of images that the artifact is run with when it is verified."""
        return 1 if self.batch == "dynamic" else self.batch


def validate_options(
    batch: Batch,
    device: DeviceOptions,
    graph: GraphOptions,
    numeric: NumericOptions,
) -> None:
    """Check options against each other and against the runtime.

    Args:
        batch: Images in a batch, or "dynamic".
        device: Where the artifact runs.
        graph: How the graph is written.
        numeric: What the artifact computes in.

    Raises:
        InputError: An option is unknown, or two do not fit; the message names them.
    """
    load_target(device.target)
    runtime = None if device.runtime == ONNXRUNTIME else runtime_named(device.runtime)
    require_options(device.runtime, device.settings, () if runtime is None else runtime.options)
    precision, known = numeric.precision, get_args(Precision)
    if precision not in known:
        raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(known)}")
    if batch != "dynamic" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch {batch!r}: give a whole number above 0, or 'dynamic'")
    _require_opset(graph.opset)
    if precision == "int8-static" and numeric.images is None:
        raise InputError(
            "int8-static finds its ranges on images, and none were given; pass images, or use "
            "precision='int8', which needs none"
        )
    if numeric.calibration not in (*CALIBRATIONS, "best"):
        raise InputError(
            f"calibration {numeric.calibration!r} is unknown; use one of "
            f"{', '.join(CALIBRATIONS)}, or 'best' of these"
        )
    if runtime is None:
        _validate_onnxruntime(device, graph, precision)
        return
    name = device.runtime
    require_within_limits(name, limits_of(runtime), Planned(precision, batch, graph.form))
    if (graph.tune and name != "tvm") or graph.ort_format:
        option = "ort_format" if graph.ort_format else "tune"
        raise InputError(f"{option} is for onnxruntime, and the runtime is {name!r}; leave it out")
    if reason := runtime.missing():
        raise InputError(reason)


def _require_opset(opset: int | None) -> None:
    if opset is None:
        return
    if opset < MIN_OPSET:
        raise InputError(
            f"opset {opset}: the export needs at least {MIN_OPSET}, the first with a Gelu "
            "operator; raise it or leave it out"
        )
    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise InputError(
            f"opset {opset}: the installed onnx {onnx.__version__} knows up to {newest}; lower it, "
            "leave it out, or update onnx"
        )


def _validate_onnxruntime(device: DeviceOptions, graph: GraphOptions, precision: str) -> None:
    target = device.target
    half = precision == "fp16" and capabilities.has_half(target)
    if precision in ("fp16", "bf16") and not half:
        raise InputError(
            f"precision {precision!r}: target {target!r} does not compute in it, so it would cost "
            "time; use fp32 or int8"
        )
    if graph.tune and not capabilities.is_host(target):
        raise InputError(
            f"tune measures on this machine, and the target is {target!r}; run it on the device, "
            "or leave tune out for the known form"
        )


def input_images(images: Any, preprocessing: PreprocessingSpec | None) -> Array | None:
    """Return images as the model expects them: float32, normalized.

    Args:
        images: Floats (count, channels, height, width), which are normalized already; or bytes
            (uint8), also channels last, which `preprocessing` normalizes. Arrays or tensors.
        preprocessing: Mean and std. None: bytes are refused.

    Raises:
        InputError: The images are neither, or bytes come without mean and std.
    """
    if images is None:
        return None
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    if not isinstance(images, np.ndarray):
        raise InputError(
            f"images: a {type(images).__name__} where an array or a tensor of shape "
            "(count, channels, height, width) was expected"
        )
    if images.dtype.kind == "f":
        return images.astype(np.float32, copy=False)
    if images.dtype != np.uint8 or preprocessing is None:
        raise InputError(
            f"images: {images.dtype} numbers, where float32 was expected, normalized as the model "
            "expects them: (pixels / 255 - mean) / std; or give pixels as uint8 with preprocessing"
        )
    if images.ndim == 4 and images.shape[1] != preprocessing.channels == images.shape[3]:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != preprocessing.channels:
        raise InputError(
            f"images: shape {images.shape}, where (count, {preprocessing.channels}, height, width) "
            "was expected"
        )
    mean, std = (
        np.asarray(values, dtype=np.float32).reshape(1, -1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    normalized: Array = (images.astype(np.float32) / 255 - mean) / std
    return normalized


def preprocessing_of(preprocessing: Any) -> PreprocessingSpec | None:
    """Return the manifest's preprocessing from a `Preprocessing` or a mapping of its fields.

    Raises:
        InputError: A field is missing, unknown or out of range.
    """
    if preprocessing is None or isinstance(preprocessing, PreprocessingSpec):
        return preprocessing
    dump = getattr(preprocessing, "model_dump", None)
    data = preprocessing if dump is None else dump()
    if not isinstance(data, Mapping):
        raise InputError(
            f"preprocessing: a {type(data).__name__}; give a mapping with channels, height, width, "
            "mean and std"
        )
    try:
        return PreprocessingSpec.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"preprocessing: {where}{reason}") from None
