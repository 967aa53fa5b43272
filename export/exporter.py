"""From a torch module to an artifact, each stage proven against the one before it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from ..compress.count import count_macs
from ..compress.lift import lift
from ..compress.vit.model import CompactModel
from ..errors import InputError, UnsupportedModel
from ..storage import replace_folder, require_empty
from . import capabilities, quantize
from .artifact import Artifact, FileEntry, Manifest, Parity, Precision, PreprocessingSpec, Provenance, TensorSpec, entry_for
from .forms import FORMS, Form, form_named, write_network
from .forms.coverage import reason_against
from .half import half
from .known_forms import best_form
from .parity import TOLERANCES, Probe, answers, first_difference, first_unmatched_module, require
from .store import save_model
from .torch_graph import MIN_OPSET, simplify, torch_to_onnx
from .tuning import fastest
from .versions import tool_versions

Array = NDArray[Any]
Batch = int | Literal["dynamic"]
# What two forms answer alike; scaled queries, unbiased values and centred streams between them differ on purpose.
COMPARABLE = (".softmax", ".act", "logits")
PLAIN = "plain"
_REFERENCE_FORM = Form(rows="batch", norm="layer", last_queries=False)


@dataclass(frozen=True)
class Candidate:
    """A float graph that answers like the model, how it is called, and the form to rewrite it with (None for graphs that are not ours)."""

    name: str
    model: onnx.ModelProto
    form: Form | None


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
    opset: int = MIN_OPSET,
    calibration: quantize.Calibration = "min-max",
    tune: bool = False,
    threads: int = 1,
    ort_format: bool = False,
    tolerances: Mapping[str, float] | None = None,
) -> Artifact:
    """Write an artifact folder that ONNX Runtime runs, proven equal to `model` after every stage.

    model: any module (batch, channels, height, width) -> (batch, classes). A `CompactModel`, or a model that `lift` reads, gets the
    graph forms; others are shipped as torch exports them.
    target: a device profile's name; it decides the form, and whether eight-bit products pay.
    precision: fp32, int8 (dynamic), int8-static (needs `images`), int8-weights, int4-weights; fp16 where the target has it.
    preprocessing: a `Preprocessing`, or a mapping of the manifest's fields. labels: one a class.
    images: real inputs, float32 (count, channels, height, width), for parity and calibration; without them seeded noise, marked as such.
    batch: a size, or "dynamic". form: a form's name, "plain" for torch's graph, or None for the best known one.
    image: (channels, height, width), where the model does not tell. tune: measure the forms here and keep the fastest.
    ort_format: also write `model.ort` and the operators of a reduced runtime build.
    tolerances: largest error relative to the largest logit, a precision.
    Errors: InputError for what does not fit; ParityError naming the stage, the first differing node and by how much. Nothing is left half-written.
    """
    folder = Path(folder)
    require_empty(folder, overwrite=overwrite)
    _check(runtime, precision, batch, target, images, tune)
    shape = image_shape(model, image)
    if isinstance(form, str) and form != PLAIN:
        form = form_named(form)
    allowed = {**TOLERANCES, **(tolerances or {})}
    was_training = model.training
    model.eval()
    try:
        return _export(
            model, folder, shape, allowed, target=target, runtime=runtime, precision=precision, preprocessing=_preprocessing(preprocessing), labels=labels,
            images=_array(images), batch=batch, provenance=provenance, form=form, overwrite=overwrite, name=name, opset=opset,
            calibration=calibration, tune=tune, threads=threads, ort_format=ort_format,
        )  # fmt: skip
    finally:
        model.train(was_training)


def _export(
    model: nn.Module, folder: Path, shape: tuple[int, int, int], allowed: Mapping[str, float], *, target: str, runtime: str, precision: Precision,
    preprocessing: PreprocessingSpec | None, labels: Sequence[str] | None, images: Array | None, batch: Batch, provenance: Mapping[str, str] | None,
    form: str | Form | None, overwrite: bool, name: str | None, opset: int, calibration: quantize.Calibration, tune: bool, threads: int, ort_format: bool,
) -> Artifact:  # fmt: skip
    probe = Probe.of(lambda batch_of: _ask(model, batch_of), shape, images)
    stages: list[Parity] = []
    notes: list[str] = []

    traced = torch_to_onnx(model, shape, batch=batch, opset=opset)
    first = probe.images[: 2 if batch == "dynamic" else batch]
    if batch not in (1, "dynamic") and len(first) < int(batch):
        first = np.repeat(probe.images[:1], int(batch), axis=0)
    parity = probe.compare("onnx", answers(traced, probe.images, batch=batch), tolerance=allowed["fp32"])
    stages.append(require(parity, lambda tolerance: first_unmatched_module(model, traced, first, tolerance)))
    tidy, reason = simplify(traced)
    if reason is None:
        parity = probe.compare("simplified", answers(tidy, probe.images, batch=batch), tolerance=allowed["fp32"])
        stages.append(require(parity, lambda tolerance: first_difference(traced, tidy, first, tolerance)))
    else:
        notes.append(reason)

    candidates, why = _candidates(model, tidy, form, target, batch, tune)
    notes.extend(why)
    proven: list[tuple[Candidate, Parity]] = []
    for candidate in candidates:
        parity = probe.compare(f"form {candidate.name}", answers(candidate.model, probe.images, batch=batch), tolerance=allowed["fp32"])
        require(parity, lambda tolerance, found=candidate: _where_in_form(model, found, first, batch, tolerance))  # type: ignore[misc]
        proven.append((candidate, parity))

    # Which form is fastest may depend on the precision, so it is the finished graphs that race.
    finished: dict[str, tuple[Candidate, Parity, onnx.ModelProto]] = {}
    for candidate, parity in proven:
        finished[candidate.name] = (candidate, parity, _in_precision(model, candidate, precision, batch, target, images, calibration))
    chosen = next(iter(finished))
    if tune and len(finished) > 1:
        timings = fastest({key: value[2] for key, value in finished.items()}, first, threads=threads)
        chosen = timings[0][0]
        notes.append("tuned here: " + ", ".join(f"{key} {latency_s * 1e3:.3f} ms" for key, latency_s in timings))
    candidate, parity, final = finished[chosen]
    if candidate.form is not None:
        stages.append(parity)
    if precision != "fp32":
        parity = probe.compare(precision, answers(final, probe.images, batch=batch), tolerance=allowed[precision])
        stages.append(require(parity, lambda tolerance: first_difference(candidate.model, final, first, tolerance)))
        warning = capabilities.int8_warning(target) if precision in ("int8", "int8-static") else None
        if warning:
            notes.append(warning)

    with replace_folder(folder, overwrite=overwrite) as aside:
        files: list[FileEntry] = save_model(final, aside)
        if ort_format:
            from .ort_format import save_ort_format

            saved, session_logits = save_ort_format(aside / "model.onnx", aside, lambda session: _ask_session(session, probe.images, batch))
            parity = probe.compare("ort file", session_logits, tolerance=allowed[precision])
            stages.append(require(parity, lambda tolerance: None))
            files.extend(entry_for(aside, path, role) for path, role in saved)  # type: ignore[arg-type]
        classes = int(probe.logits.shape[-1])
        first_size: int | str = "batch" if batch == "dynamic" else batch
        Artifact.write(
            aside,
            Manifest(
                name=name or _name_of(model),
                inputs=(TensorSpec(name="images", shape=(first_size, *shape), layout="NCHW"),),
                outputs=(TensorSpec(name="logits", shape=(first_size, classes), layout="NC"),),
                batch=batch,
                preprocessing=preprocessing,
                labels=None if labels is None else tuple(labels),
                opset=max((entry.version for entry in final.opset_import if entry.domain in ("", "ai.onnx")), default=None),
                target=target,
                runtime=runtime,
                precision=precision,
                form=candidate.name,
                versions=tool_versions("vitrim", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "onnxsim", "numpy"),
                files=tuple(files),
                parity=tuple(stages),
                provenance=_provenance(model, provenance),
                notes=tuple(notes),
            ),
        )
    return Artifact.load(folder)


def image_shape(model: nn.Module, image: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """(channels, height, width) that a model takes. Errors: InputError if neither the model nor the caller tells."""
    if image is not None:
        if len(image) != 3 or any(not isinstance(size, int) or size < 1 for size in image):
            raise InputError(f"image {image}: give (channels, height, width), three sizes above 0")
        return image
    architecture = getattr(model, "architecture", None)
    if architecture is not None and hasattr(architecture, "image"):
        channels, height, width = architecture.image
        return int(channels), int(height), int(width)
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None and hasattr(getattr(embed, "proj", None), "in_channels"):
        return int(embed.proj.in_channels), int(size[0]), int(size[1])
    config: Any = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if config and config.get("input_size"):
        channels, height, width = config["input_size"]
        return int(channels), int(height), int(width)
    raise InputError(f"{type(model).__name__} does not tell its image size; pass image=(channels, height, width)")


def _check(runtime: str, precision: str, batch: Batch, target: str, images: Any, tune: bool) -> None:
    if runtime != "onnxruntime":
        raise InputError(f"runtime {runtime!r} is unknown; this vitrim exports for 'onnxruntime'")
    known = get_args(Precision)
    if precision not in known:
        raise InputError(f"precision {precision!r} is unknown; take one of {', '.join(known)}")
    if precision in ("fp16", "bf16") and not (precision == "fp16" and capabilities.has_half(target)):
        raise InputError(f"precision {precision!r}: target {target!r} does not compute in it, so it would cost time; take fp32 or int8")
    if batch != "dynamic" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch {batch!r}: give a whole number above 0, or 'dynamic'")
    if precision == "int8-static" and images is None:
        raise InputError("int8-static finds its ranges on images, and none were given; pass images, or take precision='int8', which needs none")
    if tune and not capabilities.is_host(target):
        raise InputError(f"tune measures on this machine, and the target is {target!r}; run it on the device, or leave tune out for the known form")


def _candidates(
    model: nn.Module, tidy: onnx.ModelProto, form: str | Form | None, target: str, batch: Batch, tune: bool
) -> tuple[list[Candidate], list[str]]:
    plain = Candidate(PLAIN, tidy, None)
    if form == PLAIN:
        return [plain], []
    try:
        compact: CompactModel = lift(model)
        if reason := reason_against(compact.architecture):
            raise UnsupportedModel(f"no rule for {reason}")
    except UnsupportedModel as error:
        if form is not None:
            raise UnsupportedModel(f"form {form}: {error}; export with form='plain'") from None
        return [plain], [f"torch's own graph is shipped, since the graph forms do not cover it: {error}"]
    notes = []
    free: int | str = "batch" if batch == "dynamic" else batch
    if form is not None:
        forms = [form_named(form) if isinstance(form, str) else form]
    elif tune:
        forms = [entry for entry in FORMS if batch == 1 or entry.rows == "batch"]
    else:
        best, measured = best_form(target, batch)
        forms = [best]
        notes.append(f"form: {measured}")
    found = [Candidate(entry.name, write_network(compact, entry, batch=free), entry) for entry in forms]
    return ([*found, plain] if tune and form is None else found), notes


def _in_precision(
    model: nn.Module, candidate: Candidate, precision: Precision, batch: Batch, target: str, images: Array | None, calibration: quantize.Calibration
) -> onnx.ModelProto:
    if precision == "fp32":
        return candidate.model
    bits = 8 if capabilities.int8_exact(target) else 7
    free: int | str = "batch" if batch == "dynamic" else batch
    if precision == "int8" and candidate.form is not None:
        return write_network(lift(model), candidate.form, batch=free, linears="int8", weight_bits=bits)
    float_graph = candidate.model
    if candidate.form is not None:
        form = candidate.form
        if precision == "int8-static":
            # The quantizer must know every value's type, and it knows none behind the runtime's own operators.
            form = replace(form, attention="split", residual="add", norm="layer", activation="gelu")
        float_graph = write_network(lift(model), form, batch=free, linears="product")
    if precision == "int8":
        return quantize.int8_dynamic(float_graph, weight_bits=bits)
    if precision == "int8-static":
        assert images is not None
        return quantize.int8_static(float_graph, images[: quantize.CALIBRATION_IMAGES], calibration=calibration, weight_bits=bits)
    if precision == "fp16":
        return half(candidate.model)
    return quantize.weights_only(float_graph, 4 if precision == "int4-weights" else 8)


def _where_in_form(model: nn.Module, candidate: Candidate, first: Array, batch: Batch, tolerance: float) -> str | None:
    if candidate.form is None:
        return None
    free: int | str = "batch" if batch == "dynamic" else batch
    reference = write_network(lift(model), replace(_REFERENCE_FORM, last_queries=candidate.form.last_queries), batch=free)
    return first_difference(reference, candidate.model, first, tolerance, endings=COMPARABLE)


def _ask(model: nn.Module, images: Array) -> Array:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = []
    with torch.no_grad():
        for first in range(0, len(images), 64):
            logits = model(torch.from_numpy(images[first : first + 64]).to(device))
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
                raise InputError(f"{type(model).__name__} does not answer with logits (batch, classes); wrap it so that it does")
            found.append(logits.float().cpu().numpy())
    return np.concatenate(found)


def _ask_session(session: Any, images: Array, batch: Batch) -> Array:
    from .parity import session_answers

    return session_answers(session, images, batch=batch)


def _array(images: Array | torch.Tensor | None) -> Array | None:
    return images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images


def _preprocessing(given: Any) -> PreprocessingSpec | None:
    if given is None or isinstance(given, PreprocessingSpec):
        return given
    data = given.model_dump() if hasattr(given, "model_dump") else dict(given)
    try:
        return PreprocessingSpec.model_validate(data)
    except ValueError as error:
        raise InputError(f"preprocessing: {' '.join(str(error).split())}") from None


def _name_of(model: nn.Module) -> str:
    config: Any = getattr(model, "default_cfg", None)
    return str((config or {}).get("architecture") or type(model).__name__)


def _provenance(model: nn.Module, given: Mapping[str, str] | None) -> Provenance:
    try:
        macs: int | None = count_macs(lift(model).architecture)
    except UnsupportedModel:
        macs = None
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return Provenance(
        source=kind,
        weights_sha256=weights_sha256(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        details={str(key): str(value) for key, value in (given or {}).items()},
    )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's state, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
