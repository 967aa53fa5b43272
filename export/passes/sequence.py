"""The passes in the order in which one makes work for the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import onnx

from . import (
    drop_identity,
    erf_to_gelu,
    first_tokens,
    fold_attention_biases,
    fold_biases,
    fold_constants,
    fold_factors,
    raise_opset,
    split_qkv,
)
from .contract import Pass, Result


@dataclass(frozen=True)
class _FilePass:
    """A file of this folder as a pass."""

    module: ModuleType

    @property
    def name(self) -> str:
        return str(self.module.name)

    @property
    def requires(self) -> str:
        return str(self.module.requires)

    @property
    def ensures(self) -> str:
        return str(self.module.ensures)

    def __call__(self, model: onnx.ModelProto) -> Result:
        result: Result = self.module.apply(model)
        return result


@dataclass(frozen=True)
class Step:
    """A pass that changed the model, and the models before and after it."""

    name: str
    before: onnx.ModelProto
    after: onnx.ModelProto
    count: int


_ORDER = (
    drop_identity,
    fold_constants,
    raise_opset,
    erf_to_gelu,
    split_qkv,
    fold_factors,
    fold_biases,
    fold_attention_biases,
    first_tokens,
)
PASSES: tuple[Pass, ...] = tuple(_FilePass(module) for module in _ORDER)


def steps(model: onnx.ModelProto) -> Iterator[Step]:
    """Run all passes, one after the other, and tell of each that changed something."""
    for change in PASSES:
        result = change(model)
        if result.modified:
            yield Step(change.name, model, result.model, result.count)
            model = result.model
