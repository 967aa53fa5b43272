"""From a torch module to an artifact, each stage proven against the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import InputError
from ..core.storage import replace_folder, require_empty
from .artifact import Artifact
from .cross_target import ask_elsewhere
from .forms import Form, form_named
from .graphs.candidates import PLAIN
from .graphs.model_facts import ask, image_shape, name_of, provenance_of
from .graphs.model_proto import MODEL, opset_of
from .graphs.tracing import trace
from .manifest import (
    Array,
    Batch,
    FileEntry,
    Manifest,
    Parity,
    Precision,
    TensorSpec,
    tool_versions,
)
from .onnxruntime_files import choose, save
from .parity import TOLERANCES, Probe, model_outputs
from .quantization import quantize
from .request import ExportRequest, check, preprocessing_of
from .resized_model import another_size
from .runtime_files import source_for, write_and_ask
from .runtimes import runtime_named
from .sessions import config_for
from .stage_line import stage, stages_shown

TOOLS = (
    "vitrim",
    "torch",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxsim",
    "numpy",
    "pillow",
)


def export(
    model: nn.Module,
    folder: Path | str,
    *,
    target: str = "x86-64",
    runtime: str = "onnxruntime",
    precision: Precision = "fp32",
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
    images: Array | torch.Tensor | None = None,
    batch: Batch = 1,
    provenance: Mapping[str, str] | None = None,
    form: str | Form | None = None,
    overwrite: bool = False,
    name: str | None = None,
    image: tuple[int, int, int] | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    opset: int | None = None,
    calibration: quantize.Calibration | Literal["best"] = "min-max",
    tune: bool = False,
    threads: int = 1,
    ort_format: bool = False,
    options: Mapping[str, str] | None = None,
    tolerances: Mapping[str, float] | None = None,
) -> Artifact:
    """Write an artifact folder that a runtime runs, proven equal to `model` after every stage.

    model: any module (batch, channels, height, width) -> (batch, classes). A `CompactModel`, or a
    model that `lift` reads, gets the graph forms; others are shipped as torch exports them. target:
    a device profile's name; it decides the form, and whether eight-bit products pay. runtime:
    onnxruntime, or one of `export.runtimes`, each an extra; options are that runtime's own
    settings. precision: fp32, int8 (dynamic), int8-static (needs `images`), int8-weights,
    int4-weights; fp16 where the target has it. preprocessing: a `Preprocessing`, or a mapping of
    the manifest's fields. labels: one a class. images: real inputs, float32 (count, channels,
    height, width), for parity and calibration; without them seeded noise, marked as such. batch: a
    size, or "dynamic". form: a form's name, "plain" for torch's graph, or None for the best known
    one. opset: of the standard's operators; None takes what each form needs, a number leaves out
    the forms that need more. image: (channels, height, width), where the model does not tell.
    image_size: (height, width), one number for both, or "160x192": resize the model to it first
    (`vitrim.resized`), and the preprocessing with it; images are given at that size. The model was
    not trained there, which the artifact says. tune: measure the forms here and keep the fastest.
    ort_format: also write `model.ort` and the operators of a reduced runtime build. tolerances:
    largest error relative to the largest logit, a precision. Errors: InputError for what does not
    fit; ParityError naming the stage, the first differing node and by how much. Nothing is left
    half-written.
    """
    folder = Path(folder)
    require_empty(folder, overwrite=overwrite)
    check(runtime, precision, batch, target, images, tune, ort_format, calibration)
    if isinstance(form, str) and form != PLAIN:
        form = form_named(form)
    prepared, notes = preprocessing_of(preprocessing), tuple[str, ...]()
    if image_size is not None:
        if image is not None:
            raise InputError(
                "image and image_size both say the size; image is for modules that do not tell theirs, and those cannot be resized"
            )
        changed = another_size(model, image_size, prepared, provenance or {})
        model, prepared, provenance, notes, name = (
            changed.model,
            changed.preprocessing,
            changed.provenance,
            changed.notes,
            name or changed.name,
        )
    order = ExportRequest(
        shape=image_shape(model, image), allowed={**TOLERANCES, **(tolerances or {})}, target=target, runtime=runtime, precision=precision,
        preprocessing=prepared, labels=None if labels is None else tuple(labels),
        images=images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images, batch=batch, provenance=provenance or {}, form=form,
        overwrite=overwrite, name=name, opset=opset, calibration=calibration, tune=tune, threads=threads, ort_format=ort_format,
        options=options or {}, notes=notes,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    try:
        with stages_shown():
            return _export(model, folder, order)
    finally:
        model.train(was_training)


def _export(model: nn.Module, folder: Path, order: ExportRequest) -> Artifact:
    stage("reference outputs")
    probe = Probe.of(lambda images: ask(model, images), order.shape, order.images)
    stages: list[Parity] = []
    notes = list(order.notes)
    tidy, first = trace(model, order, probe, stages, notes)
    if order.runtime == "onnxruntime":
        form, final = choose(model, tidy, order, probe, first, stages, notes)
        with replace_folder(folder, overwrite=order.overwrite) as aside:
            files = save(final, aside, order, probe, stages)
            ask_elsewhere(
                aside / MODEL,
                order,
                probe,
                lambda images: model_outputs(final, images, batch=order.batch),
                stages,
                notes,
            )
            Artifact.write(
                aside,
                _manifest(
                    model,
                    order,
                    form,
                    files,
                    probe,
                    stages,
                    notes,
                    opset=opset_of(final),
                    session=config_for(order.threads),
                ),
            )
        return Artifact.load(folder)
    runtime = runtime_named(order.runtime)
    form, source = source_for(runtime, model, tidy, order, probe, first, stages, notes)
    with replace_folder(folder, overwrite=order.overwrite) as aside:
        written, files = write_and_ask(runtime, source, aside, order, stages, notes)
        opset = opset_of(source.graph) if runtime.form is not None else None
        manifest = _manifest(
            model,
            order,
            form,
            files,
            probe,
            stages,
            notes,
            opset=opset,
            session=written.session,
            versions=written.versions,
        )
        Artifact.write(aside, manifest)
    return Artifact.load(folder)


def _manifest(
    model: nn.Module, order: ExportRequest, form: str, files: Sequence[FileEntry], probe: Probe, stages: Sequence[Parity], notes: Sequence[str],
    *, opset: int | None, session: Mapping[str, str] | None = None, versions: Mapping[str, str] | None = None,
) -> Manifest:  # fmt: skip
    classes = int(probe.logits.shape[-1])
    return Manifest(
        name=order.name or name_of(model),
        inputs=(TensorSpec(name="images", shape=(order.free_batch, *order.shape), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(order.free_batch, classes), layout="NC"),),
        batch=order.batch,
        preprocessing=order.preprocessing,
        labels=order.labels,
        opset=opset,
        target=order.target,
        runtime=order.runtime,
        precision=order.precision,
        form=form,
        session=dict(session or {}),
        versions={**tool_versions(*TOOLS), **(versions or {})},
        files=tuple(files),
        parity=tuple(stages),
        provenance=provenance_of(model, order.provenance),
        notes=tuple(notes),
    )
