"""The graphs that can be shipped, each in the requested precision.

They are the best known form, all forms where they are to be measured, or torch's own graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
from torch import nn

from ...compress.lift import lift
from ...compress.network.modules.model import CompactModel
from ...core.errors import InputError, UnsupportedModel
from .. import capabilities
from ..forms import FORMS, INT8_FORMS, STREAM_FORMS, Form, form_named, write_network
from ..forms.coverage import reason_against
from ..forms.dense_outputs import form_for_outputs
from ..manifest import Array
from ..parity import first_difference
from ..quantization import quantize
from ..quantization.static_choice import StaticOptions, best_static, static_graph
from ..request import ExportRequest
from ..runtimes.runtime import MakeGraph
from .known_forms import best_form

PLAIN = "plain"
# Values that are equal in all forms; scaled queries, unbiased values and centred streams differ.
COMPARABLE = (".softmax", ".act", "logits")
_REFERENCE_FORM = Form(
    rows="batch", norm="layer", last_queries=False, last_keys=False, stream="dense"
)


@dataclass(frozen=True)
class Candidate:
    """A float graph of the model.

    Attributes:
        name: The form's name.
        model: The graph.
        form: The form to write it with in another precision; None for torch's graph.
    """

    name: str
    model: onnx.ModelProto
    form: Form | None


def readable(model: nn.Module) -> CompactModel:
    """Return the model as the forms read it.

    Raises:
        UnsupportedModel: No form has a rule for a part of the model; the message names it.
    """
    compact: CompactModel = lift(model)
    if reason := reason_against(compact.architecture):
        raise UnsupportedModel(f"no rule for {reason}")
    return compact


def candidates(
    model: nn.Module,
    plain: MakeGraph,
    request: ExportRequest,
    *,
    portable: Form | None = None,
) -> tuple[list[Candidate], list[str]]:
    """Return the float graphs to verify.

    Args:
        model: The torch module.
        plain: Returns its graph as torch exports it; called only where that is a candidate.
        request: The options.
        portable: The form for a runtime other than ONNX Runtime, where the request names none.

    Returns:
        The candidates, and notes for the manifest.

    Raises:
        UnsupportedModel: The requested form does not cover the model.
    """
    form, tune = request.graph.form, request.graph.tune
    if form == PLAIN:
        return [Candidate(PLAIN, plain(), None)], []
    try:
        compact = readable(model)
    except UnsupportedModel as error:
        if form is not None:
            raise UnsupportedModel(f"form {form}: {error}; export with form='plain'") from None
        return [Candidate(PLAIN, plain(), None)], [
            f"torch's own graph is shipped, since the graph forms do not cover it: {error}"
        ]
    notes = []
    if form is not None:
        forms = [form_named(form) if isinstance(form, str) else form]
    elif portable is not None:
        forms = [portable]
    elif tune:
        forms = _tunable_forms(compact, request)
    else:
        best, measured = _best_known_form(compact, request)
        forms = [best]
        notes.append(f"form: {measured}")
    batch, opset = request.symbolic_batch, request.graph.opset
    fitting = [form_for_outputs(entry, compact.architecture, request.outputs) for entry in forms]
    forms = list(dict.fromkeys(fitting))
    found = [
        Candidate(
            entry.name,
            write_network(
                compact,
                entry,
                batch=batch,
                opset=opset,
                outputs=request.outputs,
                # Other precisions round this graph, and scores stay as they are.
                share_maps=request.numeric.precision == "fp32",
            ),
            entry,
        )
        for entry in forms
    ]
    if tune and form is None:
        found.append(Candidate(PLAIN, plain(), None))
    return found, notes


def _tunable_forms(compact: CompactModel, request: ExportRequest) -> list[Form]:
    """Return the forms that fit the request, for `tune`."""
    opset = request.graph.opset
    forms = list(FORMS)
    if request.numeric.precision in capabilities.EIGHT_BITS:
        forms += INT8_FORMS
    if _scattered(compact):
        forms += STREAM_FORMS
    return [
        form
        for form in forms
        if (request.batch == 1 or form.rows == "batch") and (opset is None or form.opset <= opset)
    ]


def _best_known_form(compact: CompactModel, request: ExportRequest) -> tuple[Form, str]:
    best, measured = best_form(
        request.device.target,
        request.batch,
        compact.architecture.tokens,
        precision=request.numeric.precision,
        threads=request.device.threads,
    )
    opset = request.graph.opset
    if opset is None or opset >= best.opset:
        return best, measured
    return (
        replace(best, attention="split"),
        f"{measured}; without the operators that opset {opset} lacks",
    )


def _scattered(compact: CompactModel) -> bool:
    """Return whether masks were unshared, so that writers fill different channels."""
    architecture = compact.architecture
    return architecture.stem_writes is not None or any(
        branch.writes is not None for branch in architecture.branches
    )


def in_precision(
    model: nn.Module, candidate: Candidate, request: ExportRequest, notes: list[str]
) -> onnx.ModelProto:
    """Return a candidate's graph for ONNX Runtime in the requested precision.

    Args:
        model: The torch module.
        candidate: The float graph.
        request: The options.
        notes: Gets lines where there are several ways to quantize.

    Returns:
        The graph.
    """
    precision, form = request.numeric.precision, candidate.form
    if form is None or precision in ("fp32", "fp16"):
        return graph_in_precision(candidate.model, request, notes)
    compact, batch, opset = lift(model), request.symbolic_batch, request.graph.opset
    if precision == "int8":
        bits = int8_weight_bits(request)
        return write_network(
            compact,
            form,
            batch=batch,
            linears="int8",
            weight_bits=bits,
            opset=opset,
            outputs=request.outputs,
        )
    float_graph = write_network(
        compact, form, batch=batch, linears="product", opset=opset, outputs=request.outputs
    )
    return graph_in_precision(float_graph, request, notes, form=form)


def graph_in_precision(
    float_graph: onnx.ModelProto,
    request: ExportRequest,
    notes: list[str],
    *,
    form: Form | None = None,
) -> onnx.ModelProto:
    """Return any float graph in the requested precision.

    Args:
        float_graph: The graph, not fused yet.
        request: The options.
        notes: Gets lines where there are several ways to quantize.
        form: The graph's form, where it has one; it decides how static eight bits are written.

    Returns:
        The graph.
    """
    precision = request.numeric.precision
    if precision == "int8":
        return quantize.int8_dynamic(float_graph, weight_bits=int8_weight_bits(request))
    if precision == "int8-static":
        return _static(float_graph, request, notes, form)
    if precision == "fp16":
        return quantize.half(float_graph)
    if precision in ("int8-weights", "int4-weights"):
        return quantize.weights_only(float_graph, 4 if precision == "int4-weights" else 8)
    return float_graph


def int8_weight_bits(request: ExportRequest) -> int:
    """Return 8, or 7 for targets whose eight-bit products saturate."""
    return 8 if capabilities.int8_exact(request.device.target) else 7


def _static(
    float_graph: onnx.ModelProto, request: ExportRequest, notes: list[str], form: Form | None
) -> onnx.ModelProto:
    """Return static eight bits by the requested calibration, or by the best of all."""
    numeric, target = request.numeric, request.device.target
    assert numeric.images is not None
    images = numeric.images[: quantize.CALIBRATION_IMAGES]
    if numeric.calibration == "best" and (reason := capabilities.int8_saturates_here(target)):
        raise InputError(
            f"calibration 'best' compares outputs on this machine: {reason}; "
            f"or name one of {', '.join(quantize.CALIBRATIONS)}"
        )
    # A stem that cannot be a product is a convolution in every form, and stays float.
    product = any(
        node.name == "stem" and node.op_type == "MatMul" for node in float_graph.graph.node
    )
    options = StaticOptions(
        weight_bits=int8_weight_bits(request),
        pairs=capabilities.needs_qdq_pairs(target) if form is None else form.qdq,
        also=("patch",) if form is not None and form.stem == "int8" and product else (),
        classes=request.classes,
    )
    if numeric.calibration != "best":
        return static_graph(float_graph, images, numeric.calibration, options)
    return best_static(
        float_graph,
        images,
        options,
        timed=capabilities.is_host(target),
        notes=notes,
        threads=request.device.threads,
    )


def where_in_form(
    model: nn.Module,
    candidate: Candidate,
    first_batch: Array,
    request: ExportRequest,
    tolerance: float,
) -> str | None:
    """Return the first node of a form that differs from the simplest form.

    Args:
        model: The torch module.
        candidate: The graph in question.
        first_batch: One batch of inputs.
        request: The options.
        tolerance: Allowed error relative to each value's largest entry.

    Returns:
        A description of the node; None if none differs, or for torch's graph.
    """
    if candidate.form is None:
        return None
    form = replace(_REFERENCE_FORM, last_queries=candidate.form.last_queries)
    reference = write_network(
        lift(model), form, batch=request.symbolic_batch, outputs=request.outputs
    )
    return first_difference(reference, candidate.model, first_batch, tolerance, endings=COMPARABLE)
