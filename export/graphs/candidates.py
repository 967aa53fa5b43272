"""The graphs that may be shipped: the known form, all forms where they are to race, or torch's own;
each in the wanted precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
from torch import nn

from ...compress.lift import lift
from ...compress.network.modules.model import CompactModel
from ...core.errors import UnsupportedModel
from .. import capabilities
from ..forms import FORMS, INT8_FORMS, STREAM_FORMS, Form, form_named, write_network
from ..forms.coverage import reason_against
from ..manifest import Array
from ..parity import first_difference
from ..quantization import quantize
from ..quantization.quantize import half
from ..quantization.static_choice import StaticOptions, best_static, static_graph
from ..request import ExportRequest
from .known_forms import best_form

PLAIN = "plain"
# What two forms answer alike; scaled queries, unbiased values and centred streams between them
# differ on purpose.
COMPARABLE = (".softmax", ".act", "logits")
_REFERENCE_FORM = Form(
    rows="batch", norm="layer", last_queries=False, last_keys=False, stream="dense"
)


@dataclass(frozen=True)
class Candidate:
    """A float graph that answers like the model, how it is called, and the form to rewrite it with
    (None for graphs that are not ours).
    """

    name: str
    model: onnx.ModelProto
    form: Form | None


def readable(model: nn.Module) -> CompactModel:
    """The model as the forms read it. Errors: UnsupportedModel naming what no form has a rule
    for.
    """
    compact: CompactModel = lift(model)
    if reason := reason_against(compact.architecture):
        raise UnsupportedModel(f"no rule for {reason}")
    return compact


def candidates(
    model: nn.Module, tidy: onnx.ModelProto, order: ExportRequest, *, portable: Form | None = None
) -> tuple[list[Candidate], list[str]]:
    """The graphs to prove, and notes for the manifest. portable: the form to take where the order
    names none and its runtime is not ours to tune.

    Errors: UnsupportedModel where a form is asked for that the model cannot have.
    """
    form = order.form
    plain = Candidate(PLAIN, tidy, None)
    if form == PLAIN:
        return [plain], []
    try:
        compact = readable(model)
    except UnsupportedModel as error:
        if form is not None:
            raise UnsupportedModel(f"form {form}: {error}; export with form='plain'") from None
        return [plain], [
            f"torch's own graph is shipped, since the graph forms do not cover it: {error}"
        ]
    notes = []
    if form is not None:
        forms = [form_named(form) if isinstance(form, str) else form]
    elif portable is not None:
        forms = [portable]
    elif order.tune:
        known = [
            *FORMS,
            *(INT8_FORMS if order.precision in ("int8", "int8-static") else ()),
            *(STREAM_FORMS if _scattered(compact) else ()),
        ]
        forms = [
            entry
            for entry in known
            if (order.batch == 1 or entry.rows == "batch")
            and entry.opset <= (order.opset or entry.opset)
        ]
    else:
        best, measured = best_form(
            order.target,
            order.batch,
            compact.architecture.tokens,
            precision=order.precision,
            threads=order.threads,
        )
        if order.opset is not None and order.opset < best.opset:
            best, measured = (
                replace(best, attention="split"),
                f"{measured}; without the operators that opset {order.opset} lacks",
            )
        forms = [best]
        notes.append(f"form: {measured}")
    found = [
        Candidate(
            entry.name,
            write_network(compact, entry, batch=order.free_batch, opset=order.opset),
            entry,
        )
        for entry in forms
    ]
    return ([*found, plain] if order.tune and form is None else found), notes


def _scattered(compact: CompactModel) -> bool:
    """Whether masks were not shared, so that writers fill channels of their own."""
    architecture = compact.architecture
    return architecture.stem_writes is not None or any(
        branch.writes is not None for branch in architecture.branches
    )


def in_precision(
    model: nn.Module, candidate: Candidate, order: ExportRequest, notes: list[str]
) -> onnx.ModelProto:
    """The candidate's graph for ONNX Runtime in the order's precision; notes grow where there was
    something to choose.
    """
    precision = order.precision
    if precision == "fp32":
        return candidate.model
    bits = 8 if capabilities.int8_exact(order.target) else 7
    if precision == "int8" and candidate.form is not None:
        return write_network(
            lift(model),
            candidate.form,
            batch=order.free_batch,
            linears="int8",
            weight_bits=bits,
            opset=order.opset,
        )
    float_graph = candidate.model
    if candidate.form is not None:
        float_graph = write_network(
            lift(model),
            candidate.form,
            batch=order.free_batch,
            linears="product",
            opset=order.opset,
        )
    if precision == "int8":
        return quantize.int8_dynamic(float_graph, weight_bits=bits)
    if precision == "int8-static":
        return static(float_graph, order, bits, notes, form=candidate.form)
    if precision == "fp16":
        return half(candidate.model)
    return quantize.weights_only(float_graph, 4 if precision == "int4-weights" else 8)


def static(
    float_graph: onnx.ModelProto,
    order: ExportRequest,
    weight_bits: int,
    notes: list[str],
    *,
    form: Form | None = None,
) -> onnx.ModelProto:
    """Static eight bits by the calibration that was asked for, or the best of all. form: of the
    graph, where it is ours; else the target says how.
    """
    assert order.images is not None
    images = order.images[: quantize.CALIBRATION_IMAGES]
    # A stem that cannot be a product is a convolution in every form, and stays float.
    product = any(
        node.name == "stem" and node.op_type == "MatMul" for node in float_graph.graph.node
    )
    options = StaticOptions(
        weight_bits=weight_bits,
        pairs=capabilities.wants_pairs(order.target) if form is None else form.qdq,
        also=("patch",) if form is not None and form.stem == "int8" and product else (),
    )
    if order.calibration != "best":
        return static_graph(float_graph, images, order.calibration, options)
    timed = capabilities.is_host(order.target)
    return best_static(
        float_graph, images, options, timed=timed, notes=notes, threads=order.threads
    )


def where_in_form(
    model: nn.Module, candidate: Candidate, first: Array, order: ExportRequest, tolerance: float
) -> str | None:
    """The first node of a form that differs from the plainest form, or None for graphs that are not
    ours.
    """
    if candidate.form is None:
        return None
    reference = write_network(
        lift(model),
        replace(_REFERENCE_FORM, last_queries=candidate.form.last_queries),
        batch=order.free_batch,
    )
    return first_difference(reference, candidate.model, first, tolerance, endings=COMPARABLE)
