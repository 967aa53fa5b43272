"""A lowered Relax function as a straight program: which kernel runs on which memory, known when it
is compiled.

TVM's virtual machine would find that out anew at every inference, and needs a runtime on the device
for it. A program without branches needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tvm import IRModule

    from .built import Built

ALIGNMENT_BYTES = 64
IGNORED = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
RESHAPE = "vm.builtin.reshape"


class NotStraight(Exception):
    """Why a function is more than a row of kernels, in one line."""


@dataclass(frozen=True)
class Tensor:
    """Where a value lies: in the images, the logits, the arena or among the constants, some bytes
    behind the beginning.
    """

    place: Literal["images", "logits", "arena", "constant"]
    offset_bytes: int
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Step:
    """A kernel and the tensors that it gets, the one that it writes last."""

    kernel: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Program:
    """kernels: the module of TIR functions. constants: each at the next multiple of 64 bytes, in
    this order.
    """

    kernels: IRModule
    steps: tuple[Step, ...]
    constants: tuple[NDArray[Any], ...]
    arena_bytes: int


def straight_program(built: Built) -> Program:
    """Lower a network and read its one function. Errors: NotStraight."""
    import tvm
    from tvm.tirx import PrimFunc

    with built.target, tvm.transform.PassContext(opt_level=3):
        lowered = built.pipeline(built.module)
    kernels = {
        variable: function
        for variable, function in lowered.functions.items()
        if isinstance(function, PrimFunc)
    }
    reading = _Reading()
    main = lowered["main"]
    if len(main.params) != 1:
        raise NotStraight(f"it takes {len(main.params)} inputs")
    images = reading.typed(main.params[0])
    reading.values[main.params[0]] = Tensor("images", 0, *images)
    for block in main.body.blocks:
        for binding in block.bindings:
            reading.read(binding.var, binding.value)
    steps = reading.finish(main.body.body)
    used = {step.kernel for step in steps}
    named = {
        variable: function for variable, function in kernels.items() if variable.name_hint in used
    }
    return Program(
        tvm.IRModule(named, attrs=lowered.attrs),
        steps,
        tuple(reading.constants),
        reading.arena_bytes,
    )


class _Reading:
    """Goes through the bindings in order and remembers what lies where."""

    def __init__(self) -> None:
        self.values: dict[Any, Tensor] = {}
        self.storages: dict[Any, int] = {}
        self.steps: list[Step] = []
        self.constants: list[NDArray[Any]] = []
        self._known: list[tuple[Any, Tensor]] = []
        self._constant_bytes = 0
        self.arena_bytes = 0

    @staticmethod
    def typed(variable: Any) -> tuple[tuple[int, ...], str]:
        return tuple(int(size) for size in variable.ty.shape), str(variable.ty.dtype)

    def read(self, variable: Any, value: Any) -> None:
        from tvm import relax
        from tvm.ir import GlobalVar, Op

        if isinstance(value, relax.Var):
            self._alias(variable, value)
            return
        if not isinstance(value, relax.Call):
            raise NotStraight(f"it holds a {type(value).__name__}")
        if isinstance(value.op, GlobalVar):
            self.steps.append(
                Step(value.op.name_hint, tuple(self._tensor(argument) for argument in value.args))
            )
            return
        name = (
            value.op.name
            if isinstance(value.op, Op)
            else str(getattr(value.op, "global_symbol", value.op))
        )
        if name == "relax.call_packed":
            self._builtin(variable, str(value.args[0].global_symbol), list(value.args[1:]))
        elif name == "relax.vm.alloc_storage":
            self.storages[variable] = self.arena_bytes
            self.arena_bytes += _round_up(
                int(np.prod([int(size) for size in value.args[0].values] or [1]))
            )
        elif name == "relax.vm.alloc_tensor":
            shape = tuple(int(size) for size in value.args[2].values)
            self.values[variable] = Tensor(
                "arena",
                self.storages[value.args[0]] + _number(value.args[1]),
                shape,
                str(value.args[3].value),
            )
        elif name not in ("relax.vm.kill_object", "relax.null_value"):
            self._builtin(variable, name, list(value.args))

    def _builtin(self, variable: Any, name: str, arguments: list[Any]) -> None:
        if name == RESHAPE:
            old = self._tensor(arguments[0])
            self.values[variable] = Tensor(
                old.place,
                old.offset_bytes,
                tuple(int(size) for size in arguments[1].values),
                old.type,
            )
        elif name not in IGNORED:
            raise NotStraight(f"it calls {name}")

    def _alias(self, variable: Any, value: Any) -> None:
        if value in self.values:
            self.values[variable] = self.values[value]
        elif value in self.storages:
            self.storages[variable] = self.storages[value]

    def _tensor(self, argument: Any) -> Tensor:
        if argument in self.values:
            return self.values[argument]
        value = getattr(argument, "value", None)
        if value is None or not hasattr(value, "shape"):
            raise NotStraight(f"a kernel gets a {type(argument).__name__}")
        for known, tensor in self._known:
            if known.same_as(value):
                return tensor
        array = np.ascontiguousarray(value.numpy())
        tensor = Tensor("constant", self._constant_bytes, tuple(array.shape), str(array.dtype))
        self._known.append((value, tensor))
        self.constants.append(array)
        self._constant_bytes += _round_up(array.nbytes)
        return tensor

    def finish(self, result: Any) -> tuple[Step, ...]:
        """The steps, with what is returned lying in the logits."""
        found = self.values.get(result)
        if found is None or found.place != "arena":
            raise NotStraight("it returns something else than what its last kernel wrote")
        out = Tensor("logits", 0, found.shape, found.type)
        last = self.steps[-1]
        if last.tensors[-1].offset_bytes != found.offset_bytes:
            raise NotStraight("what it returns is not what its last kernel wrote")
        moved = Tensor("logits", 0, last.tensors[-1].shape, found.type)
        return (
            *self.steps[:-1],
            Step(last.kernel, (*last.tensors[:-1], moved if moved.shape != out.shape else out)),
        )


def _round_up(count: int) -> int:
    return -(-max(count, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))
