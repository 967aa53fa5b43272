"""OpenVINO: the intermediate representation `model.xml` and `model.bin`.

int8 quantizes weights to eight bits and activations in groups as they come (OpenVINO's dynamic
quantization). int8-static is NNCF's post-training quantization, with ranges of calibration images.
bf16 leaves the file unchanged and lets the processor compute in bfloat16.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ...core.errors import InputError
from ...runtimes.openvino_engine import openvino_contained, without_telemetry
from ..capabilities import int8_assumptions, int8_exact
from ..forms import Form
from ..graphs.model_proto import SELECT
from ..manifest import Precision, tool_versions
from ..parity import first_mismatch, inner_values
from ..quantization.quantize import CALIBRATION_IMAGES
from .limits import Limit
from .runtime import RuntimeFiles, Source, missing_module

# Activations of a product are quantized in groups of this size. 32 and 64 ran nearly twice as fast
# as whole rows (0), which OpenVINO 2026.4 leaves in fp32, at nearly the same error (DeiT-Tiny,
# AVX-512 VNNI, one thread).
GROUP_SIZE = "64"
# The operators that select tokens, which stay in floats.
SELECTIONS = re.escape(SELECT) + ".*"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int8-static")


class OpenVino:
    """Writes OpenVINO's files with OpenVINO, and NNCF for int8.

    Options: group_size, see GROUP_SIZE.
    """

    name = "openvino"
    extra = "openvino"
    precisions: tuple[str, ...] = PRECISIONS
    options: tuple[str, ...] = ("group_size",)
    dynamic_batch = True
    # Patches as one product are 20 % faster than the convolution here, and OpenVINO fuses the split
    # products into one attention.
    form: Form | None = Form(rows="batch", attention="split", norm="layer", stem="matrix")
    limits: tuple[Limit, ...] = ()

    def missing(self) -> str | None:
        """What is not installed; see `Runtime.missing`."""
        return missing_module(self.name, self.extra, "openvino")

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Convert the graph; see `Runtime.write`."""
        without_telemetry()
        import openvino

        quantized = source.precision in ("int8", "int8-static")
        if quantized and (reason := missing_module(self.name, self.extra, "nncf")):
            raise InputError(reason)
        with tempfile.TemporaryDirectory(prefix="vitrim-openvino-") as temporary:
            path = Path(temporary) / "model.onnx"
            onnx.save(source.graph, str(path))
            try:
                model = openvino.Core().read_model(str(path))
            except Exception as error:  # OpenVINO's errors share no narrower type
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"runtime openvino: cannot read the graph: {reason}; try another form"
                ) from None
            session: dict[str, str] = {}
            assumes: tuple[str, ...] = ()
            if source.precision == "int8":
                # Where products would saturate, OpenVINO leaves the activations in fp32.
                model = _quantize_weights(model)
                group_size = source.options.get("group_size", GROUP_SIZE)
                session["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group_size
            elif source.precision == "int8-static":
                with openvino_contained():
                    model = _quantize_all(model, source)
                assumes = int8_assumptions(source.target)
            elif source.precision == "bf16":
                session["INFERENCE_PRECISION_HINT"] = "bf16"
            # fp16 would be smaller, but the processor computes in fp32.
            openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
        return RuntimeFiles(
            "model.xml",
            (("model.bin", "weights"),),
            session=session,
            assumes=assumes,
            versions=tool_versions(*(("openvino", "nncf") if quantized else ("openvino",))),
            choices=partial(chosen_tokens, session=session),
            first_difference=first_difference,
        )


def first_difference(source: Source, model: Path, tolerance: float) -> str | None:
    """The first node of the graph whose value differs by more than `tolerance`, described.

    OpenVINO's model keeps the names of the graph's values, so these are compared one by one.

    Returns:
        None where no value can be compared, or all are equal within the tolerance.
    """
    batch = 2 if source.batch == "dynamic" else source.batch
    images = np.ascontiguousarray(np.resize(source.probe.images, (batch, *source.shape)))
    names = [output for node in source.graph.graph.node for output in node.output if output]
    try:
        found = _model_values(model, set(names), images)
    # OpenVINO's errors share no type; without inner values the stage's figure remains.
    except Exception:
        return None
    expected = inner_values(source.graph, names, images)
    return first_mismatch(source.graph, names, expected, found, tolerance)


def chosen_tokens(
    path: Path, names: Sequence[str], images: NDArray[Any], session: Mapping[str, str]
) -> tuple[NDArray[Any], ...] | None:
    """Which tokens the selections of a written model choose.

    Args:
        path: The model.
        names: The names of the choices in the graph that it was made from.
        images: float32 (count, channels, height, width).
        session: Settings that the runtime opens the model with.

    Returns:
        One array (count, kept) for each name; None where the model has lost a name.
    """
    size = _fixed_batch(path) or len(images)
    found: list[dict[str, NDArray[Any]]] = []
    for first in range(0, len(images), size):
        batch = np.resize(images[first : first + size], (size, *images.shape[1:]))
        values = _model_values(path, set(names), np.ascontiguousarray(batch), session)
        if not set(names) <= set(values):
            return None
        found.append({name: values[name][: len(images) - first] for name in names})
    return tuple(np.concatenate([values[name] for values in found]) for name in names)


def _fixed_batch(path: Path) -> int | None:
    without_telemetry()
    import openvino

    batch = openvino.Core().read_model(str(path)).inputs[0].get_partial_shape()[0]
    return int(batch.get_length()) if batch.is_static else None


@openvino_contained()
def _model_values(
    path: Path,
    wanted: set[str],
    images: NDArray[Any],
    session: Mapping[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """The inner values of OpenVINO's model, by the graph's names."""
    without_telemetry()
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    names = {
        name
        for operation in model.get_ordered_ops()
        for value in operation.outputs()
        for name in value.get_names() & wanted
    }
    outputs = {name for value in model.outputs for name in value.get_names()}
    model.add_outputs(sorted(names - outputs))
    properties = {"INFERENCE_PRECISION_HINT": "f32", **(session or {})}
    compiled = core.compile_model(model, "CPU", properties)
    results = compiled([images])
    return {
        name: np.asarray(results[value])
        for value in compiled.outputs
        for name in value.get_names() & wanted
    }


def _quantize_weights(model: Any) -> Any:
    with _quiet(), openvino_contained():
        import nncf

        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT8_SYM,
            ignored_scope=nncf.IgnoredScope(patterns=[SELECTIONS], validate=False),
        )


def _quantize_all(model: Any, source: Source) -> Any:
    assert source.images is not None
    size = 1 if source.batch == "dynamic" else source.batch
    images = source.images[:CALIBRATION_IMAGES]
    batches = [images[first : first + size] for first in range(0, len(images) - size + 1, size)]
    if not batches:
        raise InputError(
            f"int8-static finds its ranges on whole batches of {size}, "
            f"and {len(images)} images were given; give more"
        )
    with _quiet():
        import nncf

        # Products that saturate need weights of seven bits in every product.
        fix = nncf.OverflowFix.FIRST_LAYER if int8_exact(source.target) else nncf.OverflowFix.ENABLE
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(patterns=[SELECTIONS], validate=False),
            subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what NNCF, and torch, which it imports, print about every step."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


RUNTIME = OpenVino()
