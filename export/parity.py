"""How far a stage of the export changed the outputs, and where it first did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ..compress.network.named_outputs import OutputSpec
from ..core.errors import InputError
from .graphs.model_proto import open_graph
from .manifest import FEWEST_IMAGES, Batch, Parity
from .sessions import open_session
from .stage_line import stage

Array = NDArray[Any]
NOISE_SEED = 0
NOISE_IMAGES = 8
DYNAMIC_BATCH_IMAGES = 16
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


# Logits nearer to each other than this share of the largest are near ties.
ROUNDING, NEAR_TIE = 1e-3, 0.1


class ParityError(InputError):
    """A stage changed the outputs by more than its tolerance.

    The message names the stage, the first node that differs and by how much.
    """


@dataclass(frozen=True)
class Probe:
    """The inputs on which every stage is compared, and the reference's outputs.

    Attributes:
        images: float32 (count, channels, height, width), real or seeded noise.
        kind: Which of the two.
        seed: Of the noise.
        logits: Outputs of the reference (count, classes); those of several outputs, flat, side by
            side.
        outputs: The named outputs; empty where there are only logits.
    """

    images: Array
    kind: Literal["images", "seeded-noise"]
    seed: int | None
    logits: Array
    outputs: tuple[OutputSpec, ...] = ()

    @classmethod
    def of(
        cls,
        reference: Callable[[Array], Array],
        shape: Sequence[int],
        images: Array | None,
        outputs: tuple[OutputSpec, ...] = (),
    ) -> Probe:
        """Run the reference.

        Args:
            reference: Images (count, *shape) -> logits (count, classes), or all outputs of each
                image in a row.
            shape: (channels, height, width).
            images: float32 (count, *shape), or None for seeded noise.
            outputs: The named outputs, if there are others than logits.

        Returns:
            The probe.

        Raises:
            InputError: The images do not fit the model, or the outputs are not finite.
        """
        if images is None:
            size = (NOISE_IMAGES, *shape)
            noise = np.random.default_rng(NOISE_SEED).standard_normal(size, dtype=np.float32)
            logits = _finite_logits(reference(noise))
            return cls(noise, "seeded-noise", NOISE_SEED, logits, outputs)
        inputs = np.ascontiguousarray(images, dtype=np.float32)
        if inputs.ndim != 4 or tuple(inputs.shape[1:]) != tuple(shape) or len(inputs) == 0:
            raise InputError(
                f"images: shape {inputs.shape} does not fit the model's "
                f"(count, {', '.join(map(str, shape))}); prepare them at that size"
            )
        if not np.isfinite(inputs).all():
            raise InputError(
                "images: contain infinite or missing numbers; "
                "check the preprocessing's mean and std"
            )
        return cls(inputs, "images", None, _finite_logits(reference(inputs)), outputs)

    def first(self, count: int) -> Probe:
        """Return the probe of the first `count` images."""
        return replace(self, images=self.images[:count], logits=self.logits[:count])

    def parts(self, found: Array) -> list[tuple[OutputSpec | None, Probe, Array]]:
        """Return each output with the probe of it alone, and its numbers among `found`.

        Args:
            found: Outputs of a stage (count, numbers).

        Raises:
            ParityError: The outputs do not have the reference's shapes.
        """
        if not self.outputs or found.shape != self.logits.shape:
            return [(None, replace(self, outputs=()), found)]
        parts: list[tuple[OutputSpec | None, Probe, Array]] = []
        first = 0
        for output in self.outputs:
            columns = slice(first, first + output.numbers)
            alone = replace(self, logits=self.logits[:, columns], outputs=())
            parts.append((output, alone, found[:, columns]))
            first += output.numbers
        return parts

    def compare(
        self,
        stage: str,
        logits: Array,
        *,
        tolerance: float | None,
        reference: str = "torch",
        precision: str = "fp32",
    ) -> Parity:
        """Compare the outputs of a stage with the reference's.

        Args:
            stage: Name of the stage.
            logits: Its outputs (count, classes).
            tolerance: Recorded with the figures; not enforced here, see `require_parity`.
            reference: Name of what produced the probe's logits.
            precision: The number format of the stage, for the message.

        Returns:
            The figures.

        Raises:
            ParityError: The shapes differ, or an output is not finite.
        """
        if logits.shape != self.logits.shape:
            raise ParityError(
                f"stage {stage}: outputs have shape {logits.shape}, "
                f"the reference's {self.logits.shape}"
            )
        error = relative_error(self.logits, logits)
        if not np.isfinite(error).all():
            way_out = "report this model" if precision == "fp32" else "export with precision='fp32'"
            raise ParityError(f"stage {stage}: outputs are infinite or missing numbers; {way_out}")
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

    def clear_agreement(self, logits: Array) -> tuple[float, float]:
        """Return the share of images with the reference's class, and the share by chance.

        Near ties of the reference's own logits count as agreement: all of them on noise or on a few
        images, where one class more or less means nothing, else only those within rounding.

        Args:
            logits: Outputs (count, classes), of the first images.
        """
        expected = self.logits[: len(logits)]
        enough = self.kind == "images" and len(logits) >= FEWEST_IMAGES
        margin = (ROUNDING if enough else NEAR_TIE) * (float(np.abs(expected).max()) or 1.0)
        rows = np.arange(len(logits))
        preferred = expected.max(-1) - expected[rows, logits.argmax(-1)]
        return float((preferred <= margin).mean()), 1.0 / expected.shape[-1]


def _finite_logits(logits: Array) -> Array:
    if not np.isfinite(logits).all():
        raise InputError(
            "the model returns infinite or missing numbers before any export; its weights are "
            "broken, train again or load another file"
        )
    return logits


def relative_error(reference: Array, found: Array) -> Array:
    """Return |found - reference| / max |reference|, element by element."""
    top = float(np.abs(reference).max()) or 1.0
    error: Array = np.abs(found.astype(np.float64) - reference.astype(np.float64)) / top
    return error


def model_outputs(
    model: onnx.ModelProto | bytes,
    images: Array,
    *,
    batch: Batch = 1,
    config: dict[str, str] | None = None,
) -> Array:
    """Run an ONNX model on all images.

    Args:
        model: A graph, or its bytes.
        images: float32 (count, channels, height, width).
        batch: The graph's batch size; an incomplete last batch is padded.
        config: Session config entries.

    Returns:
        Logits (count, classes); several outputs of an image flat, side by side.
    """
    if isinstance(model, bytes):
        session = open_session(model, config=config)
    else:
        session = open_graph(model, config=config)
    return session_outputs(session, images, batch=batch)


def session_outputs(session: Any, images: Array, *, batch: Batch = 1) -> Array:
    """Run an open session on all images, and return the logits, or all outputs side by side."""
    return side_by_side(session_values(session, images, batch=batch))


def session_values(session: Any, images: Array, *, batch: Batch = 1) -> list[Array]:
    """Run an open session on all images, and return each output."""
    name = session.get_inputs()[0].name
    size = min(len(images), DYNAMIC_BATCH_IMAGES) if batch == "dynamic" else batch
    found = []
    for first in range(0, len(images), size):
        chunk = images[first : first + size]
        missing = 0 if batch == "dynamic" else size - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        outputs = session.run(None, {name: chunk})
        found.append([output[: size - missing] for output in outputs])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def side_by_side(outputs: Sequence[Array]) -> Array:
    """Return logits unchanged, other outputs or several as one row for each image."""
    if len(outputs) == 1 and outputs[0].ndim <= 2:
        return outputs[0]
    return np.concatenate([output.reshape(len(output), -1) for output in outputs], axis=1)


def require_parity(parity: Parity, locate: Callable[[float], str | None]) -> Parity:
    """Return the figures of a stage within its tolerance.

    Args:
        parity: The figures.
        locate: Tolerance -> the first difference, or None; called only on failure.

    Raises:
        ParityError: The largest error exceeds the tolerance.
    """
    tolerance = parity.tolerance
    if tolerance is None or parity.max_relative_error <= tolerance:
        return parity
    stage(f"locating the first difference of {parity.stage}")
    place = locate(tolerance) or "no single inner value could be matched"
    named = "outputs differ" if parity.output is None else f"output {parity.output!r} differs"
    largest = "logit" if parity.output is None else "value"
    raise ParityError(
        f"stage {parity.stage}: {named} from {parity.reference} by "
        f"{parity.max_relative_error:.2e} of the largest {largest}, {tolerance:.0e} is allowed; "
        f"first difference: {place}; try another form or precision"
    )


def require_agreement(parity: Parity, agreement: tuple[float, float]) -> None:
    """Raise ParityError where the classes agree less often than by chance.

    Args:
        parity: The figures of the stage.
        agreement: From `Probe.clear_agreement`.
    """
    found, chance = agreement
    if found < chance:
        raise ParityError(
            f"stage {parity.stage}: the top-1 class is that of {parity.reference} on "
            f"{100 * (parity.top1_agreement or 0.0):.0f} % of {parity.images} "
            f"{parity.input_kind}, less than by chance ({100 * chance:.3g} %); export in another "
            "precision, or with more images"
        )


def first_difference(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    image: Array,
    tolerance: float,
    *,
    endings: tuple[str, ...] = ("",),
) -> str | None:
    """Return the candidate's first node whose output differs from the reference's of that name.

    Values are compared flat, since forms differ in batch dimensions. Values that only one graph has
    are skipped.

    Args:
        reference: The graph to compare with.
        candidate: The graph in question.
        image: One batch of inputs.
        tolerance: Allowed error relative to each value's largest entry.
        endings: Only values whose names end with one of these are compared: two forms have equal
            outputs of attention and activation, but not the scaled and centred values between.

    Returns:
        A description of the node, or None if no difference was found.
    """
    outputs = [
        output
        for node in candidate.graph.node
        for output in node.output
        if output.endswith(endings)
    ]
    known = {output for node in reference.graph.node for output in node.output if output}
    shared = [name for name in outputs if name in known]
    left, right = (inner_values(graph, shared, image) for graph in (reference, candidate))
    return first_mismatch(candidate, shared, left, right, tolerance)


def first_mismatch(
    graph: onnx.ModelProto,
    names: Sequence[str],
    left: Mapping[str, Array],
    right: Mapping[str, Array],
    tolerance: float,
) -> str | None:
    """Describe the first of the named values that differs between `left` and `right`.

    Args:
        graph: The graph that computes the values.
        names: Values to compare, in order; those that one side lacks are skipped.
        left: Values of one side, by name.
        right: Values of the other side.
        tolerance: Allowed error relative to each value's largest entry.

    Returns:
        A description of the node, or None if all agree.
    """
    makers = {output: node for node in graph.graph.node for output in node.output}
    for name in names:
        if (
            name not in left
            or name not in right
            or left[name].size != right[name].size
            or left[name].dtype != right[name].dtype
        ):
            continue
        error = 0.0
        if left[name].size:
            error = float(relative_error(left[name].ravel(), right[name].ravel()).max())
        if not error <= tolerance:
            node = makers[name]
            return (
                f"node {node.name or name!r} ({node.op_type}), by {error:.2e} of its largest value"
            )
    return None


def inner_values(model: onnx.ModelProto, names: Sequence[str], image: Array) -> dict[str, Array]:
    """Return values inside a graph for one input, by name; those that cannot be read are absent."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {output.name for output in opened.graph.output}
    opened.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in present
    )
    try:
        session = open_graph(opened)
        values = session.run(None, {session.get_inputs()[0].name: image})
    # The runtime's errors share no type; the figures of the stage are valid without inner values.
    except Exception:
        return {}
    return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}


def first_unmatched_module(
    model: Any, candidate: onnx.ModelProto, image: Array, tolerance: float
) -> str | None:
    """Return the first torch module whose output appears nowhere in an ONNX graph.

    Args:
        model: The torch module.
        candidate: The graph that was exported from it.
        image: One batch of inputs.
        tolerance: Allowed error relative to each output's largest entry.

    Returns:
        A description of the module, in order of computation, or None if all were found.
    """
    names = [output for node in candidate.graph.node for output in node.output if output]
    values = [
        value
        for value in inner_values(candidate, names, image).values()
        if value.dtype == np.float32
    ]
    for name, kind, expected in _module_outputs(model, image):
        same = [value for value in values if value.shape == expected.shape]
        nearest = min(
            (float(relative_error(expected, value).max()) for value in same), default=None
        )
        if nearest is not None and nearest > tolerance:
            return f"module {name} ({kind}), by {nearest:.2e} of its largest value"
    return None


def _module_outputs(model: Any, image: Array) -> list[tuple[str, str, Array]]:
    """Return name, class and output of every module that returns a tensor, in order."""
    import torch

    outputs: list[tuple[str, str, Array]] = []
    hooks = []
    for name, module in model.named_modules():

        def keep(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                value = output.detach().cpu().float().numpy()
                outputs.append((name or "the whole model", type(module).__name__, value))

        hooks.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(torch.from_numpy(image))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
