"""Exact transformations of ONNX graphs from other exporters.

Each states what it requires and ensures, and `modified` is true only if it changed something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from .cleanup import DROP_IDENTITY, RAISE_OPSET
from .erf_to_gelu import ERF_TO_GELU
from .first_tokens import FIRST_TOKENS
from .fold_attention_biases import FOLD_ATTENTION_BIASES
from .fold_biases import FOLD_BIASES
from .fold_constants import FOLD_CONSTANTS
from .fold_factors import FOLD_FACTORS
from .graph_editor import Pass, Result
from .split_qkv import SPLIT_QKV

__all__ = ["PASSES", "Pass", "Result", "Step", "steps"]

# In the order in which one creates opportunities for the next.
PASSES: tuple[Pass, ...] = (
    DROP_IDENTITY,
    FOLD_CONSTANTS,
    RAISE_OPSET,
    ERF_TO_GELU,
    SPLIT_QKV,
    FOLD_FACTORS,
    FOLD_BIASES,
    FOLD_ATTENTION_BIASES,
    FIRST_TOKENS,
)


@dataclass(frozen=True)
class Step:
    """A pass that changed the model, and the models before and after it."""

    name: str
    before: onnx.ModelProto
    after: onnx.ModelProto
    count: int


def steps(model: onnx.ModelProto) -> Iterator[Step]:
    """Run all passes in order, and yield a step for each that changed something."""
    for change in PASSES:
        result = change(model)
        if result.modified:
            yield Step(change.name, model, result.model, result.count)
            model = result.model
