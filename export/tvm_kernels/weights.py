"""Large weights in a separate file, for networks in TVM's virtual machine.

TVM stores weights in the shared library as one serialised blob and unpacks it at start-up: a device
then holds them four times for a moment, and twice afterwards. A file that is mapped into memory
holds them once, shared between processes, and the system drops its pages when memory is short.

`weights.bin` is one line of JSON (`vitrim.weights/1`: a list of {"shape", "type", "offset",
"bytes"}), padded with spaces to a multiple of 64 bytes; then the tensors, each at a multiple of 64,
in the order in which `main` takes them after the images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tvm import IRModule

SCHEMA = "vitrim.weights/1"
FILE = "weights.bin"
ALIGNMENT_BYTES = 64
# Each argument of `main` costs a check of some tenths of a microsecond in every inference, which
# smaller weights do not repay.
LEAST_TENSOR_BYTES = 64 * 1024
LEAST_BYTES = 4 * 1024 * 1024


def lift_weights(
    module: IRModule,
    *,
    least_tensor_bytes: int = LEAST_TENSOR_BYTES,
    least_bytes: int = LEAST_BYTES,
) -> tuple[IRModule, list[NDArray[Any]]]:
    """Turn the large constants of `main` into parameters.

    The pipeline no longer folds constants into lifted weights, so fold them before.

    Args:
        module: A Relax module.
        least_tensor_bytes: Smaller constants stay.
        least_bytes: If all lifted constants together are smaller, they stay too.

    Returns:
        The new module and the values of its parameters in order, or the same module and no values.
    """
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    main = module["main"]
    found: list[tuple[Any, Any]] = []

    @mutator  # type: ignore[untyped-decorator, unused-ignore]
    class Lift(PyExprMutator):  # type: ignore[misc, unused-ignore]
        def visit_generic_const_(self, op: Any) -> Any:
            if not hasattr(op.value, "shape"):
                return op
            shape = [int(size) for size in op.value.shape]
            count = int(np.prod(shape))
            if count * np.dtype(str(op.value.dtype)).itemsize < least_tensor_bytes:
                return op
            for constant, variable in found:
                if constant.value.same_as(op.value):
                    return variable
            variable = relax.Var(f"weight_{len(found)}", op.ty)
            found.append((op, variable))
            return variable

    lift = Lift(module)
    body = lift.visit_expr(main.body)
    arrays = [np.ascontiguousarray(constant.value.numpy()) for constant, _ in found]
    if sum(array.nbytes for array in arrays) < least_bytes or not arrays:
        return module, []
    builder = lift.builder_
    function = relax.Function(
        [*main.params, *(variable for _, variable in found)],
        body,
        main.ret_ty,
        attrs=main.attrs,
    )
    builder.update_func(module.get_global_var("main"), function)
    return builder.get(), arrays


def save_weights(arrays: list[NDArray[Any]], path: Path) -> None:
    """Write arrays into a `weights.bin`."""
    rows, offset = [], 0
    for array in arrays:
        rows.append(
            {
                "shape": list(array.shape),
                "type": str(array.dtype),
                "offset": offset,
                "bytes": array.nbytes,
            }
        )
        offset += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    head = json.dumps({"schema": SCHEMA, "tensors": rows}, separators=(",", ":")).encode()
    head += b" " * (-(len(head) + 1) % ALIGNMENT_BYTES) + b"\n"
    with path.open("wb") as stream:
        stream.write(head)
        for array in arrays:
            stream.write(array.tobytes())
            stream.write(bytes(-array.nbytes % ALIGNMENT_BYTES))
