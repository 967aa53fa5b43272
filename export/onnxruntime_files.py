"""The artifact for ONNX Runtime: graph form, precision and files."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import onnx
from torch import nn

from ..core.errors import InputError
from . import capabilities
from .artifact import entry_for
from .export_run import ExportRun
from .graphs.candidates import Candidate, candidates, in_precision, where_in_form
from .graphs.model_proto import save_model
from .graphs.stored_precision import stored_precision
from .graphs.tuning import fastest
from .manifest import Array, CpuFeatures, FileEntry, Parity, Precision
from .parity import first_difference, session_outputs
from .runtimes.runtime import MakeGraph
from .sessions import open_session
from .stage_line import stage

ORT_FILE = "model.ort"
OPERATORS = "required_operators.config"


def choose(run: ExportRun, model: nn.Module, plain: MakeGraph) -> tuple[str, onnx.ModelProto]:
    """Return the form's name and the finished graph, and record parity and notes.

    Raises:
        ParityError: A graph's outputs differ from the model's.
        UnsupportedModel: The requested form does not cover the model.
    """
    request, numeric = run.request, run.request.numeric
    found, notes = candidates(model, plain, request)
    run.notes.extend(notes)
    # Which form is fastest can depend on the precision, so the finished graphs are compared.
    finished: dict[str, tuple[Candidate, list[Parity], onnx.ModelProto]] = {}
    for candidate in found:
        parity = check_candidate(run, model, candidate)
        if numeric.precision != "fp32":
            work = "calibrating" if numeric.precision == "int8-static" else "quantizing"
            stage(f"{work} {candidate.name}")
        final = in_precision(model, candidate, request, run.notes)
        finished[candidate.name] = (candidate, parity, final)
    chosen = next(iter(finished))
    if request.graph.tune and len(finished) > 1:
        stage("measuring the forms")
        graphs = {name: final for name, (_, _, final) in finished.items()}
        chosen = tuned(run, graphs)
    candidate, parity, final = finished[chosen]
    if candidate.form is not None:
        run.stages.extend(parity)
    check_precision(run, candidate.model, final)
    return candidate.name, final


def check_candidate(run: ExportRun, model: nn.Module, candidate: Candidate) -> list[Parity]:
    """Compare a candidate's float graph with the model.

    Raises:
        ParityError: The outputs differ; the message names the first node.
    """
    stage(f"parity of form {candidate.name}")
    logits, chosen = run.outputs_of(candidate.model)

    def locate(tolerance: float) -> str | None:
        return where_in_form(model, candidate, run.first_batch, run.request, tolerance)

    return run.compare(f"form {candidate.name}", logits, locate, chosen=chosen)


def check_precision(run: ExportRun, float_graph: onnx.ModelProto, final: onnx.ModelProto) -> None:
    """Record the parity of a graph in the requested precision, unless that is fp32.

    Eight-bit products that saturate on this processor are not compared; the notes state it.

    Raises:
        ParityError: The outputs differ; the message names the first node.
        InputError: No weight changed.
    """
    precision = run.request.numeric.precision
    if precision == "fp32":
        return
    require_narrow_weights(final, precision)
    run.notes.extend(int8_notes(run))
    reason = capabilities.int8_saturates_here(run.request.device.target)
    if reason and precision in capabilities.EIGHT_BITS:
        run.notes.append(f"parity of {precision} was not run: {reason}")
        return
    stage(f"parity of {precision}")
    logits, chosen = run.outputs_of(final)

    def locate(tolerance: float) -> str | None:
        return first_difference(float_graph, final, run.first_batch, tolerance)

    run.check(precision, logits, locate, precision=precision, chosen=chosen)


def require_narrow_weights(graph: onnx.ModelProto, precision: Precision) -> None:
    """Raise InputError where quantizing to a precision changed no weight."""
    if stored_precision(graph).is_float32:
        products = "MatMul" if precision.endswith("weights") else "MatMul or Gemm"
        raise InputError(
            f"precision {precision!r} changes no weight of this model: it has no {products} with a "
            "constant float32 matrix; export it as fp32"
        )


def int8_notes(run: ExportRun) -> list[str]:
    """Return what the manifest notes about eight bits on the target."""
    device, precision = run.request.device, run.request.numeric.precision
    warning = (
        capabilities.int8_warning(device.target) if precision in capabilities.EIGHT_BITS else None
    )
    return [warning] if warning else []


def cpu_features(run: ExportRun) -> CpuFeatures:
    """Return what a graph assumes; the runtime itself chooses kernels that the processor has."""
    if run.request.numeric.precision not in capabilities.EIGHT_BITS:
        return CpuFeatures()
    return CpuFeatures(assumes=capabilities.int8_assumptions(run.request.device.target))


def tuned(run: ExportRun, graphs: dict[str, onnx.ModelProto]) -> str:
    """Return the name of the graph that is fastest here, and record all latencies."""
    timings = fastest(graphs, run.first_batch, threads=run.request.device.threads)
    latencies = ", ".join(f"{name} {latency_s * 1e3:.3f} ms" for name, latency_s in timings)
    run.notes.append(f"tuned here: {latencies}")
    return timings[0][0]


def save(run: ExportRun, final: onnx.ModelProto, folder: Path) -> list[FileEntry]:
    """Write the graph, and on request ONNX Runtime's own format, whose parity is recorded.

    Raises:
        ParityError: The saved file's outputs differ.
    """
    stage("writing model.onnx")
    files = save_model(final, folder)
    if run.request.graph.ort_format:
        stage("writing model.ort")
        entries = save_ort_format(folder / "model.onnx", folder)
        precision = run.request.numeric.precision
        target = run.request.device.target
        if precision not in capabilities.EIGHT_BITS or not capabilities.int8_saturates_here(target):
            logits = ort_outputs(run, folder / ORT_FILE)
            _, chosen = run.outputs_of(final)
            run.check("ort file", logits, lambda _: None, precision=precision, chosen=chosen)
        files.extend(entries)
    return files


def ort_outputs(run: ExportRun, file: Path) -> Array:
    """Return the outputs of a saved file, as the runtime loads it."""
    session = open_session(file)
    return session_outputs(session, run.probe.images, batch=run.request.batch)


def save_ort_format(model: Path, folder: Path) -> list[FileEntry]:
    """Write `model.ort` and the operators that a reduced runtime build needs.

    The file is optimised as far as every processor allows: layouts that only this machine uses are
    not baked in.
    """
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / ORT_FILE)
    options.log_severity_level = 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            create_config_from_models([folder / ORT_FILE], folder / OPERATORS, False)
    finally:
        logging.disable(level)
    lines = (folder / OPERATORS).read_text().splitlines(keepends=True)
    # The tool writes the paths of this machine into comments.
    (folder / OPERATORS).write_text("".join(line for line in lines if not line.startswith("#")))
    return [entry_for(folder, ORT_FILE, "other"), entry_for(folder, OPERATORS, "operators")]
