"""The artifact for a runtime other than ONNX Runtime: its form, its files and their parity.

Parity is computed by the same engine that benchmarks time.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from torch import nn

from ..compress.network.modules.model import CompactModel
from ..core.errors import InputError, UnsupportedModel
from ..runtimes import EngineError
from ..runtimes.subprocess_inference import infer_in_subprocess, infer_with_choices
from .artifact import entry_for
from .capabilities import int8_saturates_here
from .cross_target import parity_note
from .export_run import ExportRun
from .forms import Form
from .graphs.candidates import candidates, readable
from .manifest import Array, FileEntry
from .onnxruntime_files import check_candidate
from .parity import ParityError
from .runtimes import Runtime, RuntimeFiles, Source
from .runtimes.runtime import MakeGraph
from .stage_line import stage, stages_hidden

TORCH = "torch"
# For runtimes that measure kernels, `tune` means tuning for this long unless the caller sets it.
TUNE = {"tune_s": "60"}


def source_for(
    run: ExportRun, runtime: Runtime, model: nn.Module, plain: MakeGraph
) -> tuple[str, Source]:
    """Prepare what the runtime converts, and record the parity of its graph.

    Args:
        run: The export.
        runtime: The runtime; its form applies unless the request names one.
        model: The torch module.
        plain: Returns its graph as torch exports it.

    Returns:
        The form's name and the source.

    Raises:
        InputError: The requested form has operators that the runtime does not.
        UnsupportedModel: The requested form does not cover the model.
        ParityError: The graph's outputs differ from the model's.
    """
    request = run.request
    make_graph, name, form = plain, TORCH, request.graph.form
    if runtime.form is not None or form is not None:
        if isinstance(form, Form) and form.runtime_operators:
            raise InputError(
                f"form {form.name} holds operators of ONNX Runtime's own; use another for "
                f"{runtime.name}, or leave it out"
            )
        found, notes = candidates(model, plain, request, portable=runtime.form)
        run.notes.extend(notes)
        candidate = found[0]
        parity = check_candidate(run, model, candidate)
        make_graph, name = (lambda: candidate.model), candidate.name
        if candidate.form is not None:
            run.stages.extend(parity)
    try:
        compact: CompactModel | None = readable(model)
    except UnsupportedModel:
        compact = None
    device, settings = request.device, request.device.settings
    source = Source(
        model=model,
        compact=compact,
        make_graph=make_graph,
        shape=request.shape,
        batch=request.batch,
        target=device.target,
        threads=device.threads,
        precision=request.numeric.precision,
        images=request.numeric.images,
        probe=run.probe,
        options={**TUNE, **settings} if request.graph.tune else settings,
        outputs=request.outputs,
    )
    return name, source


def write_and_verify(
    run: ExportRun, runtime: Runtime, source: Source, folder: Path
) -> tuple[RuntimeFiles, list[FileEntry]]:
    """Let the runtime write its files, run them, and record their parity.

    Args:
        run: The export.
        runtime: The runtime.
        source: What it converts.
        folder: An empty folder.

    Returns:
        What the runtime wrote, and the manifest's entries.

    Raises:
        InputError: The conversion failed, or its result does not run.
        ParityError: The outputs differ from the model's.
    """
    precision = run.request.numeric.precision
    work = "calibrating" if precision == "int8-static" else "converting"
    stage(f"{'compiling' if runtime.name == 'tvm' else work} for {runtime.name}, {precision}")
    # Tuning shows a progress bar of its own.
    with stages_hidden() if "tune_s" in source.options else contextlib.nullcontext():
        written = runtime.write(source, folder)
    files = [entry_for(folder, written.main, "model")]
    files += [entry_for(folder, path, role) for path, role in written.files if path != written.main]
    run.stages.extend(written.stages)
    run.notes.extend(written.notes)
    target = run.request.device.target
    skipped = written.parity_skipped
    if skipped is None and written.assumes:
        skipped = int8_saturates_here(target)
    if skipped is not None:
        run.notes.append(f"parity was not run: {skipped}")
        return written, files
    stage(f"parity of {runtime.name}")
    main = folder / written.main
    job = run.job(main, written.session, emulated=written.command is not None)
    batches: list[list[Array]] = []
    try:
        if run.selections is not None and written.engine_choices:
            logits, batches, facts = infer_with_choices(
                job, source.probe.images, command=written.command
            )
        else:
            logits, facts = infer_in_subprocess(job, source.probe.images, command=written.command)
    except EngineError as error:
        reason = str(error).replace(str(main), written.main)
        raise InputError(
            f"runtime {runtime.name}: the written file does not run: {reason}"
        ) from None

    def locate(tolerance: float) -> str:
        return _first_difference(runtime, source, written, main, tolerance)

    name = runtime.name if precision == "fp32" else f"{runtime.name} {precision}"
    chosen = None
    if run.selections is not None:
        names = run.selections.values
        if written.choices is not None and written.command is None:
            chosen = written.choices(main, names, source.probe.images)
        elif batches and all(len(batch) == len(names) for batch in batches):
            chosen = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
    if run.selections is not None and chosen is None:
        run.notes.append(
            f"{runtime.name} does not show which tokens it selects; its outputs are compared with "
            "those for the model's own choices"
        )
    try:
        run.check(name, logits, locate, precision=precision, chosen=chosen)
    except ParityError as error:
        if source.compact is not None or runtime.form is None:
            raise
        raise ParityError(
            f"runtime {runtime.name}: its converter does not keep what torch's graph of "
            f"{type(source.model).__name__} computes ({error}); export for onnxruntime"
        ) from None
    provider = facts["provider"] or "its default provider"
    run.notes.append(f"verified in {facts['runtime']} {facts['version']} on {provider}")
    # Compiled code is the same everywhere.
    if not written.needs and written.command is None and (note := parity_note(target)):
        run.notes.append(note)
    return written, files


def _first_difference(
    runtime: Runtime, source: Source, written: RuntimeFiles, main: Path, tolerance: float
) -> str:
    """Describe where the outputs first differ, as far as the runtime shows inner values."""
    if written.first_difference is None or written.command is not None:
        return f"somewhere inside {runtime.name}, which shows no inner values here"
    place = written.first_difference(source, main, tolerance)
    return place or (
        f"somewhere inside {runtime.name}, after the last inner value that can be compared with "
        "torch's"
    )
