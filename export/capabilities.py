"""Properties of a target that decide how it is exported for, read from its device profile."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from ..core.errors import InputError
from ..targets.catalog import load_target
from ..targets.profile import TargetProfile

# The names that Linux (/proc/cpuinfo), profiles and compilers use.
DOT_PRODUCTS = frozenset(
    {"avx512_vnni", "avx512vnni", "avx_vnni", "avxvnni", "asimddp", "dotprod", "i8mm", "sdot"}
)
HALF = frozenset({"fp16", "fphp", "asimdhp", "fullfp16", "avx512_fp16", "avx512fp16"})
# Cores without eight-bit dot products, for profiles that name the core and no feature.
CORES_WITHOUT_DOT_PRODUCTS = re.compile(r"cortex-a(5|7|8|9|15|17|35|53|57|72|73)\b", re.IGNORECASE)


def profile_of(target: str) -> TargetProfile | None:
    """Return the target's profile, or None for a name that only labels the artifact."""
    try:
        return load_target(target)
    except InputError:
        return None


def has_dot_products(target: str) -> bool | None:
    """Return whether the processor has eight-bit dot products, or None where that is unknown."""
    profile = profile_of(target)
    if profile is None:
        return None
    features = {feature.lower().lstrip("+") for feature in profile.features}
    if features & DOT_PRODUCTS:
        return True
    if features or any(
        CORES_WITHOUT_DOT_PRODUCTS.search(cluster.core) for cluster in profile.clusters
    ):
        return False
    return None


def int8_exact(target: str) -> bool:
    """Return whether weights can have all eight bits.

    x86 without VNNI adds pairs of products in 16 bits and saturates, so its weights have 7 bits.
    """
    profile = profile_of(target)
    return not (
        profile is not None
        and profile.architecture.lower().replace("-", "_") in ("x86_64", "amd64")
        and has_dot_products(target) is False
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
    profile = profile_of(target)
    return profile is not None and bool(
        {feature.lower().lstrip("+") for feature in profile.features} & HALF
    )


def needs_qdq_pairs(target: str) -> bool:
    """Return whether static eight bits must be pairs around float products.

    GPU providers (TensorRT) read only these. On CPUs the runtime's own products are 2.6 times as
    fast as pairs (benchmarks/results/static_int8.md), and its arm64 build has kernels for them as
    well.
    """
    profile = profile_of(target)
    return profile is not None and (
        profile.kind == "gpu" or "cuda" in (profile.accelerator or "").lower()
    )


def is_host(target: str) -> bool:
    """Return whether measurements on this machine are valid for the target."""
    if target == "host":
        return True
    machine = platform.machine().lower()
    same = {"x86_64": {"x86-64", "x86_64", "amd64"}, "aarch64": {"aarch64", "arm64"}}.get(
        machine, {machine}
    )
    if target.lower() in same:
        return True
    return (
        Path(target).suffix == ".toml"
        and (profile := profile_of(target)) is not None
        and profile.architecture.lower() in same
    )
