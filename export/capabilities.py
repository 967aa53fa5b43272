"""What the exporter must know of a target: whether eight-bit dot products are there, and whether it
is this machine. Read from its profile.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from ..core.errors import InputError
from ..targets.catalog import load_target
from ..targets.profile import TargetProfile

# As Linux names them in /proc/cpuinfo, and as profiles and compilers do.
DOT_PRODUCTS = frozenset(
    {"avx512_vnni", "avx512vnni", "avx_vnni", "avxvnni", "asimddp", "dotprod", "i8mm", "sdot"}
)
HALF = frozenset({"fp16", "fphp", "asimdhp", "fullfp16", "avx512_fp16", "avx512fp16"})
# Cores that ONNX Runtime serves without eight-bit dot products, for profiles that name the core and
# no feature.
WITHOUT = re.compile(r"cortex-a(5|7|8|9|15|17|35|53|57|72|73)\b", re.IGNORECASE)


def profile_of(target: str) -> TargetProfile | None:
    """The target's profile, or None for a name that only labels the artifact."""
    try:
        return load_target(target)
    except InputError:
        return None


def has_dot_products(target: str) -> bool | None:
    """Whether the processor multiplies eight-bit numbers four at a time; None where the profile
    does not tell.
    """
    profile = profile_of(target)
    if profile is None:
        return None
    features = {feature.lower().lstrip("+") for feature in profile.features}
    if features & DOT_PRODUCTS:
        return True
    if features or any(WITHOUT.search(cluster.core) for cluster in profile.clusters):
        return False
    return None


def int8_exact(target: str) -> bool:
    """Whether eight-bit weights can be used whole: x86 without VNNI adds pairs of products in 16
    bits and saturates, so it gets 7 bits.
    """
    profile = profile_of(target)
    return not (
        profile is not None
        and profile.architecture.lower().replace("-", "_") in ("x86_64", "amd64")
        and has_dot_products(target) is False
    )


def int8_warning(target: str) -> str | None:
    """What to tell about eight bits on a target without dot products."""
    if has_dot_products(target) is False:
        return f"{target} has no eight-bit dot products: int8 saves bytes here and may cost time; measure it against fp32 on the device"
    return None


def has_half(target: str) -> bool:
    """Whether the target computes in half precision."""
    profile = profile_of(target)
    return profile is not None and bool(
        {feature.lower().lstrip("+") for feature in profile.features} & HALF
    )


def wants_pairs(target: str) -> bool:
    """Whether eight bits are to be written as pairs around float products: for GPUs, whose
    providers (TensorRT) read these and no others. On the CPU the runtime's own products are 2.6
    times as fast as pairs (benchmarks/results/static_int8.md), and its arm64 build has kernels for
    them as well.
    """
    profile = profile_of(target)
    return profile is not None and (
        profile.kind == "gpu" or "cuda" in (profile.accelerator or "").lower()
    )


def is_host(target: str) -> bool:
    """Whether what is measured on this machine says something about the target."""
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
