"""The choice between several static eight-bit graphs.

Candidates differ in the calibration, and in whether more than the weight products is quantized.
Each is recorded in the notes, one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from ..graphs.tuning import fastest
from ..manifest import Array
from ..parity import model_outputs, relative_error
from ..stage_line import stage
from .quantize import CALIBRATIONS, Calibration, FloatPart, int8_static
from .static_kernels import eight_bit_products

# The latency ratio that a graph with more in eight bits must reach to be kept.
REQUIRED_RATIO = 0.98
# What else can be quantized, and the operators or nodes that it consists of.
_OPTIONAL_PARTS: tuple[tuple[FloatPart, tuple[str, ...]], ...] = (
    ("patch", ("Conv", "stem")),
    ("attention", ("Softmax",)),
    ("norm", ("LayerNormalization",)),
)


@dataclass(frozen=True)
class StaticOptions:
    """How static eight bits are written.

    Attributes:
        weight_bits: 8, or 7 for processors whose eight-bit products saturate.
        pairs: Keep QuantizeLinear and DequantizeLinear pairs around float products, with symmetric
            ranges, instead of the runtime's own eight-bit products.
        also: What is quantized besides the weight products.
        classes: How many of the first numbers of an image's outputs are logits; None: all.
    """

    weight_bits: int = 8
    pairs: bool = False
    also: tuple[FloatPart, ...] = ()
    classes: int | None = None


@dataclass(frozen=True)
class StaticCandidate:
    """One quantized graph, and how far its outputs are from the float graph's.

    Errors are relative to the largest output, over the calibration images. The agreement is None
    without logits.
    """

    calibration: Calibration
    also: tuple[FloatPart, ...]
    graph: onnx.ModelProto
    mean_relative_error: float
    max_relative_error: float
    top1_agreement: float | None

    @property
    def name(self) -> str:
        """The name in notes."""
        return _name(self.calibration, self.also)

    def summary(self) -> str:
        """Return one line for the manifest."""
        errors = (
            f"int8-static by {self.name}: mean relative error {self.mean_relative_error:.1e}, "
            f"largest {self.max_relative_error:.1e}"
        )
        if self.top1_agreement is None:
            return errors
        return f"{errors}, same top-1 class on {100 * self.top1_agreement:.1f} %"

    @property
    def agreement(self) -> float:
        """The agreement for comparisons; without logits only errors decide."""
        return 0.0 if self.top1_agreement is None else self.top1_agreement


def _name(calibration: Calibration, also: tuple[FloatPart, ...]) -> str:
    return f"{calibration} calibration" + "".join(f", {part} in eight bits too" for part in also)


def static_graph(
    float_graph: onnx.ModelProto, images: Array, calibration: Calibration, options: StaticOptions
) -> onnx.ModelProto:
    """Quantize a graph by one calibration.

    Args:
        float_graph: The graph, not fused yet.
        images: Calibration images, float32 (count, channels, height, width).
        calibration: How ranges are found.
        options: How the result is written.

    Returns:
        The quantized graph.

    Raises:
        InputError: See `int8_static`.
    """
    made = int8_static(
        float_graph,
        images,
        calibration=calibration,
        weight_bits=options.weight_bits,
        also=options.also,
        symmetric=options.pairs,
    )
    return made if options.pairs else eight_bit_products(made)[0]


def best_static(
    float_graph: onnx.ModelProto,
    images: Array,
    options: StaticOptions,
    *,
    timed: bool,
    notes: list[str],
    threads: int = 1,
) -> onnx.ModelProto:
    """Return the quantized graph with the most accurate outputs over the three calibrations.

    Args:
        float_graph: The graph, not fused yet.
        images: Calibration images, float32 (count, channels, height, width).
        options: How candidates are written; the parts in `also` are quantized in any case.
        timed: Also try the patch embedding, attention and the norms in eight bits, one after the
            other, and keep what is faster on this machine at no lower top-1 agreement. Otherwise
            they stay float, where they were measured to be better; so do parts that a form writes
            as one operator.
        notes: Gets a line for each candidate.
        threads: Threads to time with.

    Returns:
        The graph of the best candidate.

    Raises:
        InputError: See `int8_static`.
    """
    size = float_graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    reference = model_outputs(float_graph, images, batch=size)

    def candidate(calibration: Calibration, also: tuple[FloatPart, ...]) -> StaticCandidate:
        stage(f"calibrating by {_name(calibration, also).replace(' calibration', '', 1)}")
        made = static_graph(float_graph, images, calibration, replace(options, also=also))
        found = model_outputs(made, images, batch=size)
        error = relative_error(reference, found)
        agreement = _agreement(reference, found, options.classes)
        errors = float(error.mean()), float(error.max())
        return StaticCandidate(calibration, also, made, *errors, agreement)

    candidates = [candidate(calibration, options.also) for calibration in CALIBRATIONS]
    notes.extend(found.summary() for found in candidates)
    best = most_accurate(candidates)
    present = {word for node in float_graph.graph.node for word in (node.op_type, node.name)}
    for part, nodes in _OPTIONAL_PARTS if timed else ():
        if part in options.also or not present & set(nodes):
            continue
        larger = candidate(best.calibration, (*best.also, part))
        rivals = {"floats": best.graph, "more": larger.graph}
        latency_s = dict(fastest(rivals, images[:size], threads=threads, limit_s=1.0))
        ratio = latency_s["more"] / latency_s["floats"]
        kept = ratio < REQUIRED_RATIO and larger.agreement >= best.agreement
        outcome = "kept" if kept else "left float"
        notes.append(f"{larger.summary()}, {ratio:.3f} of the latency: {outcome}")
        best = larger if kept else best
    return best.graph


def most_accurate(candidates: Sequence[StaticCandidate]) -> StaticCandidate:
    """Return the candidate of highest top-1 agreement, then of smallest mean error."""
    return max(candidates, key=lambda found: (found.agreement, -found.mean_relative_error))


def _agreement(reference: Array, found: Array, classes: int | None) -> float | None:
    if classes == 0:
        return None
    same = found[:, :classes].argmax(-1) == reference[:, :classes].argmax(-1)
    return float(np.mean(same))
