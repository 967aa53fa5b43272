"""From an .onnx file of another exporter to an artifact.

The graph is rewritten by exact passes, simplified and quantized, and each stage is verified against
the file. Only .onnx files with one image input and one output are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from ...core.errors import InputError
from ...core.storage import replace_folder, require_output_folder, sha256_file
from ..artifact import ARTIFACT, Artifact
from ..cross_target import verify_on_target
from ..export_run import ExportRun
from ..manifest import Array, Batch, Precision, Provenance, tool_versions
from ..onnxruntime_files import check_precision, cpu_features, save, tuned
from ..parity import TOLERANCES, Probe, first_difference, model_outputs, session_outputs
from ..passes import steps
from ..quantization.quantize import Calibration
from ..request import (
    DeviceOptions,
    ExportRequest,
    GraphOptions,
    ManifestOptions,
    NumericOptions,
    preprocessing_of,
    validate_options,
)
from ..sessions import config_for
from ..stage_line import stage, stages_shown
from .candidates import graph_in_precision
from .model_proto import MODEL, open_graph, opset_of
from .torch_graph import simplify_and_check, strip_metadata

TOOLS = ("vitrim", "onnx", "onnxruntime", "onnxsim", "numpy", "pillow")
GIVEN, PASSES = "given", "passes"
MAX_GRAPH_BYTES = 64 * 1024**3


@stages_shown()
def export_graph(
    path: Path | str,
    folder: Path | str,
    *,
    target: str = "host",
    precision: Precision = "fp32",
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
    images: Array | None = None,
    batch: Batch | None = None,
    provenance: Mapping[str, str] | None = None,
    form: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    calibration: Calibration | Literal["best"] = "min-max",
    tune: bool = False,
    threads: int = 1,
    ort_format: bool = False,
    tolerances: Mapping[str, float] | None = None,
) -> Artifact:
    """Write an artifact of an ONNX classifier for ONNX Runtime, verified against the file.

    Args:
        path: A model with one float32 input (batch, channels, height, width) and one output
            (batch, classes). Their names are kept.
        folder: Where to write. On failure nothing is left there.
        target: Name of a device profile, or of its TOML file.
        precision: "fp32", "int8" (dynamic), "int8-static" (needs `images`), "int8-weights",
            "int4-weights"; "fp16" where the target computes in it.
        preprocessing: A `Preprocessing`, or a mapping of the manifest's fields. None: the manifest
            holds none.
        labels: One for each class. None: the manifest holds none.
        images: Real inputs for parity and calibration, float32 (count, channels, height, width).
            None: seeded noise, recorded as such.
        batch: Images in a batch, or "dynamic". None: the graph's own, and 1 where it is free.
        provenance: Further entries for the manifest.
        form: "passes" applies the exact passes, "given" does not. None: "passes".
        overwrite: Whether to replace a folder that is not empty.
        name: Name of the model. None: the file's.
        calibration: How "int8-static" finds ranges: "min-max", "percentile", "entropy", or "best"
            of the three.
        tune: Measure the file's graph and the rewritten one here, and keep the faster.
        threads: Threads to tune and time for.
        ort_format: Also write `model.ort` and the operators of a reduced runtime build.
        tolerances: Largest error relative to the largest logit, by precision; entries that are
            missing keep their defaults.

    Returns:
        The artifact, loaded and verified byte for byte.

    Raises:
        InputError: The file is not such a model, or an option does not fit.
        ParityError: A stage's outputs differ; the message names the stage, the first node that
            differs and by how much.
    """
    path, folder = Path(path), Path(folder)
    require_output_folder(folder, ARTIFACT, overwrite=overwrite, inputs={"the model": path})
    if form not in (None, GIVEN, PASSES):
        raise InputError(
            f"form {form!r}: an imported graph is exported as {GIVEN!r} or {PASSES!r}; "
            "the graph forms need a saved model"
        )
    stage(f"reading {path.name}")
    graph = read_graph(path)
    chosen, shape = _with_batch(graph, path, batch)
    device = DeviceOptions(target, threads=threads)
    graph_options = GraphOptions(tune=tune, ort_format=ort_format)
    allowed = {**TOLERANCES, **(tolerances or {})}
    numeric = NumericOptions(precision, images, calibration, allowed)
    validate_options(chosen, device, graph_options, numeric)
    manifest = ManifestOptions(
        name,
        preprocessing_of(preprocessing),
        None if labels is None else tuple(labels),
        provenance or {},
    )
    request = ExportRequest(shape, chosen, overwrite, device, graph_options, numeric, manifest)
    probe = Probe.of(lambda inputs: _reference_outputs(graph, inputs, chosen), shape, images)
    run = ExportRun(request, probe, probe.images[: request.input_batch], reference=GIVEN)
    _export(run, graph, path, folder, form or PASSES)
    return Artifact.load(folder)


def _export(run: ExportRun, graph: onnx.ModelProto, path: Path, folder: Path, form: str) -> None:
    request = run.request
    float_graph = _rewritten(run, graph, with_passes=form == PASSES)
    if request.numeric.precision != "fp32":
        stage("calibrating" if request.numeric.precision == "int8-static" else "quantizing")
    final = graph_in_precision(float_graph, request, run.notes)
    check_precision(run, float_graph, final)
    if request.graph.tune and form == PASSES:
        rivals = {PASSES: final, GIVEN: graph_in_precision(graph, request, run.notes)}
        stage("measuring the imported graph and the rewritten one")
        form = tuned(run, rivals)
        final = rivals[form]
    with replace_folder(folder, ARTIFACT, overwrite=request.overwrite) as aside:
        files = save(run, final, aside)
        verify_on_target(
            run, aside / MODEL, lambda inputs: model_outputs(final, inputs, batch=request.batch)
        )
        manifest = run.manifest(
            name=path.stem,
            form=form,
            files=files,
            provenance=_provenance(graph, path, request.manifest.provenance),
            versions=tool_versions(*TOOLS),
            opset=opset_of(final),
            session=config_for(request.device.threads),
            cpu=cpu_features(run),
            tensors=(final.graph.input[0].name, final.graph.output[0].name),
        )
        Artifact.write(aside, manifest)


def _provenance(graph: onnx.ModelProto, path: Path, details: Mapping[str, str]) -> Provenance:
    return Provenance(
        source=f"onnx graph by {graph.producer_name or 'an unnamed producer'}",
        weights_sha256=sha256_file(path),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer),
        details={str(key): str(value) for key, value in details.items()},
    )


def read_graph(path: Path) -> onnx.ModelProto:
    """Read and check a model, with its external weights from its own folder.

    Raises:
        InputError: The file is not a valid model; the message names the file and the reason.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an .onnx file, or a folder that vitrim saved")
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise InputError(f"{path}: {size} bytes are more than a model may have ({MAX_GRAPH_BYTES})")
    try:
        # By path, so that the checker also checks external weights, and that they are in the
        # model's folder.
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path))
    # protobuf, the checker and the file system raise types without a common base
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a valid ONNX model ({reason}); export it again") from None
    if graph.functions or any(
        entry.HasField("g") or entry.graphs for node in graph.graph.node for entry in node.attribute
    ):
        raise InputError(
            f"{path}: holds functions or inner graphs (If, Loop); "
            "export the model for inference alone"
        )
    return strip_metadata(graph)


def image_of(graph: onnx.ModelProto, path: Path) -> tuple[int, int, int]:
    """Return (channels, height, width) of the one input.

    Raises:
        InputError: The model is no image classifier; the message names the file.
    """
    inputs, outputs = _inputs(graph), graph.graph.output
    if len(inputs) != 1 or len(outputs) != 1:
        raise InputError(
            f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; "
            "an image classifier has one of each"
        )
    kind, sides = inputs[0].type.tensor_type.elem_type, inputs[0].type.tensor_type.shape.dim
    sizes = [side.dim_value if side.HasField("dim_value") else None for side in sides]
    if (
        kind != onnx.TensorProto.FLOAT
        or len(sizes) != 4
        or any(size is None or size < 1 for size in sizes[1:])
    ):
        shown = ", ".join("?" if size is None else str(size) for size in sizes)
        raise InputError(
            f"{path}: input {inputs[0].name!r} is ({shown}); give a float32 input "
            "(batch, channels, height, width) with a fixed image size"
        )
    return int(sizes[1] or 0), int(sizes[2] or 0), int(sizes[3] or 0)


def _inputs(graph: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are not weights as well."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [value for value in graph.graph.input if value.name not in weights]


def _with_batch(
    graph: onnx.ModelProto, path: Path, batch: Batch | None
) -> tuple[Batch, tuple[int, int, int]]:
    """Write the batch into the graph where it was free; return it and the image's shape."""
    shape = image_of(graph, path)
    inputs = _inputs(graph)
    sides = inputs[0].type.tensor_type.shape.dim
    own = int(sides[0].dim_value) if sides[0].HasField("dim_value") else None
    if own is not None and batch not in (None, own):
        raise InputError(
            f"{path}: holds batches of {own}, and batch {batch} was requested; "
            "export the graph again with that batch, or a free one"
        )
    chosen: Batch = batch if batch is not None else own or 1
    if own is None and chosen != "dynamic":
        sides[0].Clear()
        sides[0].dim_value = int(chosen)
        result = graph.graph.output[0].type.tensor_type
        if result.HasField("shape") and result.shape.dim:
            result.shape.dim[0].Clear()
            result.shape.dim[0].dim_value = int(chosen)
    # Weights that are inputs as well could be overridden, so no runtime folds them.
    names = {value.name for value in inputs}
    for value in [value for value in graph.graph.input if value.name not in names]:
        graph.graph.input.remove(value)
    return chosen, shape


def _reference_outputs(graph: onnx.ModelProto, images: Array, batch: Batch) -> Array:
    """Return the file's own outputs, without any of the runtime's optimisations."""
    session = open_graph(graph, optimised=False)
    logits: Array = session_outputs(session, images, batch=batch)
    if logits.ndim != 2:
        raise InputError(
            f"the graph returns shape {logits.shape}; a classifier returns (batch, classes)"
        )
    return logits


def _rewritten(run: ExportRun, graph: onnx.ModelProto, *, with_passes: bool) -> onnx.ModelProto:
    """Return the graph after all passes and simplification, and record each stage's parity."""
    images, batch = run.probe.images, run.request.batch
    stage("parity of the imported graph")
    outputs = model_outputs(graph, images, batch=batch)
    run.check("optimised by the runtime", outputs, lambda _: None)
    found = graph
    for step in steps(graph) if with_passes else ():
        stage(f"parity of pass {step.name}")
        before, after = found, step.after

        def locate(
            tolerance: float, before: onnx.ModelProto = before, after: onnx.ModelProto = after
        ) -> str | None:
            return first_difference(before, after, run.first_batch, tolerance)

        run.check(f"pass {step.name}", model_outputs(after, images, batch=batch), locate)
        run.notes.append(f"pass {step.name}: {step.count} places")
        found = after
    return simplify_and_check(run, found)
