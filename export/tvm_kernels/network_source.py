"""A straight program as C++ tables and a file of its constants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled_program import ALIGNMENT_BYTES, Program, Tensor

CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}


def constant_bytes(constants: Sequence[NDArray[Any]]) -> bytes:
    """All constants in order, each at a multiple of 64 bytes."""
    parts = []
    for array in constants:
        parts += [array.tobytes(), bytes(-array.nbytes % ALIGNMENT_BYTES)]
    # An empty file cannot be included by an assembler.
    return b"".join(parts) or bytes(ALIGNMENT_BYTES)


def network_source(program: Program, constants: str, digest: str) -> str:
    """`network.cpp`. constants: the name of the file of constants, as the assembler finds it;
    digest: its SHA-256.
    """
    tensors: dict[Tensor, int] = {}
    numbers: list[int] = []
    steps = []
    for step in program.steps:
        steps.append(
            f'    {{"{step.kernel}", __tvm_ffi_{step.kernel}, {len(numbers)}, {len(step.tensors)}}},'
        )
        numbers += [tensors.setdefault(tensor, len(tensors)) for tensor in step.tensors]
    shapes: dict[tuple[int, ...], int] = {}
    flat: list[int] = []
    rows, plan = [], []
    for tensor in tensors:
        code, bits = _type(tensor.type)
        places = []
        for sizes in (tensor.shape, _strides(tensor.shape)):
            if sizes not in shapes:
                shapes[sizes] = len(flat)
                flat += sizes or (0,)
            places.append(f"sizes + {shapes[sizes]}")
        rows.append(
            f"    {{nullptr, kCpu, 0, {len(tensor.shape)}, {code}, {bits}, 1, {places[0]}, {places[1]}, 0}},"
        )
        plan.append(f"    {{Place::{tensor.place}, {tensor.offset_bytes}}},")
    images = next(tensor for tensor in tensors if tensor.place == "images")
    logits = next(tensor for tensor in tensors if tensor.place == "logits")
    kernels = "\n".join(
        f"int __tvm_ffi_{name}(void *, const vitrim::Value *, int32_t, vitrim::Value *);"
        for name in sorted({step.kernel for step in program.steps})
    )
    # Compilers that keep what they built (zig 0.17 does) see the source and not what its assembly
    # includes: other weights must be another source.
    return f"""// Written by vitrim from the network; do not edit. SHA-256 of {constants}: {digest}
#include "compiled_network.h"

extern "C" {{
{kernels}
extern const unsigned char vitrim_constants[] __attribute__((visibility("hidden")));
}}
// Weights lie in the program as they are used: mapped, never copied, shared between processes.
__asm__(
    ".pushsection .rodata.vitrim_constants,\\"a\\"\\n"
    ".balign 64\\n"
    ".globl vitrim_constants\\n"
    ".hidden vitrim_constants\\n"
    "vitrim_constants:\\n"
    ".incbin \\"{constants}\\"\\n"
    ".popsection\\n");

namespace vitrim {{

constexpr int kSteps = {len(program.steps)}, kOperands = {len(numbers)}, kTensors = {len(tensors)};
alignas(64) static unsigned char arena[{max(program.arena_bytes, ALIGNMENT_BYTES)}];
alignas(64) static float aligned_images[{int(np.prod(images.shape))}];
alignas(64) static float aligned_logits[{int(np.prod(logits.shape))}];
static int64_t sizes[] = {{{", ".join(map(str, flat))}}};
static Tensor tensors[kTensors] = {{
{chr(10).join(rows)}
}};
static const Planned plan[kTensors] = {{
{chr(10).join(plan)}
}};
static const int numbers[kOperands] = {{{", ".join(map(str, numbers))}}};
static Value operands[kOperands];
static const Step steps[kSteps] = {{
{chr(10).join(steps)}
}};
inline const unsigned char *constants() {{ return vitrim_constants; }}

}}  // namespace vitrim

#include "network_entries.h"
"""


def write_network(
    program: Program, folder: Path, constants: str = "constants.bin"
) -> tuple[Path, Path]:
    """Write `network.cpp` and `constants.bin`."""
    source, data = folder / "network.cpp", folder / constants
    numbers = constant_bytes(program.constants)
    data.write_bytes(numbers)
    source.write_text(
        network_source(program, constants, hashlib.sha256(numbers).hexdigest()), encoding="ascii"
    )
    return source, data


def _type(name: str) -> tuple[int, int]:
    if name == "bool":
        return CODES["bool"], 8
    kind = name.rstrip("0123456789")
    return CODES[kind], int(name[len(kind) :])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    found: list[int] = []
    step = 1
    for size in reversed(shape):
        found.append(step)
        step *= size
    return tuple(reversed(found))
