"""From an .onnx file that somebody else wrote to an artifact: tidied, rewritten by exact passes,
quantized, each stage proven against the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from ...core.errors import InputError
from ...core.storage import replace_folder, require_empty, sha256_file
from .. import capabilities
from ..artifact import Artifact
from ..cross_target import ask_elsewhere
from ..manifest import (
    Array,
    Batch,
    Manifest,
    Parity,
    Precision,
    Provenance,
    TensorSpec,
    tool_versions,
)
from ..onnxruntime_files import save
from ..parity import TOLERANCES, Probe, first_difference, model_outputs, require, session_outputs
from ..passes import steps
from ..quantization import quantize
from ..quantization.quantize import half
from ..request import ExportRequest, check, preprocessing_of
from ..sessions import config_for
from ..stage_line import stage, stages_shown
from .candidates import static
from .model_proto import MODEL, open_graph, opset_of
from .torch_graph import simplify, tidy_names
from .tuning import fastest

TOOLS = ("vitrim", "onnx", "onnxruntime", "onnxsim", "numpy", "pillow")
GIVEN, PASSES = "given", "passes"
MAX_GRAPH_BYTES = 64 * 1024**3


@stages_shown()
def export_graph(
    path: Path | str,
    folder: Path | str,
    *,
    target: str = "x86-64",
    precision: Precision = "fp32",
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
    images: Array | None = None,
    batch: Batch | None = None,
    provenance: Mapping[str, str] | None = None,
    form: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    calibration: quantize.Calibration | Literal["best"] = "min-max",
    tune: bool = False,
    threads: int = 1,
    ort_format: bool = False,
    tolerances: Mapping[str, float] | None = None,
) -> Artifact:
    """Write an artifact of an ONNX classifier for ONNX Runtime, proven equal to the file after
    every stage.

    path: a model with one float32 input (batch, channels, height, width) and one output (batch,
    classes); the names stay. batch: a size or "dynamic"; None takes the graph's own, and 1 where it
    is free. form: "given" leaves the passes out, "passes" (and None) takes them. The other
    arguments are those of `exporter.export`. Errors: InputError for what does not fit; ParityError
    naming stage, node and by how much.
    """
    path, folder = Path(path), Path(folder)
    require_empty(folder, overwrite=overwrite)
    if form not in (None, GIVEN, PASSES):
        raise InputError(
            f"form {form!r}: a graph that was given comes as {GIVEN!r} or {PASSES!r}; forms of ours need a saved model"
        )
    stage(f"reading {path.name}")
    graph = read_graph(path)
    chosen, shape = _fixed(graph, path, batch)
    check("onnxruntime", precision, chosen, target, images, tune, ort_format, calibration)
    order = ExportRequest(
        shape=shape, allowed={**TOLERANCES, **(tolerances or {})}, target=target, runtime="onnxruntime", precision=precision,
        preprocessing=preprocessing_of(preprocessing), labels=None if labels is None else tuple(labels), images=images, batch=chosen,
        provenance=provenance or {}, form=None, overwrite=overwrite, name=name, opset=None, calibration=calibration, tune=tune,
        threads=threads, ort_format=ort_format, options={},
    )  # fmt: skip
    probe = Probe.of(lambda pictures: _plainly(graph, pictures, chosen), shape, images)
    stages: list[Parity] = []
    notes: list[str] = []
    found = _rewritten(graph, order, probe, stages, notes, with_passes=form != GIVEN)
    form, float_graph = (PASSES, found) if form != GIVEN else (GIVEN, found)
    if precision != "fp32":
        stage("calibrating" if precision == "int8-static" else "quantizing")
    final = _in_precision(float_graph, order, notes)
    first = probe.images[: 1 if chosen == "dynamic" else int(chosen)]
    if precision != "fp32":
        stage(f"parity of {precision}")
        parity = probe.compare(
            precision,
            model_outputs(final, probe.images, batch=chosen),
            tolerance=order.allowed[precision],
            reference=GIVEN,
        )
        stages.append(
            require(
                parity, lambda tolerance: first_difference(float_graph, final, first, tolerance)
            )
        )
        if precision in ("int8", "int8-static") and (warning := capabilities.int8_warning(target)):
            notes.append(warning)
    if tune and form == PASSES:
        form, final = _raced(graph, final, order, first, notes)
    with replace_folder(folder, overwrite=overwrite) as aside:
        files = save(final, aside, order, probe, stages)
        ask_elsewhere(
            aside / MODEL,
            order,
            probe,
            lambda pictures: model_outputs(final, pictures, batch=chosen),
            stages,
            notes,
        )
        size: int | str = "batch" if chosen == "dynamic" else chosen
        Artifact.write(
            aside,
            Manifest(
                name=name or path.stem,
                inputs=(
                    TensorSpec(name=final.graph.input[0].name, shape=(size, *shape), layout="NCHW"),
                ),
                outputs=(
                    TensorSpec(
                        name=final.graph.output[0].name,
                        shape=(size, int(probe.logits.shape[-1])),
                        layout="NC",
                    ),
                ),
                batch=chosen,
                preprocessing=order.preprocessing,
                labels=order.labels,
                opset=opset_of(final),
                target=target,
                runtime="onnxruntime",
                precision=precision,
                form=form,
                session=config_for(threads),
                versions=tool_versions(*TOOLS),
                files=tuple(files),
                parity=tuple(stages),
                provenance=Provenance(
                    source=f"onnx graph by {graph.producer_name or 'an unnamed producer'}",
                    weights_sha256=sha256_file(path),
                    parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer),
                    details={str(key): str(value) for key, value in (provenance or {}).items()},
                ),
                notes=tuple(notes),
            ),
        )
    return Artifact.load(folder)


def read_graph(path: Path) -> onnx.ModelProto:
    """A checked model, with its external weights read from its own folder. Errors: InputError
    naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an .onnx file, or a folder that vitrim saved")
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes are more than a model may have ({MAX_GRAPH_BYTES})"
        )
    try:
        # By path, so that the checker sees external weights too, and that they lie beside the
        # model.
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path))
    except (
        Exception
    ) as error:  # protobuf, the checker and the file system raise types without a common base
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a valid ONNX model ({reason}); export it again") from None
    if graph.functions or any(
        entry.HasField("g") or entry.graphs for node in graph.graph.node for entry in node.attribute
    ):
        raise InputError(
            f"{path}: holds functions or inner graphs (If, Loop); export the model for inference alone"
        )
    return tidy_names(graph)


def image_of(graph: onnx.ModelProto, path: Path) -> tuple[int, int, int]:
    """(channels, height, width) of the one input. Errors: InputError naming the file if it is no
    image.
    """
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.graph.output) != 1:
        raise InputError(
            f"{path}: has {len(inputs)} inputs and {len(graph.graph.output)} outputs; an image classifier has one of each"
        )
    kind, sides = inputs[0].type.tensor_type.elem_type, inputs[0].type.tensor_type.shape.dim
    sizes = [side.dim_value if side.HasField("dim_value") else None for side in sides]
    if (
        kind != onnx.TensorProto.FLOAT
        or len(sizes) != 4
        or any(size is None or size < 1 for size in sizes[1:])
    ):
        told = ", ".join("?" if size is None else str(size) for size in sizes)
        raise InputError(
            f"{path}: input {inputs[0].name!r} is ({told}); give a float32 input (batch, channels, height, width) with a fixed image size"
        )
    return int(sizes[1] or 0), int(sizes[2] or 0), int(sizes[3] or 0)


def _fixed(
    graph: onnx.ModelProto, path: Path, batch: Batch | None
) -> tuple[Batch, tuple[int, int, int]]:
    """The batch to build for, written into the graph where it was free, and (channels, height,
    width).
    """
    shape = image_of(graph, path)
    weights = {tensor.name for tensor in graph.graph.initializer}
    sides = next(
        value for value in graph.graph.input if value.name not in weights
    ).type.tensor_type.shape.dim
    own = int(sides[0].dim_value) if sides[0].HasField("dim_value") else None
    if own is not None and batch not in (None, own):
        raise InputError(
            f"{path}: holds batches of {own}, and batch {batch} was asked for; export the graph again with that batch, or a free one"
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
    for value in [value for value in graph.graph.input if value.name in weights]:
        graph.graph.input.remove(value)
    return chosen, shape


def _plainly(graph: onnx.ModelProto, images: Array, batch: Batch) -> Array:
    """The file's own outputs, without any of the runtime's optimisations."""
    session = open_graph(graph, optimised=False)
    logits: Array = session_outputs(session, images, batch=batch)
    if logits.ndim != 2:
        raise InputError(
            f"the graph returns shape {logits.shape}; a classifier returns (batch, classes)"
        )
    return logits


def _rewritten(
    graph: onnx.ModelProto,
    order: ExportRequest,
    probe: Probe,
    stages: list[Parity],
    notes: list[str],
    *,
    with_passes: bool,
) -> onnx.ModelProto:
    tolerance, batch = order.allowed["fp32"], order.batch
    first = probe.images[: 1 if batch == "dynamic" else int(batch)]
    stage("parity of the given graph")
    parity = probe.compare(
        "optimised by the runtime",
        model_outputs(graph, probe.images, batch=batch),
        tolerance=tolerance,
        reference=GIVEN,
    )
    stages.append(require(parity, lambda tolerance: None))
    found = graph
    for step in steps(graph) if with_passes else ():
        stage(f"parity of pass {step.name}")
        parity = probe.compare(
            f"pass {step.name}",
            model_outputs(step.after, probe.images, batch=batch),
            tolerance=tolerance,
            reference=GIVEN,
        )

        def where(
            tolerance: float, before: onnx.ModelProto = found, after: onnx.ModelProto = step.after
        ) -> str | None:
            return first_difference(before, after, first, tolerance)

        stages.append(require(parity, where))
        notes.append(f"pass {step.name}: {step.count} places")
        found = step.after
    stage("simplifying")
    tidy, reason = simplify(found)
    if reason is not None:
        notes.append(reason)
        return found
    stage("parity of the simplified graph")
    parity = probe.compare(
        "simplified",
        model_outputs(tidy, probe.images, batch=batch),
        tolerance=tolerance,
        reference=GIVEN,
    )
    stages.append(
        require(parity, lambda tolerance: first_difference(found, tidy, first, tolerance))
    )
    return tidy


def _in_precision(
    graph: onnx.ModelProto, order: ExportRequest, notes: list[str]
) -> onnx.ModelProto:
    bits = 8 if capabilities.int8_exact(order.target) else 7
    if order.precision == "int8":
        return quantize.int8_dynamic(graph, weight_bits=bits)
    if order.precision == "int8-static":
        return static(graph, order, bits, notes)
    if order.precision == "fp16":
        return half(graph)
    if order.precision in ("int8-weights", "int4-weights"):
        return quantize.weights_only(graph, 4 if order.precision == "int4-weights" else 8)
    return graph


def _raced(
    graph: onnx.ModelProto,
    final: onnx.ModelProto,
    order: ExportRequest,
    first: Array,
    notes: list[str],
) -> tuple[str, onnx.ModelProto]:
    """The given graph and the rewritten one, both in the order's precision: the faster."""
    rivals = {PASSES: final, GIVEN: _in_precision(graph, order, notes)}
    stage("measuring the given graph and the rewritten one")
    timings = fastest(rivals, first, threads=order.threads)
    notes.append(
        "tuned here: " + ", ".join(f"{key} {latency_s * 1e3:.3f} ms" for key, latency_s in timings)
    )
    winner = timings[0][0]
    return winner, rivals[winner]
