"""Parameters and multiply-adds of any torch module, counted by fvcore in vitrim's conventions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

# Matrix products and convolutions count; norms, poolings and resampling do not.
_WITHOUT = (
    "aten::layer_norm",
    "aten::rms_norm",
    "aten::group_norm",
    "aten::batch_norm",
    "aten::adaptive_avg_pool2d",
    "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d",
)


def count_parameters(model: nn.Module) -> int:
    """Number of learnable numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """Multiply-adds of one forward pass, attention products included.

    Args:
        model: A module in eval mode.
        shape: Of its input, (batch, channels, height, width).

    Returns:
        The count; and the operators that fvcore does not know, with the number of their calls.
    """
    analysis = FlopCountAnalysis(model, torch.zeros(shape))
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
    for name in _WITHOUT:
        analysis.set_op_handle(name, _nothing)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return int(analysis.total()), dict(analysis.unsupported_ops())


def _attention_products(inputs: list[Any], outputs: list[Any]) -> int:
    del outputs
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return int(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    del inputs, outputs
    return 0
