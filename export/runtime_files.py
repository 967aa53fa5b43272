"""For the other runtimes: the form that each wants, what it writes, and its answers through the
very engine that is timed.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import onnx
from torch import nn

from ..compress.network.modules.model import CompactModel
from ..core.errors import InputError, UnsupportedModel
from ..runtimes import EngineError
from ..runtimes.subprocess_inference import infer_in_subprocess
from .artifact import entry_for
from .cross_target import EMULATED_S
from .forms import Form
from .graphs.candidates import candidates, readable
from .manifest import Array, FileEntry, Parity
from .onnxruntime_files import prove
from .parity import Probe, require
from .request import ExportRequest
from .runtimes import Runtime, RuntimeFiles, Source
from .stage_line import stage, stages_hidden

TORCH = "torch"
# What `tune` means to a runtime that measures kernels: for how long, unless the caller says.
TUNE = {"tune_s": "60"}


def source_for(
    runtime: Runtime,
    model: nn.Module,
    tidy: onnx.ModelProto,
    order: ExportRequest,
    probe: Probe,
    first: Array,
    stages: list[Parity],
    notes: list[str],
) -> tuple[str, Source]:
    """The form's name and what the runtime converts; stages and notes grow. Errors: ParityError,
    UnsupportedModel, InputError.
    """
    graph, name = tidy, TORCH
    if runtime.form is not None or order.form is not None:
        if isinstance(order.form, Form) and order.form.runtime_operators:
            raise InputError(
                f"form {order.form.name} holds operators of ONNX Runtime's own; take another for {runtime.name}, or leave it out"
            )
        found, why = candidates(model, tidy, order, portable=runtime.form)
        notes.extend(why)
        parity = prove(model, found[0], order, probe, first)
        graph, name = found[0].model, found[0].name
        if found[0].form is not None:
            stages.append(parity)
    try:
        compact: CompactModel | None = readable(model)
    except UnsupportedModel:
        compact = None
    source = Source(
        model=model, compact=compact, graph=graph, shape=order.shape, batch=order.batch, target=order.target, threads=order.threads,
        precision=order.precision, images=order.images, probe=probe, options={**TUNE, **order.options} if order.tune else order.options,
    )  # fmt: skip
    return name, source


def write_and_ask(
    runtime: Runtime,
    source: Source,
    folder: Path,
    order: ExportRequest,
    stages: list[Parity],
    notes: list[str],
) -> tuple[RuntimeFiles, list[FileEntry]]:
    """Let the runtime write, then hold its answers against torch; stages and notes grow. Errors:
    InputError, ParityError.
    """
    work = (
        "compiling"
        if runtime.name == "tvm"
        else "calibrating"
        if order.precision == "int8-static"
        else "converting"
    )
    stage(f"{work} for {runtime.name}, {order.precision}")
    # Tuning shows a bar of its own.
    with stages_hidden() if "tune_s" in source.options else contextlib.nullcontext():
        written = runtime.write(source, folder)
    files = [entry_for(folder, written.main, "model")]
    files += [entry_for(folder, path, role) for path, role in written.files if path != written.main]
    stages.extend(written.stages)
    notes.extend(written.notes)
    if written.parity_skipped is not None:
        notes.append(f"parity was not run: {written.parity_skipped}")
        return written, files
    stage(f"parity of {runtime.name}")
    batch = 1 if order.batch == "dynamic" else order.batch
    job = {
        "runtime": runtime.name,
        "model": str((folder / written.main).resolve()),
        "threads": order.threads,
        "input": {"name": "images", "shape": [batch, *order.shape], "type": "float32"},
        "session": dict(written.session),
        # An emulated processor is hundreds of times slower, so it answers as many images as fit.
        **({} if written.command is None else {"time_limit_s": EMULATED_S}),
    }
    try:
        logits, told = infer_in_subprocess(job, source.probe.images, command=written.command)
    except EngineError as error:
        raise InputError(f"runtime {runtime.name}: what it wrote does not run: {error}") from None
    words = runtime.name if order.precision == "fp32" else f"{runtime.name} {order.precision}"
    asked = replace(
        source.probe,
        images=source.probe.images[: len(logits)],
        logits=source.probe.logits[: len(logits)],
    )
    parity = asked.compare(words, logits, tolerance=order.allowed[order.precision])
    stages.append(
        require(parity, lambda tolerance: _inside(runtime, source, written, folder, tolerance))
    )
    notes.append(
        f"asked in {told['runtime']} {told['version']} on {told['provider'] or 'what it chose'}"
    )
    return written, files


def _inside(
    runtime: Runtime, source: Source, written: RuntimeFiles, folder: Path, tolerance: float
) -> str:
    """Where in what was written the answers first go wrong, as far as the runtime shows it."""
    if written.first_difference is None or written.command is not None:
        return f"somewhere inside {runtime.name}, which shows no inner values here"
    place = written.first_difference(source, folder / written.main, tolerance)
    return (
        place
        or f"somewhere inside {runtime.name}, behind the last inner value that can be held against torch's"
    )
