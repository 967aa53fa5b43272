"""Graphs in vitrim's forms, compared with the networks that they were written from."""

from __future__ import annotations

import copy
from typing import Any

import onnx
import torch
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import Form
from vitrim.export.parity import model_outputs, relative_error

# What pnnx converts to ncnn.
NCNN = Form(rows="batch", norm="layer", stream="dense", operators="pnnx")


def error_of(
    model: CompactModel,
    graph: onnx.ModelProto,
    images: Any = None,
    *,
    batch: Any = 1,
    count: int = 3,
) -> float:
    """The largest relative error of a graph, on `images` or on `count` random ones."""
    if images is None:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(count, *model.architecture.image, generator=generator).numpy()
    with torch.no_grad():
        expected = model(torch.from_numpy(images).to(next(model.parameters()).dtype)).numpy()
    return float(relative_error(expected, model_outputs(graph, images, batch=batch)).max())


def well_conditioned(model: CompactModel) -> bool:
    """Whether single precision suffices: norms over two channels in a row amplify rounding."""
    images = torch.randn(3, *model.architecture.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, single = model(images.double()), copy.deepcopy(model).float()(images)
    return float(relative_error(exact.numpy(), single.numpy()).max()) < 1e-5
