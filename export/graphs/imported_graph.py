"""From an .onnx file of another exporter to an artifact.

The graph is rewritten by exact passes, simplified and quantized, and each stage is verified against
the file. Only .onnx files with one image input and one output are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from ...core.errors import InputError
from ...core.storage import replace_folder, require_output_folder, sha256_file
from ..artifact import ARTIFACT, Artifact
from ..cross_target import verify_on_target
from ..description import description_of, require_description
from ..export_run import ExportRun
from ..manifest import Array, Batch, Precision, Provenance, tool_versions
from ..onnxruntime_files import check_precision, cpu_features, int8_notes, save, tuned
from ..parity import TOLERANCES, Probe, first_difference, model_outputs
from ..passes import steps
from ..quantization.quantize import Calibration
from ..request import (
    DeviceOptions,
    ExportRequest,
    GraphOptions,
    NumericOptions,
    input_images,
    validate_options,
)
from ..sessions import config_for, runtime_errors
from ..stage_line import stage, stages_shown
from .candidates import graph_in_precision
from .graph_file import read_graph
from .graph_reference import GraphReference
from .image_input import ImageInput, cast_ends, drop_weight_inputs, require_connection, set_batch
from .model_proto import MODEL, opset_of
from .stored_precision import StoredPrecision, stored_precision
from .torch_graph import simplify_and_check

TOOLS = ("vitrim", "onnx", "onnxruntime", "onnxsim", "numpy", "pillow")
GIVEN, PASSES = "given", "passes"


@stages_shown()
def export_graph(
    path: Path | str,
    folder: Path | str,
    *,
    target: str = "host",
    precision: Precision | None = None,
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
        path: A model with one input of images, (batch, channels, height, width) or channels last,
            and one output (batch, classes). Their names are kept; they become float32.
        folder: Where to write. On failure nothing is left there.
        target: Name of a device profile, or of its TOML file.
        precision: "fp32", "int8" (dynamic), "int8-static" (needs `images`), "int8-weights",
            "int4-weights"; "fp16" where the target computes in it. None: the file's own. A file
            that is quantized or in half precision already is exported unchanged.
        preprocessing: A `Preprocessing`, or a mapping of the manifest's fields. None: the manifest
            holds none.
        labels: One for each class. None: the manifest holds none.
        images: Real inputs for parity and calibration, float32 (count, channels, height, width),
            or uint8 with `preprocessing`. None: seeded noise, recorded as such.
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
    source = _Source.read(path)
    chosen = _requested_batch(path, source.entry, batch)
    stated = _requested_precision(path, source.stored, precision)
    form = _requested_form(path, source.stored, form)
    manifest = description_of(name, preprocessing, labels, provenance)
    require_description(manifest, source.entry.image, classes_of(source.graph))
    device = DeviceOptions(target, threads=threads)
    graph_options = GraphOptions(tune=tune, ort_format=ort_format)
    allowed = {**TOLERANCES, **(tolerances or {})}
    given = input_images(images, manifest.preprocessing)
    inputs = None if given is None else source.entry.arranged(given)
    numeric = NumericOptions(stated, inputs, calibration, allowed)
    # What a file is in already is not requested of the target.
    requested = numeric if source.stored.is_float32 else replace(numeric, precision="fp32")
    validate_options(chosen, device, graph_options, requested)
    request = ExportRequest(
        source.entry.shape,
        chosen,
        overwrite,
        device,
        graph_options,
        numeric,
        manifest,
        source.entry.layout,
    )
    run = _started(source, request)
    with runtime_errors(str(path), f"try form {GIVEN!r}, or another precision"):
        _export(run, source, folder, form)
    return Artifact.load(folder)


@dataclass(frozen=True)
class _Source:
    """An imported graph, with float32 input and output.

    Attributes:
        path: Its file.
        graph: The graph.
        entry: Its input.
        stored: The precision that it is in.
        notes: What was changed of it.
    """

    path: Path
    graph: onnx.ModelProto
    entry: ImageInput
    stored: StoredPrecision
    notes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> _Source:
        graph = read_graph(path)
        entry = ImageInput.of(graph, path)
        drop_weight_inputs(graph)
        require_connection(graph, entry, path)
        stored = stored_precision(graph)
        notes = []
        if changed := cast_ends(graph):
            notes.append(changed)
        if not stored.is_float32:
            notes.append(
                f"the file is {stored.precision} and was not rewritten: {stored.description}"
            )
        if entry.layout == "NHWC":
            notes.append("the input is channels last: (batch, height, width, channels)")
        return cls(path, graph, entry, stored, tuple(notes))


def classes_of(graph: onnx.ModelProto) -> int | None:
    """The number of outputs, where the file states it."""
    sides = graph.graph.output[0].type.tensor_type.shape.dim
    return int(sides[-1].dim_value) or None if sides else None


def _started(source: _Source, request: ExportRequest) -> ExportRun:
    """Return the export with the graph's reference outputs, and its shapes in the graph."""
    batch, precision = request.symbolic_batch, source.stored.precision or "fp32"
    set_batch(source.graph, source.entry, batch)
    tolerance = request.numeric.tolerances[precision]
    reference = GraphReference(source.graph, source.entry, source.path, request.batch, tolerance)
    stage("reference outputs")
    probe = Probe.of(reference.outputs, request.shape, request.numeric.images)
    set_batch(source.graph, source.entry, batch, probe.logits.shape[1])
    require_description(request.manifest, source.entry.image, int(probe.logits.shape[1]))
    run = ExportRun(request, probe, probe.images[: request.input_batch], reference=GIVEN)
    run.notes.extend(source.notes)
    return run


def _export(run: ExportRun, source: _Source, folder: Path, form: str) -> None:
    request, path, graph = run.request, source.path, source.graph
    if source.stored.is_float32:
        form, final = _finished(run, source, form)
    else:
        final = graph
        _check_optimised(run, graph, request.numeric.precision)
        run.notes.extend(int8_notes(run))
    with replace_folder(folder, ARTIFACT, overwrite=request.overwrite) as aside:
        files = save(run, final, aside)
        verify_on_target(run, aside / MODEL, final)
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


def _finished(run: ExportRun, source: _Source, form: str) -> tuple[str, onnx.ModelProto]:
    """Return the form and the graph in the requested precision, and record each stage's parity."""
    float_graph = _rewritten(run, source.graph, with_passes=form == PASSES)
    final = _in_precision(run, source.path, float_graph)
    check_precision(run, float_graph, final)
    if run.request.graph.tune and form == PASSES:
        rivals = {PASSES: final, GIVEN: _in_precision(run, source.path, source.graph)}
        stage("measuring the imported graph and the rewritten one")
        form = tuned(run, rivals)
        final = rivals[form]
    return form, final


def _in_precision(run: ExportRun, path: Path, graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float graph in the requested precision.

    Raises:
        InputError: The quantizer does not support the graph; the message contains its reason.
    """
    precision = run.request.numeric.precision
    if precision != "fp32":
        stage("calibrating" if precision == "int8-static" else "quantizing")
    try:
        return graph_in_precision(graph, run.request, run.notes)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the quantizers raise types without a common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: cannot be written in {precision} ({reason}); export it as fp32"
        ) from error


def _provenance(graph: onnx.ModelProto, path: Path, details: Mapping[str, str]) -> Provenance:
    return Provenance(
        source=f"onnx graph by {graph.producer_name or 'an unnamed producer'}",
        weights_sha256=sha256_file(path),
        parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer),
        details={str(key): str(value) for key, value in details.items()},
    )


def _requested_precision(
    path: Path, stored: StoredPrecision, precision: Precision | None
) -> Precision:
    """Return the precision of the artifact: the requested one, or what the graph is in.

    Raises:
        InputError: The graph is in no precision that the manifest names, or is quantized and
            another precision was requested.
    """
    if stored.precision is None:
        raise InputError(
            f"{path}: {stored.description}, which is none of {', '.join(get_args(Precision))}; "
            "export it in float32"
        )
    if precision is None or stored.is_float32:
        return precision or stored.precision
    raise InputError(
        f"{path}: is {stored.precision} already ({stored.description}), and {precision} was "
        "requested; leave the precision out to export it unchanged, or export the float32 model"
    )


def _requested_form(path: Path, stored: StoredPrecision, form: str | None) -> str:
    if stored.is_float32:
        return form or PASSES
    if form == PASSES:
        raise InputError(
            f"{path}: form {PASSES!r} rewrites float32 graphs, and this one is {stored.precision}; "
            "leave the form out"
        )
    return GIVEN


def _requested_batch(path: Path, entry: ImageInput, batch: Batch | None) -> Batch:
    own = entry.batch
    if own is None or batch in (None, own):
        return batch if batch is not None else own or 1
    raise InputError(
        f"{path}: holds batches of {own}, and batch {batch} was requested; leave the batch out, or "
        "export the graph again with that batch or a free one"
    )


def _rewritten(run: ExportRun, graph: onnx.ModelProto, *, with_passes: bool) -> onnx.ModelProto:
    """Return the graph after all passes and simplification, and record each stage's parity."""
    images, batch = run.probe.images, run.request.batch
    _check_optimised(run, graph)
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


def _check_optimised(run: ExportRun, graph: onnx.ModelProto, precision: str = "fp32") -> None:
    """Compare the graph as the runtime optimises it with its reference outputs."""
    stage("parity of the imported graph")
    outputs = model_outputs(graph, run.probe.images, batch=run.request.batch)
    run.check("optimised by the runtime", outputs, lambda _: None, precision=precision)
