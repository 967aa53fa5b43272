"""Graphs in vitrim's forms, compared with the networks that they were written from."""

from __future__ import annotations

import copy

import onnx
import torch
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import Form
from vitrim.export.parity import model_outputs, relative_error

# What pnnx converts to ncnn.
NCNN = Form(rows="batch", norm="layer", stream="dense", operators="pnnx")


def error_of(
    model: CompactModel, graph: onnx.ModelProto, *, batch: int | str = 1, count: int = 3
) -> float:
    images = torch.randn(
        count, *model.architecture.image, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected = model(images.to(next(model.parameters()).dtype)).numpy()
    return float(relative_error(expected, model_outputs(graph, images.numpy(), batch=batch)).max())  # type: ignore[arg-type]


def well_conditioned(model: CompactModel) -> bool:
    """Whether single precision suffices: norms over two channels in a row amplify rounding."""
    images = torch.randn(3, *model.architecture.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, single = model(images.double()), copy.deepcopy(model).float()(images)
    return float(relative_error(exact.numpy(), single.numpy()).max()) < 1e-5
