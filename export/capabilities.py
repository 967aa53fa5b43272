"""Properties of a target that decide how it is exported for, read from its device profile."""

from __future__ import annotations

import re

from ..runtimes.cpu_features import fitting_target, missing_features
from ..targets.catalog import load_target, of_this_architecture
from ..targets.detect import detect_host
from ..targets.instruction_sets import EXACT_PRODUCTS, known_features, machine_name
from ..targets.profile import TargetProfile

# The precisions whose products are of eight bits.
EIGHT_BITS = ("int8", "int8-static")
# The names that Linux (/proc/cpuinfo), profiles and compilers use.
DOT_PRODUCTS = frozenset(
    {"avx512_vnni", "avx512vnni", "avx_vnni", "avxvnni", "asimddp", "dotprod", "i8mm", "sdot"}
)
HALF = frozenset({"fp16", "fphp", "asimdhp", "fullfp16", "avx512_fp16", "avx512fp16"})
# Cores without eight-bit dot products, for profiles that name the core and no feature.
CORES_WITHOUT_DOT_PRODUCTS = re.compile(r"cortex-a(5|7|8|9|15|17|35|53|57|72|73)\b", re.IGNORECASE)
# Instruction sets for which runtimes have kernels of their own.
_KERNELS = frozenset(
    {
        *("avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"),
        *("avx512_fp16", "amx_int8", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    }
)


def has_dot_products(target: str) -> bool | None:
    """Return whether the processor has eight-bit dot products, or None where that is unknown."""
    profile = load_target(target)
    if _features(profile) & DOT_PRODUCTS:
        return True
    if profile.features or any(
        CORES_WITHOUT_DOT_PRODUCTS.search(cluster.core) for cluster in profile.clusters
    ):
        return False
    return None


def int8_exact(target: str) -> bool:
    """Return whether weights can have all eight bits.

    x86 without VNNI adds pairs of products in 16 bits and saturates, so its weights have 7 bits.
    """
    return not _is_x86(load_target(target)) or has_dot_products(target) is True


def int8_assumptions(target: str) -> tuple[str, ...]:
    """Return the instruction sets without which weights of the target's width saturate."""
    return (EXACT_PRODUCTS,) if _is_x86(load_target(target)) and int8_exact(target) else ()


def int8_saturates_here(target: str) -> str | None:
    """Return why this processor cannot compute the target's eight-bit products, or None."""
    if of_this_architecture(load_target(target)):
        return lacks_int8_features(target)
    if not int8_exact(target) or int8_exact("host"):
        return None
    return (
        f"eight-bit products saturate on this processor, and not on {target}; verify the artifact "
        "under emulation (vitrim targets emulate) or on the device (--verify-on)"
    )


def lacks_int8_features(target: str) -> str | None:
    """Return why a target of this architecture is of a processor with other products, or None."""
    if not of_this_architecture(load_target(target)):
        return None
    if not (missing := missing_features(int8_assumptions(target))):
        return None
    names = missing[0].replace("|", " or ")
    return (
        f"this processor has no {names}, so the whole eight-bit weights of {target} saturate here; "
        f"use target {fitting_target()} or host for a processor like this one"
    )


def int8_warning(target: str) -> str | None:
    """Return a note about eight bits on a target without dot products, or None."""
    if has_dot_products(target) is False:
        return (
            f"{target} has no eight-bit dot products: int8 saves bytes here and may cost time; "
            "measure it against fp32 on the device"
        )
    return None


def has_half(target: str) -> bool:
    """Return whether the target computes in half precision."""
    return bool(_features(load_target(target)) & HALF)


def needs_qdq_pairs(target: str) -> bool:
    """Return whether static eight bits must be pairs around float products.

    GPU providers (TensorRT) read only these. On CPUs the runtime's own products are 2.6 times as
    fast as pairs (benchmarks/results/static_int8.md), and its arm64 build has kernels for them as
    well.
    """
    profile = load_target(target)
    return profile.kind == "gpu" or "cuda" in (profile.accelerator or "").lower()


def is_host(target: str) -> bool:
    """Return whether measurements on this machine are valid for the target."""
    if target == "host":
        return True
    profile = load_target(target)
    # A profile without instruction sets describes the machine of its author.
    return of_this_architecture(profile) and (
        not profile.features or other_processor(profile) is None
    )


def other_processor(profile: TargetProfile) -> str | None:
    """Return how this processor differs from a profile of its architecture, or None.

    It differs where runtimes choose other kernels: it lacks an instruction set, or its vectors or
    eight-bit products are others.
    """
    host = detect_host()
    here, there = set(host.features) & _KERNELS, _features(profile) & _KERNELS
    order = known_features().index
    if lacking := sorted(there - here, key=order):
        return f"has no {', '.join(lacking)}"
    unit, wanted = host.vector, profile.vector
    if (unit.kind, unit.int8_dot) == (wanted.kind, wanted.int8_dot):
        return None
    return f"has {', '.join(sorted(here - there, key=order))}"


def _features(profile: TargetProfile) -> set[str]:
    return {feature.lower().lstrip("+") for feature in profile.features}


def _is_x86(profile: TargetProfile) -> bool:
    return machine_name(profile.architecture) == "x86_64"
