"""A lowered Relax function as a static execution plan: which kernel runs on which memory.

TVM's virtual machine interprets the function at every inference, and needs a runtime on the device.
A function without control flow needs neither: its plan is compiled (`network_source`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tvm import IRModule

    from .build import TvmNetwork

ALIGNMENT_BYTES = 64
IGNORED = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
RESHAPE = "vm.builtin.reshape"


class NoExecutionPlan(Exception):
    """Why a function is more than a sequence of kernels, in one line."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in memory.

    Attributes:
        memory: What contains it; `logits` is the memory of all outputs.
        offset_bytes: Where it begins there.
        shape: Its shape.
        type: Its type, as TVM names it.
    """

    memory: Literal["images", "logits", "arena", "constant"]
    offset_bytes: int
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Step:
    """A call of a kernel; the last tensor is an output of it, the last one if there are several."""

    kernel: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Branches:
    """Which calls of a program with buckets run for which image.

    The first `ends[0]` calls run for every image; the last of them writes the place of the image's
    bucket. Those from `ends[b]` to `ends[b + 1]` run for the images of bucket b.

    Attributes:
        counts: Number of patches of each bucket, increasing.
        ends: Numbers of calls, one more than there are buckets.
        place: Where the place of the bucket is; None until the memory is planned.
    """

    counts: tuple[int, ...]
    ends: tuple[int, ...]
    place: Tensor | None = None


@dataclass(frozen=True)
class ExecutionPlan:
    """A network as a sequence of kernels.

    Attributes:
        kernels: The module of TIR functions.
        steps: Their calls.
        constants: In this order, each at the next multiple of 64 bytes.
        arena_bytes: Memory for the values between the kernels.
        target: Name of the target's profile.
        needs: The instruction sets that the kernels use.
        outputs: Name and place of each output.
        branches: Which steps run for which image, of a network with buckets.
    """

    kernels: IRModule
    steps: tuple[Step, ...]
    constants: tuple[NDArray[Any], ...]
    arena_bytes: int
    target: str
    needs: tuple[str, ...]
    outputs: tuple[tuple[str, Tensor], ...]
    branches: Branches | None = None


def execution_plan(network: TvmNetwork) -> ExecutionPlan:
    """Lower a network and read its function `main`.

    Raises:
        NoExecutionPlan: The function contains more than calls of kernels.
    """
    import tvm
    from tvm.tirx import PrimFunc

    with network.target, tvm.transform.PassContext(opt_level=3):
        lowered = network.pipeline(network.module)
    main = lowered["main"]
    if len(main.params) != 1:
        raise NoExecutionPlan(f"it takes {len(main.params)} inputs")
    reader = _Reader()
    images = main.params[0]
    shape = tuple(int(size) for size in images.ty.shape)
    reader.values[images] = Tensor("images", 0, shape, str(images.ty.dtype))
    for block in main.body.blocks:
        for binding in block.bindings:
            reader.read(binding.var, binding.value)
    branches = network.branches
    steps, outputs, place = reader.finish(main.body.body, branches=branches is not None)
    if branches is not None:
        if len(steps) != branches.ends[-1]:
            raise NoExecutionPlan(f"it makes {len(steps)} calls instead of {branches.ends[-1]}")
        branches = replace(branches, place=place)
    used = {step.kernel for step in steps}
    kernels = {
        variable: function
        for variable, function in lowered.functions.items()
        if isinstance(function, PrimFunc) and variable.name_hint in used
    }
    return ExecutionPlan(
        tvm.IRModule(kernels, attrs=lowered.attrs),
        steps,
        tuple(reader.constants),
        reader.arena_bytes,
        network.profile,
        network.needs,
        tuple(zip(network.outputs, outputs, strict=True)),
        branches,
    )


class _Reader:
    """Reads the bindings in order and tracks the memory of each value."""

    def __init__(self) -> None:
        self.values: dict[Any, Tensor] = {}
        self.storages: dict[Any, int] = {}
        self.tuples: dict[Any, list[Any]] = {}
        self.steps: list[Step] = []
        self.constants: list[NDArray[Any]] = []
        self._known: list[tuple[Any, Tensor]] = []
        self._constant_bytes = 0
        self.arena_bytes = 0

    def read(self, variable: Any, value: Any) -> None:
        """Read one binding."""
        from tvm import relax
        from tvm.ir import GlobalVar, Op

        if isinstance(value, relax.Var):
            self._alias(variable, value)
            return
        if isinstance(value, relax.Tuple):
            self.tuples[variable] = list(value.fields)
            return
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.tuples:
            self._alias(variable, self.tuples[value.tuple_value][value.index])
            return
        if not isinstance(value, relax.Call):
            raise NoExecutionPlan(f"it contains a {type(value).__name__}")
        operator, arguments = value.op, list(value.args)
        if isinstance(operator, GlobalVar):
            tensors = tuple(self._tensor(argument) for argument in arguments)
            self.steps.append(Step(operator.name_hint, tensors))
            return
        name = (
            operator.name
            if isinstance(operator, Op)
            else str(getattr(operator, "global_symbol", operator))
        )
        if name == "relax.call_packed":
            self._builtin(variable, str(arguments[0].global_symbol), arguments[1:])
        elif name == "relax.vm.alloc_storage":
            self.storages[variable] = self.arena_bytes
            sizes = [int(size) for size in arguments[0].values]
            self.arena_bytes += _round_up(int(np.prod(sizes or [1])))
        elif name == "relax.vm.alloc_tensor":
            storage, offset, shape, dtype = arguments[:4]
            self.values[variable] = Tensor(
                "arena",
                self.storages[storage] + int(getattr(offset, "value", offset)),
                tuple(int(size) for size in shape.values),
                str(dtype.value),
            )
        elif name not in ("relax.vm.kill_object", "relax.null_value"):
            self._builtin(variable, name, arguments)

    def _builtin(self, variable: Any, name: str, arguments: list[Any]) -> None:
        if name == RESHAPE:
            old = self._tensor(arguments[0])
            shape = tuple(int(size) for size in arguments[1].values)
            self.values[variable] = Tensor(old.memory, old.offset_bytes, shape, old.type)
        elif name not in IGNORED:
            raise NoExecutionPlan(f"it calls {name}")

    def _alias(self, variable: Any, value: Any) -> None:
        if value in self.values:
            self.values[variable] = self.values[value]
        elif value in self.storages:
            self.storages[variable] = self.storages[value]
        elif value in self.tuples:
            self.tuples[variable] = self.tuples[value]

    def _tensor(self, argument: Any) -> Tensor:
        if argument in self.values:
            return self.values[argument]
        value = getattr(argument, "value", None)
        if value is None or not hasattr(value, "shape"):
            raise NoExecutionPlan(f"a kernel gets a {type(argument).__name__}")
        for known, tensor in self._known:
            if known.same_as(value):
                return tensor
        array = np.ascontiguousarray(value.numpy())
        tensor = Tensor("constant", self._constant_bytes, tuple(array.shape), str(array.dtype))
        self._known.append((value, tensor))
        self.constants.append(array)
        self._constant_bytes += _round_up(array.nbytes)
        return tensor

    def finish(
        self, result: Any, *, branches: bool
    ) -> tuple[tuple[Step, ...], tuple[Tensor, ...], Tensor | None]:
        """The steps, and the outputs, which a step each writes into the memory of outputs.

        Each output begins at a multiple of 64 bytes.

        Args:
            result: What the function returns.
            branches: It returns the same output of several branches, then the place of a bucket.

        Returns:
            The steps, the outputs, and where the place of the bucket is.
        """
        fields = list(getattr(result, "fields", None) or self.tuples.get(result) or [result])
        place = self.values.get(fields.pop()) if branches else None
        if branches and (place is None or place.memory != "arena" or place.type != "int32"):
            raise NoExecutionPlan("it does not return the place of a bucket")
        places: dict[int, int] = {}
        outputs, end = [], 0
        for field in fields:
            found = self.values.get(field)
            if found is None or found.memory != "arena" or found.offset_bytes in places:
                raise NoExecutionPlan("it returns another value than its kernels' outputs")
            writers = [step for step in self.steps if step.tensors[-1].memory == "arena"]
            at = [step for step in writers if step.tensors[-1].offset_bytes == found.offset_bytes]
            if len(at) != 1 or found.type != "float32":
                raise NoExecutionPlan("what it returns is not the output of one of its kernels")
            start = 0 if branches else end
            places[found.offset_bytes] = start
            outputs.append(Tensor("logits", start, at[0].tensors[-1].shape, found.type))
            end += _round_up(int(np.prod(outputs[-1].shape)) * 4)
        if branches:
            outputs = list(dict.fromkeys(outputs))

        def moved(tensor: Tensor) -> Tensor:
            if tensor.memory != "arena" or tensor.offset_bytes not in places:
                return tensor
            return Tensor("logits", places[tensor.offset_bytes], tensor.shape, tensor.type)

        steps = tuple(
            Step(step.kernel, tuple(moved(tensor) for tensor in step.tensors))
            for step in self.steps
        )
        return steps, tuple(outputs), place


def _round_up(count: int) -> int:
    return -(-max(count, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
