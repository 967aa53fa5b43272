"""From a torch module to an artifact, each stage verified against the one before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..compress.lift import in_float32, lift, read
from ..compress.lift.checks import require_module
from ..compress.network.architecture import PoolSpec
from ..compress.network.modules.model import CompactModel, build
from ..compress.network.named_outputs import (
    LOGITS,
    NamedOutputs,
    OutputSpec,
    output_specs,
    require_output_names,
)
from ..compress.tokens.buckets import BucketedModel
from ..core.errors import InputError, UnsupportedModel
from ..core.storage import replace_folder, require_output_folder
from .artifact import ARTIFACT, ARTIFACTS, Artifact
from .buckets import export_bucketed, require_bucket_options
from .choices import SelectionReference
from .cross_target import verify_on_target
from .description import description_of, require_description
from .export_run import ExportRun, first_batch
from .forms import Form, form_named
from .forms.coverage import reason_against
from .graphs.candidates import PLAIN
from .graphs.model_facts import image_shape, name_of, provenance_of, torch_outputs
from .graphs.model_proto import MODEL, opset_of
from .graphs.torch_graph import trace
from .manifest import Array, Batch, CpuFeatures, Precision, tool_versions
from .onnxruntime_files import choose, cpu_features, save
from .parity import TOLERANCES, Probe
from .quantization.quantize import Calibration
from .request import (
    ONNXRUNTIME,
    DeviceOptions,
    ExportRequest,
    GraphOptions,
    NumericOptions,
    input_images,
    validate_options,
)
from .resized_model import resize_for_export, with_resampled_note
from .runtime_files import source_for, write_and_verify
from .runtimes import runtime_named, runtime_names
from .runtimes.limits import Planned, require_within_limits
from .runtimes.runtime import MakeGraph, limits_of
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
# Needs vitrim and torch on the device: a row to compare with, not for shipping.
NOT_SHIPPED = ("torch",)
# Options of `export` that only ONNX Runtime's graphs have.
ONNXRUNTIME_OPTIONS = ("form", "tune", "ort_format")


def export(
    model: nn.Module,
    folder: Path | str,
    *,
    target: str = "host",
    runtime: str = ONNXRUNTIME,
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
    calibration: Calibration | Literal["best"] = "min-max",
    tune: bool = False,
    threads: int = 1,
    ort_format: bool = False,
    options: Mapping[str, str] | None = None,
    tolerances: Mapping[str, float] | None = None,
    outputs: Sequence[str] | None = None,
) -> Artifact:
    """Write an artifact folder that a runtime runs, verified against `model` after every stage.

    Args:
        model: Any module (batch, channels, height, width) -> (batch, classes). A `CompactModel`,
            or a model that `lift` reads, gets the graph forms; others are shipped as torch exports
            them. A `BucketedModel` is for "onnxruntime", batch 1, in "fp32" or "int8".
        folder: Where to write. On failure nothing is left there.
        target: Name of a device profile, or of its TOML file. It decides the form, and whether
            eight-bit products pay off.
        runtime: "onnxruntime", or a runtime of `export.runtimes`, each an extra.
        precision: "fp32", "int8" (dynamic), "int8-static" (needs `images`), "int8-weights",
            "int4-weights"; "fp16" where the target computes in it.
        preprocessing: A `Preprocessing`, or a mapping of the manifest's fields. None: the manifest
            holds none.
        labels: One for each class. None: the manifest holds none.
        images: Real inputs for parity and calibration: float32 (count, channels, height, width),
            normalized, or uint8, which `preprocessing` normalizes. None: seeded noise, recorded as
            such.
        batch: Images in a batch, or "dynamic".
        provenance: Further entries for the manifest.
        form: A form or its name, or "plain" for torch's graph. None: the best known one.
        overwrite: Whether to replace a folder that is not empty.
        name: Name of the model. None: the module's own.
        image: (channels, height, width), for modules that do not state their input size.
        image_size: Resize the model first (see `vitrim.resized`), and the preprocessing with it:
            (height, width) in pixels, one number for both, or "160x192"; `images` must have that
            size. The model was not trained there, which the artifact records.
        opset: Version of the standard's operators, at least 20; forms that need more are left
            out. None: what each form needs.
        calibration: How "int8-static" finds ranges: "min-max", "percentile", "entropy", or "best"
            of the three.
        tune: Measure the forms on this machine and keep the fastest.
        threads: Threads to compile, tune and time for.
        ort_format: Also write `model.ort` and the operators of a reduced runtime build.
        options: Settings of the runtime's own.
        tolerances: Largest error relative to the largest logit, by precision; entries that are
            missing keep their defaults.
        outputs: Names of what the artifact returns: "logits", "features" (what the classifier
            reads), "patches" (patch tokens after the final norm), "tokens" (these and the prefix
            tokens), "blocks.8" (patch tokens of the stream after block 8, counted from 0, before
            the norm). Widths are those of the source model, with zeros for pruned channels. Shapes
            and meanings are in the manifest; logits come first. None: the logits.

    Returns:
        The artifact, loaded and verified byte for byte.

    Raises:
        InputError: An option is unknown or does not fit the model, the target or the runtime.
        UnsupportedModel: The requested form or runtime does not cover the model.
        ParityError: A stage's outputs differ; the message names the stage, the first node that
            differs and by how much.
    """
    folder = Path(folder)
    require_output_folder(folder, ARTIFACT, overwrite=overwrite)
    require_module(model)
    device = DeviceOptions(target, runtime, threads, options or {})
    manifest = description_of(name, preprocessing, labels, provenance)
    inputs = input_images(images, manifest.preprocessing)
    numeric = NumericOptions(precision, inputs, calibration, {**TOLERANCES, **(tolerances or {})})
    graph = GraphOptions(form, opset, tune, ort_format)
    names = () if outputs is None else require_output_names(outputs)
    names = () if names == (LOGITS,) else names
    if isinstance(model, BucketedModel):
        request = ExportRequest(
            model.architecture.image, batch, overwrite, device, graph, numeric, manifest
        )
        require_bucket_options(request, resized=image_size is not None, outputs=names)
    validate_options(batch, device, graph, numeric)
    if isinstance(form, str) and form != PLAIN:
        graph = replace(graph, form=form_named(form))
    model = in_float32(model)
    if image_size is not None:
        if image is not None:
            raise InputError(
                "image and image_size both give the size; image is for modules that do not state "
                "theirs, and those cannot be resized"
            )
        model, manifest = resize_for_export(model, image_size, manifest)
    manifest = with_resampled_note(model, manifest)
    shape = image_shape(model, image)
    source, specs = _with_outputs(model, names)
    network = source.model if isinstance(source, NamedOutputs) else model
    _require_possible(network, batch, device, graph, numeric)
    if labels is not None and names and LOGITS not in names:
        raise InputError("labels: are for logits, which are not among the outputs; leave them out")
    request = ExportRequest(
        shape, batch, overwrite, device, graph, numeric, manifest, outputs=specs
    )
    was_training = model.training
    model.eval()
    try:
        require_description(manifest, shape, None if labels is None else _outputs(model, shape))
        with stages_shown():
            return _export(model, source, folder, request)
    finally:
        model.train(was_training)


def _with_outputs(
    model: nn.Module, names: Sequence[str]
) -> tuple[nn.Module, tuple[OutputSpec, ...]]:
    """Return the module that computes the named outputs, and their descriptions."""
    if not names:
        return model, ()
    try:
        compact = lift(model)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"outputs: {names[-1]!r} is of models that vitrim can lift: {error}; leave outputs out"
        ) from None
    specs = output_specs(compact.architecture, names)
    if compact.architecture.pool.kind == "none":
        # No output depends on it; graphs and kernels have a rule for this one.
        pooled = compact.architecture.model_copy(update={"pool": PoolSpec(kind="mean_all")})
        compact = build(pooled, compact.state_dict()).eval()
    return NamedOutputs(compact, names).eval(), specs


def _outputs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """The number of outputs for an image."""
    if isinstance(model, CompactModel):
        return model.architecture.classes
    return int(torch_outputs(model, np.zeros((1, *shape), np.float32)).shape[-1])


def _require_possible(
    model: nn.Module,
    batch: Batch,
    device: DeviceOptions,
    graph: GraphOptions,
    numeric: NumericOptions,
) -> None:
    """Raise InputError, before any work, for a part of a model that the runtime cannot do."""
    if device.runtime == ONNXRUNTIME:
        return
    architecture, unread = None, None
    try:
        architecture = read(model, proof=False).spec
        unread = reason_against(architecture)
    except UnsupportedModel as error:
        unread = str(error)
    planned = Planned(numeric.precision, batch, graph.form, architecture, unread)
    require_within_limits(device.runtime, limits_of(runtime_named(device.runtime)), planned)


def _export(model: nn.Module, source: nn.Module, folder: Path, request: ExportRequest) -> Artifact:
    """Export `source`, which is `model` or computes named outputs of it."""
    if isinstance(model, BucketedModel):
        return export_bucketed(model, folder, request)
    stage("reference outputs")
    probe = Probe.of(
        lambda images: torch_outputs(source, images),
        request.shape,
        request.numeric.images,
        request.outputs,
    )
    selections = SelectionReference.of(
        source, lambda images: torch_outputs(source, images), probe.images
    )
    run = ExportRun(request, probe, first_batch(request, probe), selections=selections)
    run.notes.extend(request.manifest.notes)
    # Tracing takes half of an export's time, and most artifacts are written by the forms alone.
    plain = partial(trace, run, source)
    network = source.model if isinstance(source, NamedOutputs) else model
    if request.device.runtime == ONNXRUNTIME:
        _export_onnxruntime(run, model, network, plain, folder)
    else:
        _export_converted(run, model, network, plain, folder)
    return Artifact.load(folder)


def _export_onnxruntime(
    run: ExportRun, model: nn.Module, network: nn.Module, plain: MakeGraph, folder: Path
) -> None:
    """Write the artifact of `network`, which computes what was requested of `model`."""
    request = run.request
    form, final = choose(run, network, plain)
    with replace_folder(folder, ARTIFACT, overwrite=request.overwrite) as aside:
        files = save(run, final, aside)
        verify_on_target(run, aside / MODEL, final)
        manifest = run.manifest(
            name=name_of(model),
            form=form,
            files=files,
            provenance=provenance_of(model, request.manifest.provenance),
            versions=tool_versions(*TOOLS),
            opset=opset_of(final),
            session=config_for(request.device.threads),
            cpu=cpu_features(run),
        )
        Artifact.write(aside, manifest)


def _export_converted(
    run: ExportRun, model: nn.Module, network: nn.Module, plain: MakeGraph, folder: Path
) -> None:
    """Write the artifact of `network`, which computes what was requested of `model`."""
    request = run.request
    runtime = runtime_named(request.device.runtime)
    form, source = source_for(run, runtime, network, plain)
    with replace_folder(folder, ARTIFACT, overwrite=request.overwrite) as aside:
        written, files = write_and_verify(run, runtime, source, aside)
        manifest = run.manifest(
            name=name_of(model),
            form=form,
            files=files,
            provenance=provenance_of(model, request.manifest.provenance),
            versions={**tool_versions(*TOOLS), **written.versions},
            opset=opset_of(source.graph) if runtime.form is not None else None,
            session=written.session,
            cpu=CpuFeatures(needs=written.needs, assumes=written.assumes),
        )
        Artifact.write(aside, manifest)


def export_all_runtimes(
    model: nn.Module,
    folder: Path | str,
    *,
    precision: Precision = "fp32",
    report_progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Export a model for every runtime that is installed here.

    A runtime that does not support the model, the precision or the batch loses only its own
    artifact.

    Args:
        model: The module.
        folder: Parent of the artifacts: folder/RUNTIME.
        precision: See `export`.
        report_progress: Called with each runtime's name before its export.
        **options: Further options of `export`.

    Returns:
        The artifact of each runtime, and for the other runtimes why there is none.

    Raises:
        InputError: ONNX Runtime does not support the model either, or the folder is not empty.
    """
    folder = Path(folder)
    require_output_folder(folder, ARTIFACTS, overwrite=bool(options.get("overwrite")))
    report_progress(ONNXRUNTIME)
    made = {
        ONNXRUNTIME: export(
            model, folder / ONNXRUNTIME, runtime=ONNXRUNTIME, precision=precision, **options
        )
    }
    absent: dict[str, str] = {}
    shared = {key: value for key, value in options.items() if key not in ONNXRUNTIME_OPTIONS}
    for name in runtime_names():
        if name in NOT_SHIPPED:
            continue
        runtime = runtime_named(name)
        if precision not in runtime.precisions:
            absent[name] = f"has no {precision}; it has {', '.join(runtime.precisions)}"
        elif reason := runtime.missing():
            absent[name] = reason
        else:
            report_progress(name)
            try:
                made[name] = export(
                    model, folder / name, runtime=name, precision=precision, **shared
                )
            except InputError as error:
                absent[name] = str(error)
    return made, absent
