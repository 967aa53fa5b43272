"""Static eight bits, several ways: which calibration, and whether more than the weight products
goes into eight bits. Each is told, one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ..artifact import Array
from ..graphs.tuning import fastest
from ..parity import answers, relative_error
from ..stage_line import stage
from .quantize import CALIBRATIONS, Also, Calibration, int8_static
from .static_kernels import eight_bit_products

# How much sooner a graph with more in eight bits must answer before it is taken.
WORTH = 0.98
# What else may go into eight bits, and the operators or nodes in which the quantizer finds it.
_MORE: tuple[tuple[Also, tuple[str, ...]], ...] = (
    ("patch", ("Conv", "stem")),
    ("attention", ("Softmax",)),
    ("norm", ("LayerNormalization",)),
)


@dataclass(frozen=True)
class Way:
    """One way to quantize, and what it did to the answers on the calibration images; latency
    against the way with floats, where it was timed.
    """

    calibration: Calibration
    also: tuple[Also, ...]
    graph: onnx.ModelProto
    mean_relative_error: float
    max_relative_error: float
    top1_agreement: float

    @property
    def name(self) -> str:
        """As notes call it."""
        return f"{self.calibration} calibration" + "".join(
            f", {part} in eight bits too" for part in self.also
        )

    def told(self) -> str:
        """One line for the manifest."""
        return (
            f"int8-static by {self.name}: mean relative error {self.mean_relative_error:.1e}, largest {self.max_relative_error:.1e}, "
            f"same answer on {100 * self.top1_agreement:.1f} %"
        )


def static_graph(
    float_graph: onnx.ModelProto,
    images: Array,
    calibration: Calibration,
    *,
    weight_bits: int,
    pairs: bool,
    also: tuple[Also, ...] = (),
) -> onnx.ModelProto:
    """Eight bits by one calibration; pairs: left around float products, with ranges around zero,
    instead of the runtime's own eight-bit products.
    """
    made = int8_static(
        float_graph,
        images,
        calibration=calibration,
        weight_bits=weight_bits,
        also=also,
        symmetric=pairs,
    )
    return made if pairs else eight_bit_products(made)[0]


def best_static(
    float_graph: onnx.ModelProto, images: Array, *, weight_bits: int, timed: bool, notes: list[str], pairs: bool = False, also: tuple[Also, ...] = (),
    threads: int = 1,
) -> onnx.ModelProto:  # fmt: skip
    """The graph whose answers stay nearest, over the three calibrations; `notes` gets a line for
    each. also: what goes into eight bits in any case.

    timed: also try the patch embedding, attention and the norms in eight bits, one after the other,
    and keep what is faster here without answering fewer images alike. Without it they stay float,
    where they have been found better; so do those that a form hands to one operator as a whole.
    """
    size = float_graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    reference = answers(float_graph, images, batch=size)

    def way_of(calibration: Calibration, also: tuple[Also, ...]) -> Way:
        stage(
            f"calibrating by {calibration}"
            + "".join(f", {part} in eight bits too" for part in also)
        )
        made = static_graph(
            float_graph, images, calibration, weight_bits=weight_bits, pairs=pairs, also=also
        )
        return _way(calibration, also, made, reference, answers(made, images, batch=size))

    ways = [way_of(calibration, also) for calibration in CALIBRATIONS]
    notes.extend(way.told() for way in ways)
    best = nearest(ways)
    there = {word for node in float_graph.graph.node for word in (node.op_type, node.name)}
    for more, kinds in _MORE if timed else ():
        if more in also or not there & set(kinds):
            continue
        way = way_of(best.calibration, (*best.also, more))
        latency_s = dict(
            fastest(
                {"floats": best.graph, "more": way.graph},
                images[:size],
                threads=threads,
                limit_s=1.0,
            )
        )
        ratio = latency_s["more"] / latency_s["floats"]
        taken = ratio < WORTH and way.top1_agreement >= best.top1_agreement
        notes.append(
            f"{way.told()}, {ratio:.3f} of the latency: {'taken' if taken else 'left float'}"
        )
        best = way if taken else best
    return best.graph


def nearest(ways: Sequence[Way]) -> Way:
    """Most answers alike, then the smallest mean error."""
    return max(ways, key=lambda way: (way.top1_agreement, -way.mean_relative_error))


def _way(
    calibration: Calibration,
    also: tuple[Also, ...],
    made: onnx.ModelProto,
    reference: Array,
    found: Array,
) -> Way:
    error = relative_error(reference, found)
    agreement = float(np.mean(found.argmax(-1) == reference.argmax(-1)))
    return Way(calibration, also, made, float(error.mean()), float(error.max()), agreement)
