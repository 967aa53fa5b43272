"""The artifact of a network with buckets: one file that chooses the bucket of each image.

For ONNX Runtime it is a graph with an `If`, for TVM a program whose calls depend on the bucket.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ..compress.network.architecture import SelectSpec
from ..compress.network.modules.select import Choices
from ..compress.tokens.buckets import BucketedModel
from ..core.errors import InputError
from ..core.storage import replace_folder
from ..runtimes import EngineError
from ..runtimes.subprocess_inference import infer_with_choices
from . import capabilities
from .artifact import ARTIFACT, Artifact, entry_for
from .cross_target import cross_target
from .export_run import ExportRun, first_batch
from .forms import Form, form_named, write_network
from .forms.buckets import CHOSEN, join_buckets
from .forms.select import random_places
from .graphs.candidates import int8_weight_bits, readable
from .graphs.known_forms import best_form
from .graphs.model_facts import name_of, provenance_of, torch_outputs
from .graphs.model_proto import INDICES, open_graph, opset_of, save_model
from .manifest import Array, ChoiceParity, CpuFeatures, Manifest, tool_versions
from .manifest_parts import BucketsSpec
from .onnxruntime_files import cpu_features, int8_notes
from .parity import Probe, require_agreement, require_parity
from .request import ONNXRUNTIME, ExportRequest
from .runtimes import RuntimeFiles, Source, runtime_named
from .sessions import config_for
from .stage_line import stage

TOOLS = ("vitrim", "torch", "timm", "onnx", "onnxruntime", "numpy")
PRECISIONS = ("fp32", "int8")
TVM = "tvm"
RUNTIMES = (ONNXRUNTIME, TVM)
# For each image the chosen places of each selection that depends on it.
Chosen = list[list[Array]]


def require_bucket_options(
    request: ExportRequest, *, resized: bool, outputs: Sequence[str]
) -> None:
    """Validate the options of an export of a network with buckets.

    Args:
        request: The options.
        resized: Whether another image size is requested.
        outputs: The names of requested outputs.

    Raises:
        InputError: An option is not for such networks; the message names it.
    """
    device, numeric, graph = request.device, request.numeric, request.graph
    if device.runtime not in RUNTIMES:
        raise InputError(
            f"runtime {device.runtime!r} runs no buckets; export for {' or '.join(RUNTIMES)}, or "
            "one count: BucketedModel.fixed(count)"
        )
    if numeric.precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise InputError(f"precision {numeric.precision!r}: a network with buckets has {known}")
    if request.batch != 1:
        raise InputError(
            f"batch {request.batch!r}: every image has a bucket of its own; use batch 1"
        )
    found = {
        "image_size": resized,
        "outputs": bool(outputs),
        "opset": graph.opset is not None,
        "tune": graph.tune,
        "ort_format": graph.ort_format,
        "form 'plain'": graph.form == "plain",
        "form": graph.form is not None and device.runtime == TVM,
    }
    for name, requested in found.items():
        if requested:
            raise InputError(f"{name} is not for networks with buckets; leave it out")


def export_bucketed(model: BucketedModel, folder: Path, request: ExportRequest) -> Artifact:
    """Write the artifact of a network with buckets, verified against it.

    Args:
        model: The network.
        folder: Where to write. On failure nothing is left there.
        request: The options; see `require_bucket_options`.

    Returns:
        The artifact, loaded and verified byte for byte.

    Raises:
        UnsupportedModel: The graph forms do not cover the network.
        ParityError: The outputs differ for the same buckets and patches.
    """
    stage("reference outputs")
    shape, images = request.shape, request.numeric.images
    probe = Probe.of(lambda rows: torch_outputs(model, rows), shape, images)
    run = ExportRun(request, probe, first_batch(request, probe))
    run.notes.extend(request.manifest.notes)
    write = _write_program if request.device.runtime == TVM else _write_graph
    with replace_folder(folder, ARTIFACT, overwrite=request.overwrite) as aside:
        manifest, equal = write(run, model, aside)
        Artifact.write(aside, manifest.model_copy(update={"buckets": _buckets_spec(model, equal)}))
    return Artifact.load(folder)


def _write_graph(run: ExportRun, model: BucketedModel, folder: Path) -> tuple[Manifest, float]:
    """Write `model.onnx`; returns its manifest, and on how many images the bucket is torch's."""
    request = run.request
    form, measured = _form(model, request)
    run.notes.append(f"form: {measured}")
    stage(f"writing {len(model.buckets.counts)} buckets")
    final = bucketed_graph(model, form, request, request.numeric.precision)
    equal = _verify(run, model, form, final)
    stage("writing model.onnx")
    manifest = run.manifest(
        name=name_of(model),
        form=form.name,
        files=save_model(final, folder),
        provenance=provenance_of(model.network, request.manifest.provenance),
        versions=tool_versions(*TOOLS),
        opset=opset_of(final),
        session=config_for(request.device.threads),
        cpu=cpu_features(run),
    )
    return manifest, equal


def _write_program(run: ExportRun, model: BucketedModel, folder: Path) -> tuple[Manifest, float]:
    """Write `model.so`; returns its manifest, and on how many images the bucket is torch's."""
    request, precision = run.request, run.request.numeric.precision
    stage(f"compiling {len(model.buckets.counts)} buckets for {TVM}, {precision}")
    source = Source(
        model=model,
        compact=model.network,
        make_graph=onnx.ModelProto,
        shape=request.shape,
        batch=1,
        target=request.device.target,
        threads=request.device.threads,
        precision=precision,
        images=None,
        probe=run.probe,
        options=request.device.settings,
        buckets=model,
    )
    written = runtime_named(TVM).write(source, folder)
    run.notes.extend(written.notes)
    name = TVM if precision == "fp32" else f"{TVM} {precision}"
    if written.parity_skipped is None:
        equal = _verify_program(run, model, written, folder / written.main, name)
    else:
        # The same calls of the same kernels, as this processor runs them.
        run.notes.append(
            f"its own code was not run: {written.parity_skipped}; parity is that of the same "
            "kernels compiled for this machine"
        )
        with tempfile.TemporaryDirectory(prefix="vitrim-buckets-") as place:
            here = runtime_named(TVM).write(replace(source, target="host"), Path(place))
            equal = _verify_program(run, model, here, Path(place) / here.main, f"{name} here")
    _note_buckets(run, model, equal)
    files = [entry_for(folder, written.main, "model")]
    files += [entry_for(folder, path, role) for path, role in written.files]
    manifest = run.manifest(
        name=name_of(model),
        form="kernels",
        files=files,
        provenance=provenance_of(model.network, request.manifest.provenance),
        versions={**tool_versions(*TOOLS), **written.versions},
        opset=None,
        session=written.session,
        cpu=CpuFeatures(needs=written.needs, assumes=written.assumes),
    )
    return manifest, equal


def _verify_program(
    run: ExportRun, model: BucketedModel, written: RuntimeFiles, main: Path, name: str
) -> float:
    """Record the parity of a compiled network; returns on how many images the bucket is torch's.

    Args:
        run: Gets the parity.
        model: The network.
        written: What TVM wrote.
        main: The library.
        name: Name of the stage.

    Raises:
        InputError: The library does not run.
        ParityError: The outputs differ.
    """
    stage(f"parity of {name}")
    job = run.job(main, written.session, emulated=written.command is not None)
    try:
        logits, chosen, _ = infer_with_choices(job, run.probe.images, command=written.command)
    except EngineError as error:
        raise InputError(
            f"runtime {TVM}: the written file does not run: {error}; export it for onnxruntime"
        ) from None
    return _compare(run, model, (logits, chosen), name, run.request.numeric.precision)


def _buckets_spec(model: BucketedModel, equal: float) -> BucketsSpec:
    found = model.buckets
    return BucketsSpec(
        selection=model.selection.spec.name,
        counts=found.counts,
        coverage=found.coverage,
        divergence=None if found.divergence is None else found.divergence.threshold,
        shares=found.shares,
        images=found.images or None,
        macs=model.macs,
        equal=equal,
    )


def bucketed_graph(
    model: BucketedModel, form: Form, request: ExportRequest, precision: str
) -> onnx.ModelProto:
    """Write the graph of all buckets in one form.

    Args:
        model: The network.
        form: The form.
        request: The options.
        precision: "fp32" or "int8".
    """
    options: dict[str, Any] = {"share_maps": True}
    if precision == "int8":
        options = {"linears": "int8", "weight_bits": int8_weight_bits(request)}
    graphs = [
        write_network(model.fixed(count), form, batch=1, **options)
        for count in model.buckets.counts
    ]
    return join_buckets(graphs, model)


def _form(model: BucketedModel, request: ExportRequest) -> tuple[Form, str]:
    compact, form = readable(model.network), request.graph.form
    if form is not None:
        return (form_named(form) if isinstance(form, str) else form), "requested"
    return best_form(
        request.device.target,
        1,
        compact.architecture.tokens,
        precision=request.numeric.precision,
        threads=request.device.threads,
    )


def _verify(run: ExportRun, model: BucketedModel, form: Form, final: onnx.ModelProto) -> float:
    """Record the parity of the graph in single precision and in the requested one.

    Returns:
        On which share of the images the last one chooses the bucket of torch.
    """
    request, target = run.request, run.request.device.target
    precision = request.numeric.precision
    graph = final if precision == "fp32" else bucketed_graph(model, form, request, "fp32")
    name = f"form {form.name}"
    stage(f"parity of {name}")
    equal = _compare(run, model, _run(graph, model, run.probe.images), name, "fp32")
    if precision != "fp32":
        run.notes.extend(int8_notes(run))
        reason = capabilities.int8_saturates_here(target)
        if reason and precision in capabilities.EIGHT_BITS:
            run.notes.append(f"parity of {precision} was not run: {reason}")
        else:
            stage(f"parity of {precision}")
            found = _run(final, model, run.probe.images)
            equal = _compare(run, model, found, precision, precision)
    other = cross_target(target)
    if other is not None:
        run.notes.append(f"not run as {target}: a network with buckets is verified on this machine")
    _note_buckets(run, model, equal)
    return equal


def _note_buckets(run: ExportRun, model: BucketedModel, equal: float) -> None:
    checked = run.stages[-1].images
    counts = ", ".join(map(str, model.buckets.counts))
    run.notes.append(
        f"buckets of {counts} patches at {model.selection.spec.name}: the bucket of torch on "
        f"{100 * equal:.1f} % of {checked} {run.probe.kind}; the largest one bounds "
        "the latency"
    )


def _dependent(model: BucketedModel) -> list[SelectSpec]:
    """The selections whose choice depends on the image; the last one has the buckets."""
    constant = random_places(model.network)
    return [spec for spec in model.network.architecture.selects if spec.name not in constant]


def _compare(
    run: ExportRun,
    model: BucketedModel,
    outcome: tuple[Array, Chosen],
    name: str,
    precision: str,
) -> float:
    """Record the parity of a file; returns the share of images with the bucket of torch.

    Errors are those of torch in the bucket, and with the patches, that the file chose.

    Args:
        run: Gets the parity.
        model: The network.
        outcome: The file's logits for the probe's images, or the first of them, and its choices.
        name: Name of the stage.
        precision: Selects the tolerance.

    Raises:
        ParityError: The outputs differ.
    """
    network, (found, chosen) = model.network, outcome
    probe = run.probe.first(len(found))
    constant = random_places(network)
    specs = _dependent(model)
    expected, references = [], []
    for image, kept in zip(probe.images, chosen, strict=True):
        pixels = torch.from_numpy(image[None]).to(next(model.parameters()).device)
        own = Choices()
        fixed = model.fixed(int(model.bucket_of(pixels)[0]))
        names = iter(kept)
        given = [
            torch.tensor([constant[spec.name]])
            if spec.name in constant
            else torch.from_numpy(next(names))
            for spec in network.architecture.selects
        ]
        with torch.inference_mode():
            fixed(pixels, choices=own)
            same = model.fixed(given[-1].shape[1])(pixels, choices=Choices(given=given))
        expected.append(same.float().cpu().numpy())
        named = zip(network.architecture.selects, own.found, strict=True)
        references.append([each.cpu().numpy() for spec, each in named if spec.name not in constant])
    tolerance = run.request.numeric.tolerances[precision]
    parity = replace(probe, logits=np.concatenate(expected)).compare(
        name, found, tolerance=tolerance, precision=precision
    )
    agreement = float((found.argmax(-1) == probe.logits.argmax(-1)).mean())
    choices = tuple(
        _choice(
            spec.name,
            spec.patches,
            [row[place] for row in references],
            [row[place] for row in chosen],
        )
        for place, spec in enumerate(specs)
    )
    parity = parity.model_copy(update={"top1_agreement": agreement, "choices": choices})
    require_parity(parity, lambda _: None)
    require_agreement(parity, probe.clear_agreement(found))
    run.stages.append(parity)
    pairs = zip(references, chosen, strict=True)
    return float(np.mean([a[-1].shape == b[-1].shape for a, b in pairs]))


def _run(graph: onnx.ModelProto, model: BucketedModel, images: Array) -> tuple[Array, Chosen]:
    """Run a graph on each image: all logits, and the choices of the selections."""
    values = [*(f"{spec.name}{INDICES}" for spec in _dependent(model)[:-1]), CHOSEN]
    opened = onnx.ModelProto()
    opened.CopyFrom(graph)
    opened.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in values
    )
    session = open_graph(opened)
    rows = [
        session.run(["logits", *values], {"images": images[place : place + 1]})
        for place in range(len(images))
    ]
    return np.concatenate([row[0] for row in rows]), [row[1:] for row in rows]


def _choice(name: str, kept: int, wanted: Sequence[Array], found: Sequence[Array]) -> ChoiceParity:
    """How often one selection chose as in the reference; the numbers of patches may differ."""
    pairs = list(zip(wanted, found, strict=True))
    return ChoiceParity(
        selection=name,
        kept=kept,
        equal=float(np.mean([np.array_equal(a, b) for a, b in pairs])),
        overlap=float(np.mean([np.intersect1d(a, b).size / max(a.size, b.size) for a, b in pairs])),
    )
