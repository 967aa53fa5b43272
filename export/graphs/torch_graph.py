"""A torch module as an ONNX graph, through torch's own exporter, and tidied by onnxsim."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from typing import Any, Literal

import onnx
import torch
from torch import nn

from ...core.errors import InputError

MIN_OPSET = 20  # the first with a Gelu of its own; below, Gelu falls into pieces that run slower


def torch_to_onnx(
    model: nn.Module, image: tuple[int, int, int], *, batch: int | Literal["dynamic"], opset: int
) -> onnx.ModelProto:
    """Export in eval mode: `images` (batch, *image) -> `logits`. Errors: InputError with torch's
    reason in one line.
    """
    if opset < MIN_OPSET:
        raise InputError(
            f"opset {opset}: the export needs at least {MIN_OPSET}, where Gelu became an operator; raise it or leave it out"
        )
    size = 2 if batch == "dynamic" else batch
    example = torch.zeros(size, *image)
    shapes = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=shapes,
                verbose=False,
            )
        except Exception as error:  # torch raises many types here, all about the model
            raise InputError(
                f"torch cannot export {type(model).__name__}: {_one_line(error)}; simplify its forward, or lift it first"
            ) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    named = {entry.domain: entry.version for entry in proto.opset_import}
    if named.get("", 0) < MIN_OPSET:
        raise InputError(
            f"torch wrote opset {named.get('')} instead of {opset}; update torch and onnxscript"
        )
    return tidy_names(proto)


def tidy_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what only the exporter needs: source lines and shapes of inner values (which stop
    onnxruntime's quantizer).
    """
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.value_info[:]
    return model


def simplify(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
    """The graph after onnxsim, and None; or the untouched graph and the reason, since a failed
    tidying loses nothing.
    """
    try:
        import onnxsim

        with _quiet():
            smaller, checked = onnxsim.simplify(model)
    except (
        Exception
    ) as error:  # a native tool with errors of its own; the export goes on without it
        return model, f"onnxsim failed and was left out: {_one_line(error)}"
    if not checked:
        return model, "onnxsim's own check failed; its result was left out"
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
