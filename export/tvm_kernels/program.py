"""A Relax function made of our kernels, one after the other; equal kernels are written once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

Value = Any


class Program:
    """Collects calls of kernels into one function `main` from one input to one output."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.builder = relax.BlockBuilder()
        self.input = relax.Var("images", relax.TensorType(shape, "float32"))
        self._kernels: dict[Hashable, Any] = {}
        self._names: set[str] = set()
        self.keys: list[Hashable] = []

    @property
    def kernels(self) -> int:
        """Kernels so far, each counted once."""
        return len(self._kernels)

    def build(
        self, body: Callable[[], Value], aside: Callable[[], list[Value]] | None = None
    ) -> tvm.IRModule:
        """Runs `body`, which calls kernels and returns what `main` returns. aside: values that it
        returns too, known when the body has run.
        """
        with self.builder.function("main", [self.input]):
            with self.builder.dataflow():
                found = body()
                result = self.builder.emit_output(
                    found if aside is None else relax.Tuple([found, *aside()])
                )
            self.builder.emit_func_output(result)
        return self.builder.finalize()

    def call(
        self,
        name: str,
        key: Hashable,
        kernel: Callable[[], Any],
        operands: list[Value],
        shape: tuple[int, ...],
        dtype: str = "float32",
    ) -> Value:
        """What the kernel that `key` stands for makes of the operands, of the given shape and type.
        kernel: writes it where it is new.
        """
        if key not in self._kernels:
            unique = name if name not in self._names else f"{name}_{len(self._kernels)}"
            self._names.add(unique)
            self._kernels[key] = self.builder.add_func(
                kernel().with_attr("tirx.noalias", True), unique
            )
        self.keys.append(key)
        return self.builder.emit(
            relax.call_tir(self._kernels[key], operands, relax.TensorType(shape, dtype))
        )

    def constant(self, value: NDArray[np.generic]) -> Value:
        """Numbers that travel with the program."""
        return relax.const(value)


def lowering() -> tvm.transform.Pass:
    """From a module of kernels to one that the virtual machine runs: memory planned, nothing fused
    (the kernels are what they are).
    """
    # TVM's own pipeline looks for reshapes among kernels, and its check fails on those without
    # blocks ("func->body->IsInstance<SBlockRealizeNode>").
    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
