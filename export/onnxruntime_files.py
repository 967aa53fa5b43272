"""For ONNX Runtime: the graph form, the precision and the files."""

from __future__ import annotations

from pathlib import Path

import onnx
from torch import nn

from . import capabilities
from .artifact import entry_for
from .graphs.candidates import Candidate, candidates, in_precision, where_in_form
from .graphs.model_proto import save_model
from .graphs.tuning import fastest
from .manifest import Array, FileEntry, Parity
from .parity import Probe, first_difference, model_outputs, require, session_outputs
from .request import ExportRequest
from .stage_line import stage


def choose(
    model: nn.Module,
    tidy: onnx.ModelProto,
    order: ExportRequest,
    probe: Probe,
    first: Array,
    stages: list[Parity],
    notes: list[str],
) -> tuple[str, onnx.ModelProto]:
    """The form's name and the finished graph; stages and notes grow. Errors: ParityError,
    UnsupportedModel.
    """
    found, why = candidates(model, tidy, order)
    notes.extend(why)
    # Which form is fastest may depend on the precision, so it is the finished graphs that race.
    finished: dict[str, tuple[Candidate, Parity, onnx.ModelProto]] = {}
    for candidate in found:
        parity = prove(model, candidate, order, probe, first)
        if order.precision != "fp32":
            stage(
                f"{'calibrating' if order.precision == 'int8-static' else 'quantizing'} {candidate.name}"
            )
        finished[candidate.name] = (candidate, parity, in_precision(model, candidate, order, notes))
    chosen = next(iter(finished))
    if order.tune and len(finished) > 1:
        stage("measuring the forms")
        timings = fastest(
            {key: value[2] for key, value in finished.items()}, first, threads=order.threads
        )
        chosen = timings[0][0]
        notes.append(
            "tuned here: "
            + ", ".join(f"{key} {latency_s * 1e3:.3f} ms" for key, latency_s in timings)
        )
    candidate, parity, final = finished[chosen]
    if candidate.form is not None:
        stages.append(parity)
    precision = order.precision
    if precision != "fp32":
        stage(f"parity of {precision}")
        parity = probe.compare(
            precision,
            model_outputs(final, probe.images, batch=order.batch),
            tolerance=order.allowed[precision],
        )
        stages.append(
            require(
                parity, lambda tolerance: first_difference(candidate.model, final, first, tolerance)
            )
        )
        warning = (
            capabilities.int8_warning(order.target)
            if precision in ("int8", "int8-static")
            else None
        )
        if warning:
            notes.append(warning)
    return candidate.name, final


def prove(
    model: nn.Module, candidate: Candidate, order: ExportRequest, probe: Probe, first: Array
) -> Parity:
    """A candidate's float graph held against torch. Errors: ParityError naming its first differing
    node.
    """
    stage(f"parity of form {candidate.name}")
    logits = model_outputs(candidate.model, probe.images, batch=order.batch)
    parity = probe.compare(f"form {candidate.name}", logits, tolerance=order.allowed["fp32"])
    return require(
        parity, lambda tolerance: where_in_form(model, candidate, first, order, tolerance)
    )


def save(
    final: onnx.ModelProto, folder: Path, order: ExportRequest, probe: Probe, stages: list[Parity]
) -> list[FileEntry]:
    """Write the graph, and what a reduced runtime build reads where that is wanted; stages grow.
    Errors: ParityError.
    """
    stage("writing model.onnx")
    files = save_model(final, folder)
    if order.ort_format:
        from .ort_format import save_ort_format

        stage("writing model.ort")
        saved, logits = save_ort_format(
            folder / "model.onnx",
            folder,
            lambda session: session_outputs(session, probe.images, batch=order.batch),
        )
        parity = probe.compare("ort file", logits, tolerance=order.allowed[order.precision])
        stages.append(require(parity, lambda tolerance: None))
        files.extend(entry_for(folder, path, role) for path, role in saved)  # type: ignore[arg-type]
    return files
