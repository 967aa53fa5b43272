"""Instruction sets: the names of Linux (/proc/cpuinfo) and LLVM, the levels of x86-64.

`CPU_FEATURES` is an environment variable with the instruction sets that this machine is taken to
have, such as "avx2 fma": those that it has and that the variable does not name are not used. Tests
check code for smaller processors with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

CPU_FEATURES = "VITRIM_CPU_FEATURES"
# The check of C++ programs.
HEADER = Path(__file__).with_name("cpu_features.h")
# Linux's name -> LLVM's, for what compilers generate on their own.
X86: Mapping[str, str] = {
    "pni": "sse3",
    "ssse3": "ssse3",
    "cx16": "cx16",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "abm": "lzcnt",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx_vnni": "avxvnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "amx_int8": "amx-int8",
}
ARM: Mapping[str, str] = {
    "asimd": "neon",
    "asimdhp": "fullfp16",
    "asimdrdm": "rdm",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
# Without one of them, x86 adds pairs of eight-bit products in 16 bits and saturates.
EXACT_PRODUCTS = "avx512_vnni|avx_vnni"
_V2 = ("pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# LLVM's name of a core, and what its code uses; the first one that a processor covers is chosen.
X86_CORES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cascadelake", (*_V4, "avx512_vnni")),
    ("skylake-avx512", _V4),
    ("haswell", _V3),
    ("sandybridge", (*_V2, "avx")),
    ("x86-64-v2", _V2),
)

# Kernels use none of them.
_NOT_IN_KERNELS = ("avx512_bf16", "avx512_fp16", "amx_int8")
_MACHINES = {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}


def machine_name(architecture: str) -> str:
    """Linux's name of an architecture: amd64 -> x86_64."""
    return _MACHINES.get(architecture.lower(), architecture.lower())


def known_features() -> tuple[str, ...]:
    """The instruction sets that profiles and artifacts state, by Linux's names."""
    return (*X86, *ARM)


def usable_features(reported: Iterable[str]) -> tuple[str, ...]:
    """The known ones of the instruction sets that an operating system reports.

    The variable CPU_FEATURES can only leave some out.
    """
    named = os.environ.get(CPU_FEATURES)
    have = set(reported)
    if named is not None:
        have &= set(named.replace(",", " ").split())
    return tuple(name for name in known_features() if name in have)


def x86_tvm_target(features: Iterable[str]) -> dict[str, str | int | list[str]]:
    """LLVM's core for a processor with these instruction sets.

    Sets that the core's name does not include are listed, and the code uses none that the processor
    lacks.
    """
    have = [name for name in features if name in X86]
    core, included = next(
        (entry for entry in X86_CORES if set(entry[1]) <= set(have)), ("x86-64", ())
    )
    target: dict[str, str | int | list[str]] = {"kind": "llvm", "mcpu": core}
    unused = {"avx_vnni" if "avx512_vnni" in have else "", *_NOT_IN_KERNELS}
    if more := [f"+{X86[name]}" for name in have if name not in (*included, *unused)]:
        target["mattr"] = more
    return target
