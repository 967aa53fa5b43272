"""A Relax function that calls our kernels one after the other.

Equal kernels are emitted once, and equal calls between them are made once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

Value = Any


class Program:
    """Collects calls of kernels into one function `main` with one input.

    Args:
        shape: The shape of the images.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.builder = relax.BlockBuilder()
        self.input = relax.Var("images", relax.TensorType(shape, "float32"))
        self._kernels: dict[Hashable, Any] = {}
        self._names: set[str] = set()
        # What each kernel returned for its operands, and constants by their content.
        self._results: dict[Hashable, list[tuple[list[Value], list[Value]]]] = defaultdict(list)
        self._constants: dict[Hashable, Value] = {}
        self.keys: list[Hashable] = []

    def build(
        self, body: Callable[[], list[Value]], extra: Callable[[], list[Value]] | None = None
    ) -> tvm.IRModule:
        """The module with `main`.

        Args:
            body: Calls the kernels and returns the results of `main`.
            extra: Further results, called after `body`.
        """
        with self.builder.function("main", [self.input]):
            with self.builder.dataflow():
                found = body()
                if extra is not None:
                    found = [*found, *extra()]
                alone = extra is None and len(found) == 1
                result = self.builder.emit_output(found[0] if alone else relax.Tuple(found))
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
        """Call a kernel, unless its result for these operands is known.

        Args:
            name: The kernel's name; a second kernel of the name gets a number.
            key: Equal keys denote the same kernel.
            kernel: Emits the kernel; called for a new key only.
            operands: The inputs.
            shape: The shape of the result. Flat values are those between kernels; others are
                outputs of the network, which do not share memory.
            dtype: The type of the result.

        Returns:
            The result.
        """
        return self.call_all(name, key, kernel, operands, [(shape, dtype)])[0]

    def call_all(
        self,
        name: str,
        key: Hashable,
        kernel: Callable[[], Any],
        operands: list[Value],
        results: Sequence[tuple[tuple[int, ...], str]],
    ) -> list[Value]:
        """Call a kernel with one or several results, as `call`.

        Args:
            name: See `call`.
            key: See `call`.
            kernel: See `call`.
            operands: The inputs.
            results: Shape and type of each result.

        Returns:
            The results.
        """
        flat = all(len(shape) == 1 for shape, _ in results)
        for known, found in self._results[key] if flat else ():
            if all(one.same_as(other) for one, other in zip(known, operands, strict=True)):
                return found
        if key not in self._kernels:
            unique = name if name not in self._names else f"{name}_{len(self._kernels)}"
            self._names.add(unique)
            function = kernel().with_attr("tirx.noalias", True)
            self._kernels[key] = self.builder.add_func(function, unique)
        self.keys.append(key)
        types = [relax.TensorType(shape, dtype) for shape, dtype in results]
        made = self.builder.emit(relax.call_tir(self._kernels[key], operands, types))
        values = [made]
        if len(types) > 1:
            places = range(len(types))
            values = [self.builder.emit(relax.TupleGetItem(made, place)) for place in places]
        self._results[key].append((operands, values))
        return values

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Calls that are perhaps skipped: what they return is not used outside."""
        before = {key: list(found) for key, found in self._results.items()}
        try:
            yield
        finally:
            self._results = defaultdict(list, before)

    def constant(self, value: NDArray[np.generic]) -> Value:
        """Numbers that are part of the program; equal ones are the same constant."""
        value = np.asarray(value, order="C")
        content = (value.dtype.str, value.shape, sha256(value.data).digest())
        if content not in self._constants:
            self._constants[content] = relax.const(value)
        return self._constants[content]


# TVM's lowering also serves schedules with blocks, GPUs, and 16-bit and 8-bit floating point. Our
# kernels are written as loops that have none of these: such passes return the same code, after half
# to three quarters of the time of lowering the tests' networks.
_UNNEEDED = (
    "s_tir.CompactBufferAllocation",
    "s_tir.ConvertBlocksToOpaque",
    "s_tir.HoistIfThenElse",
    "s_tir.InferFragment",
    "s_tir.InjectDoubleBuffer",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.InjectVirtualThread",
    "s_tir.LiftThreadBinding",
    "s_tir.LoopPartition",
    "s_tir.LowerAutoCopy",
    "s_tir.LowerMatchBuffer",
    "s_tir.LowerThreadAllreduce",
    "s_tir.LowerVtcmAlloc",
    "s_tir.MergeSharedMemoryAllocations",
    "s_tir.PlanAndUpdateBufferAllocationLocation",
    "s_tir.ThreadSync",
    "s_tir.TransformMmaBufferLayout",
    "s_tir.UnifyThreadBinding",
    "tirx.BF16ComputeLegalize",
    "tirx.BF16StorageLegalize",
    "tirx.FP8ComputeLegalize",
    "tirx.UnrollLoop",
)


def compiling() -> tvm.transform.PassContext:
    """Where our kernels are compiled, without the passes that change nothing in them."""
    return tvm.transform.PassContext(opt_level=3, disabled_pass=list(_UNNEEDED))


def compile_kernels(kernels: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
    """Compile kernels that are called one by one, outside of TVM's virtual machine."""
    with compiling():
        return tvm.tirx.build(kernels, target=target)


def lowering() -> tvm.transform.Pass:
    """The passes from a module of kernels to one that the virtual machine runs.

    They plan memory and fuse nothing. TVM's default pipeline searches the kernels for reshapes, and
    its check fails on kernels without blocks ("func->body->IsInstance<SBlockRealizeNode>").
    """
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
