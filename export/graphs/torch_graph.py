"""A torch module as an ONNX graph: torch's own exporter, then onnxsim, each verified."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import nn

from ...core.errors import InputError
from ..choices import named_choices
from ..export_run import ExportRun
from ..manifest import Batch
from ..parity import first_difference, first_unmatched_module
from ..request import MIN_OPSET
from ..stage_line import stage


def trace(run: ExportRun, model: nn.Module) -> onnx.ModelProto:
    """Return a module's simplified graph, and record the parity of both stages.

    Raises:
        InputError: torch cannot export the module.
        ParityError: A graph's outputs differ from the module's.
    """
    request, image = run.request, run.first_batch
    stage("tracing")
    opset = MIN_OPSET if request.graph.opset is None else request.graph.opset
    traced = torch_to_onnx(
        model,
        request.shape,
        batch=request.batch,
        opset=opset,
        output_names=request.output_names,
    )
    if run.selections is not None:
        traced = named_choices(traced, run.selections.values)
    stage("parity of the traced graph")
    logits, chosen = run.outputs_of(traced)
    run.check(
        "onnx",
        logits,
        lambda tolerance: first_unmatched_module(model, traced, image, tolerance),
        chosen=chosen,
    )
    return simplify_and_check(run, traced)


def simplify_and_check(run: ExportRun, graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph after onnxsim, and record its parity; on failure the graph and a note.

    Raises:
        ParityError: The outputs differ.
    """
    stage("simplifying")
    simplified, reason = simplify(graph)
    if reason is not None:
        run.notes.append(reason)
        return simplified
    stage("parity of the simplified graph")
    logits, chosen = run.outputs_of(simplified)
    run.check(
        "simplified",
        logits,
        lambda tolerance: first_difference(graph, simplified, run.first_batch, tolerance),
        chosen=chosen,
    )
    return simplified


def torch_to_onnx(
    model: nn.Module,
    image: tuple[int, int, int],
    *,
    batch: Batch,
    opset: int,
    output_names: Sequence[str] = ("logits",),
) -> onnx.ModelProto:
    """Export a module through torch's dynamo exporter.

    Args:
        model: A module in eval mode.
        image: (channels, height, width).
        batch: Images in a batch, or "dynamic".
        opset: Version of the standard's operators, at least `MIN_OPSET`.
        output_names: One name for each output of the module.

    Returns:
        A graph `images` (batch, *image) -> `logits`, or the named outputs.

    Raises:
        InputError: torch cannot export the module; the message is its reason in one line.
    """
    example = torch.zeros(2 if batch == "dynamic" else batch, *image)
    shapes = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=list(output_names),
                dynamic_shapes=shapes,
                verbose=False,
            )
        except Exception as error:  # torch raises many types here, all about the model
            raise InputError(
                f"torch cannot export {type(model).__name__}: {_one_line(error)}; "
                "simplify its forward, or lift it first"
            ) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if versions.get("", 0) < MIN_OPSET:
        raise InputError(
            f"torch wrote opset {versions.get('')} instead of {opset}; update torch and onnxscript"
        )
    return strip_metadata(proto)


def strip_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop source lines and inner shapes, which stop onnxruntime's quantizer."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.value_info[:]
    return model


def simplify(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
    """Return the graph after onnxsim and None, or the unchanged graph and the reason."""
    try:
        import onnxsim

        with _quiet():
            smaller, checked = onnxsim.simplify(model)
    except Exception as error:  # a native tool with its own errors; simplifying is optional
        return model, f"onnxsim failed and was skipped: {_one_line(error)}"
    if not checked:
        return model, "onnxsim's own check failed; its result was discarded"
    del smaller.graph.value_info[:]
    return smaller, None


@contextlib.contextmanager
def _quiet() -> Any:
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
