"""An execution plan as C++ tables, and a file of its constants.

`bundle_sources/tvm` contains the code that the tables are compiled with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .execution_plan import ALIGNMENT_BYTES, ExecutionPlan, Tensor

# DLPack's numbers of types.
_TYPE_CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}


def write_source(
    plan: ExecutionPlan, folder: Path, constants: str = "constants.bin"
) -> tuple[Path, Path]:
    """Write `network.cpp` and the file of constants; returns their paths."""
    source, data = folder / "network.cpp", folder / constants
    numbers = constant_bytes(plan.constants)
    data.write_bytes(numbers)
    digest = hashlib.sha256(numbers).hexdigest()
    source.write_text(network_source(plan, constants, digest), encoding="ascii")
    return source, data


def constant_bytes(constants: Sequence[NDArray[Any]]) -> bytes:
    """All constants in order, each at a multiple of 64 bytes."""
    parts = []
    for array in constants:
        parts += [array.tobytes(), bytes(-array.nbytes % ALIGNMENT_BYTES)]
    # An assembler does not include an empty file.
    return b"".join(parts) or bytes(ALIGNMENT_BYTES)


def network_source(plan: ExecutionPlan, constants: str, digest: str) -> str:
    """The content of `network.cpp`.

    Args:
        plan: The plan.
        constants: The name of the file of constants, as the assembler finds it.
        digest: The SHA-256 of that file. Compilers with a cache (zig 0.17) do not see the files
            that assembly includes; with the digest other weights are another source.
    """
    return f"""{_head(plan, constants, digest)}
namespace vitrim {{

{_tables(plan)}
inline const unsigned char *constants() {{ return vitrim_constants; }}

}}  // namespace vitrim

#include "network_entries.h"
"""


def _head(plan: ExecutionPlan, constants: str, digest: str) -> str:
    """The declarations of the kernels, and the constants."""
    kernels = "\n".join(
        f"int __tvm_ffi_{name}(void *, const vitrim::Value *, int32_t, vitrim::Value *);"
        for name in sorted({step.kernel for step in plan.steps})
    )
    return f"""// Written by vitrim from the network; do not edit. SHA-256 of {constants}: {digest}
#include "compiled_network.h"

extern "C" {{
{kernels}
extern const unsigned char vitrim_constants[] __attribute__((visibility("hidden")));
}}
// Weights are part of the program in the order of their use: mapped, never copied, and shared
// between processes.
__asm__(
    ".pushsection .rodata.vitrim_constants,\\"a\\"\\n"
    ".balign 64\\n"
    ".globl vitrim_constants\\n"
    ".hidden vitrim_constants\\n"
    "vitrim_constants:\\n"
    ".incbin \\"{constants}\\"\\n"
    ".popsection\\n");
"""


def _tables(plan: ExecutionPlan) -> str:
    """The arena, and the tables of tensors, operands and steps."""
    tensors: dict[Tensor, int] = {}
    numbers: list[int] = []
    steps = []
    for step in plan.steps:
        name, first, count = step.kernel, len(numbers), len(step.tensors)
        steps.append(f'    {{"{name}", __tvm_ffi_{name}, {first}, {count}}},')
        numbers += [tensors.setdefault(tensor, len(tensors)) for tensor in step.tensors]
    sizes, rows = _tensor_rows(list(tensors))
    planned = [f"    {{Place::{tensor.memory}, {tensor.offset_bytes}}}," for tensor in tensors]
    images = next(tensor for tensor in tensors if tensor.memory == "images")
    outputs = [
        (name, tensor.offset_bytes // 4, int(np.prod(tensor.shape)))
        for name, tensor in plan.outputs
    ]
    listed = ", ".join(f'{{"{name}", {first}, {size}}}' for name, first, size in outputs)
    _, start, last = outputs[-1]
    branches = plan.branches
    ends = (len(steps),) if branches is None else branches.ends
    patches = () if branches is None else branches.counts
    place = 0 if branches is None or branches.place is None else branches.place.offset_bytes
    counts = (
        f"kSteps = {len(steps)}, kOperands = {len(numbers)}, kTensors = {len(tensors)}, "
        f"kOutputs = {len(outputs)}, kBuckets = {len(patches)}"
    )
    new_line = "\n"
    return f"""constexpr const char *kTarget = "{plan.target}";
constexpr const char *kNeeds = "{" ".join(plan.needs)}";
constexpr int {counts};
alignas(64) static unsigned char arena[{max(plan.arena_bytes, ALIGNMENT_BYTES)}];
alignas(64) static float aligned_images[{int(np.prod(images.shape))}];
alignas(64) static float aligned_logits[{start + last}];
static const Output outputs[kOutputs] = {{{listed}}};
static int64_t sizes[] = {{{", ".join(map(str, sizes))}}};
static Tensor tensors[kTensors] = {{
{new_line.join(rows)}
}};
static const Planned plan[kTensors] = {{
{new_line.join(planned)}
}};
static const int numbers[kOperands] = {{{", ".join(map(str, numbers))}}};
static Value operands[kOperands];
// Steps up to the first end run for every image; then those up to the end of its bucket. The place
// of the bucket is in the arena.
static const int bucket_ends[kBuckets + 1] = {{{", ".join(map(str, ends))}}};
static const int bucket_patches[kBuckets + 1] = {{{", ".join(map(str, (*patches, 0)))}}};
constexpr uint64_t kBucketPlace = {place};
static const Step steps[kSteps] = {{
{new_line.join(steps)}
}};"""


def _tensor_rows(tensors: list[Tensor]) -> tuple[list[int], list[str]]:
    """Shapes and strides of all tensors, flat, and a row of the table for each tensor."""
    positions: dict[tuple[int, ...], int] = {}
    flat: list[int] = []
    rows = []
    for tensor in tensors:
        code, bits = _type(tensor.type)
        pointers = []
        for sizes in (tensor.shape, _strides(tensor.shape)):
            if sizes not in positions:
                positions[sizes] = len(flat)
                flat += sizes or (0,)
            pointers.append(f"sizes + {positions[sizes]}")
        fields = f"{len(tensor.shape)}, {code}, {bits}, 1, {', '.join(pointers)}, 0"
        rows.append(f"    {{nullptr, kCpu, 0, {fields}}},")
    return flat, rows


def _type(name: str) -> tuple[int, int]:
    """(DLPack's number, bits) of a type."""
    if name == "bool":
        return _TYPE_CODES["bool"], 8
    kind = name.rstrip("0123456789")
    return _TYPE_CODES[kind], int(name[len(kind) :])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    found: list[int] = []
    stride = 1
    for size in reversed(shape):
        found.append(stride)
        stride *= size
    return tuple(reversed(found))
