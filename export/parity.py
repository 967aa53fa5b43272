"""How far a stage of the export moved the answers, and where it first did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ..core.errors import InputError
from .graphs.model_proto import open_graph
from .manifest import Parity
from .sessions import open_session
from .stage_line import stage

Array = NDArray[Any]
NOISE_SEED = 0
NOISE_IMAGES = 8
# Largest error relative to the largest logit. Single precision sums in another order; eight bits
# are another network.
TOLERANCES: dict[str, float] = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "int8": 0.5,
    "int8-static": 0.75,
    "int8-weights": 0.25,
    "int4-weights": 1.0,
}


class ParityError(InputError):
    """A stage changed the answers more than it may; the message names the stage, the first node
    that differs and by how much.
    """


@dataclass(frozen=True)
class Probe:
    """The inputs that every stage answers: images (n, channels, height, width) float32, real or
    seeded noise, and the reference's logits.
    """

    images: Array
    kind: Literal["images", "seeded-noise"]
    seed: int | None
    logits: Array

    @classmethod
    def of(
        cls, answer: Callable[[Array], Array], shape: Sequence[int], images: Array | None
    ) -> Probe:
        """Ask the reference. Errors: InputError if the images do not fit the model or the answers
        are not finite.
        """
        if images is None:
            noise = np.random.default_rng(NOISE_SEED).standard_normal(
                (NOISE_IMAGES, *shape), dtype=np.float32
            )
            probe, kind, seed = noise, "seeded-noise", NOISE_SEED
        else:
            probe, kind, seed = np.ascontiguousarray(images, dtype=np.float32), "images", None
            if probe.ndim != 4 or tuple(probe.shape[1:]) != tuple(shape) or len(probe) == 0:
                raise InputError(
                    f"images: shape {probe.shape} does not fit the model's (count, {', '.join(map(str, shape))}); prepare them at that size"
                )
            if not np.isfinite(probe).all():
                raise InputError(
                    "images: hold infinite or missing numbers; look at the preprocessing's mean and std"
                )
        logits = answer(probe)
        if not np.isfinite(logits).all():
            raise InputError(
                "the model answers with infinite or missing numbers before any export; its weights are broken, train again or load another file"
            )
        return cls(probe, kind, seed, logits)  # type: ignore[arg-type]

    def compare(
        self, stage: str, logits: Array, *, tolerance: float | None, reference: str = "torch"
    ) -> Parity:
        """The figures of one stage."""
        if logits.shape != self.logits.shape:
            raise ParityError(
                f"stage {stage}: answers have shape {logits.shape}, the reference's {self.logits.shape}"
            )
        error = relative_error(self.logits, logits)
        if not np.isfinite(error).all():
            raise ParityError(
                f"stage {stage}: answers with infinite or missing numbers; export with precision='fp32', or report this model"
            )
        return Parity(
            stage=stage,
            reference=reference,
            max_relative_error=float(error.max()),
            mean_relative_error=float(error.mean()),
            top1_agreement=float((logits.argmax(-1) == self.logits.argmax(-1)).mean()),
            images=len(self.images),
            input_kind=self.kind,
            seed=self.seed,
            tolerance=tolerance,
        )


def relative_error(reference: Array, found: Array) -> Array:
    """|found - reference| / max |reference|, element by element."""
    top = float(np.abs(reference).max()) or 1.0
    error: Array = np.abs(found.astype(np.float64) - reference.astype(np.float64)) / top
    return error


def model_outputs(
    model: onnx.ModelProto | bytes,
    images: Array,
    *,
    batch: int | Literal["dynamic"] = 1,
    config: dict[str, str] | None = None,
) -> Array:
    """Logits of an ONNX model for all images, at its own batch size; a last incomplete batch is
    filled up and cut off.
    """
    session = (
        open_session(model, config=config)
        if isinstance(model, bytes)
        else open_graph(model, config=config)
    )
    return session_outputs(session, images, batch=batch)


def session_outputs(session: Any, images: Array, *, batch: int | Literal["dynamic"] = 1) -> Array:
    """Logits of an open session for all images."""
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    size = min(len(images), 16) if batch == "dynamic" else batch
    found = []
    for first in range(0, len(images), size):
        chunk = images[first : first + size]
        missing = 0 if batch == "dynamic" else size - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        found.append(session.run([output], {name: chunk})[0][: size - missing])
    return np.concatenate(found)


def require(parity: Parity, where: Callable[[float], str | None]) -> Parity:
    """Pass a stage within its tolerance. Errors: ParityError; `where` is asked for the first
    differing node only then.
    """
    tolerance = parity.tolerance
    if tolerance is None or parity.max_relative_error <= tolerance:
        return parity
    stage(f"looking for where {parity.stage} differs")
    place = where(tolerance) or "no single inner value could be matched"
    raise ParityError(
        f"stage {parity.stage}: outputs differ from {parity.reference} by {parity.max_relative_error:.2e} of the largest logit, "
        f"{tolerance:.0e} is allowed; first difference: {place}; try another form or precision"
    )


def first_difference(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    image: Array,
    tolerance: float,
    *,
    endings: tuple[str, ...] = ("",),
) -> str | None:
    """The candidate's first node, in order of computation, whose value differs from the reference's
    value of the same name.

    Values are compared flat, since forms differ in batch dimensions; values that only one graph has
    are passed over, and those without one of the `endings` (two forms agree on what attention and
    activation answer, not on the scaled and centred values between).
    """
    wanted = [
        output
        for node in candidate.graph.node
        for output in node.output
        if output.endswith(endings)
    ]
    theirs = {output for node in reference.graph.node for output in node.output if output}
    shared = [name for name in wanted if name in theirs]
    return first_mismatch(
        candidate,
        shared,
        inner_values(reference, shared, image),
        inner_values(candidate, shared, image),
        tolerance,
    )


def first_mismatch(
    graph: onnx.ModelProto,
    names: Sequence[str],
    left: Mapping[str, Array],
    right: Mapping[str, Array],
    tolerance: float,
) -> str | None:
    """The first of the named values of a graph that differs between left and right, in words; those
    that one of them lacks are passed over.
    """
    kinds = {output: node for node in graph.graph.node for output in node.output}
    for name in names:
        if (
            name not in left
            or name not in right
            or left[name].size != right[name].size
            or left[name].dtype != right[name].dtype
        ):
            continue
        error = (
            float(relative_error(left[name].ravel(), right[name].ravel()).max())
            if left[name].size
            else 0.0
        )
        if not error <= tolerance:
            return f"node {kinds[name].name or name!r} ({kinds[name].op_type}), by {error:.2e} of its largest value"
    return None


def inner_values(model: onnx.ModelProto, names: Sequence[str], image: Array) -> dict[str, Array]:
    """Values inside a graph for one input, by name; those that the runtime cannot show are left
    out.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {output.name for output in opened.graph.output}
    opened.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in present
    )
    try:
        session = open_graph(opened)
        values = session.run(None, {session.get_inputs()[0].name: image})
    # the runtime's own errors share no type; without inner values the stage's figure still stands
    except Exception:
        return {}
    return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}


def first_unmatched_module(
    model: Any, candidate: onnx.ModelProto, image: Array, tolerance: float
) -> str | None:
    """The first torch module, in order of computation, whose output appears nowhere in the ONNX
    graph: how torch and ONNX are compared inside.
    """
    import torch

    outputs: list[tuple[str, str, Array]] = []
    hooks = []
    for name, module in model.named_modules():

        def keep(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                outputs.append(
                    (
                        name or "the whole model",
                        type(module).__name__,
                        output.detach().cpu().float().numpy(),
                    )
                )

        hooks.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    names = [output for node in candidate.graph.node for output in node.output if output]
    values = [
        value
        for value in inner_values(candidate, names, image).values()
        if value.dtype == np.float32
    ]
    for name, kind, expected in outputs:
        same = [value for value in values if value.shape == expected.shape]
        nearest = min(
            (float(relative_error(expected, value).max()) for value in same), default=None
        )
        if nearest is not None and nearest > tolerance:
            return f"module {name} ({kind}), by {nearest:.2e} of its largest value"
    return None
