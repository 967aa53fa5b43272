"""The machine that this program runs on, as a profile.

What the operating system does not report is absent; what is estimated is marked `unverified`.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from .instruction_sets import ARM, X86, machine_name, usable_features, x86_tvm_target
from .profile import UNVERIFIED, Cluster, Memory, Peak, TargetProfile, TvmTarget

# Single-precision multiply-adds a cycle and core: the widest vector with two units on x86 servers,
# one or two NEON units on ARM.
MACS_PER_CYCLE = (
    *(("avx512f", 32), ("avx2", 16), ("avx", 8), ("sse4_2", 4)),
    *(("asimddp", 8), ("asimd", 4)),
)
_FROM_SYSTEM = "read from the operating system"


def detect_host() -> TargetProfile:
    """The profile of this machine, named `host`."""
    cpuinfo = _cpuinfo()
    features = _features(cpuinfo)
    architecture = platform.machine()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    clock = _frequency_hz(cpuinfo)
    per_cycle = next((macs for name, macs in MACS_PER_CYCLE if name in features), 1)
    fast_int8 = any(name in features for name in ("avx512_vnni", "avx_vnni", "asimddp"))
    fp32 = cores * clock * per_cycle
    return TargetProfile(
        schema_="vitrim.target/1",
        name="host",
        title=f"this machine: {cpuinfo.get('model name') or architecture}, {cores} cores",
        vendor=cpuinfo.get("vendor_id", "unknown"),
        kind="cpu",
        architecture=architecture,
        triple=f"{architecture}-{platform.system().lower()}-gnu",
        features=features,
        preferred_runtime="onnxruntime",
        preferred_precision="int8" if fast_int8 else "fp32",
        round_to=16 if "avx512f" in features else 8 if "avx2" in features else 4,
        tvm_target=_tvm_target(architecture, features),
        clusters=(
            Cluster(
                core=cpuinfo.get("model name") or architecture, cores=cores, frequency_hz=clock
            ),
        ),
        memory=Memory(
            ram_bytes=_memory_bytes(), l1d_bytes=_cache(1), l2_bytes=_cache(2), l3_bytes=_cache(3)
        ),
        peak=Peak(fp32_macs_per_s=fp32, int8_macs_per_s=fp32 * 4 if fast_int8 else None),
        sources={
            "clusters": _FROM_SYSTEM,
            "memory": _FROM_SYSTEM,
            "peak": f"{UNVERIFIED}: cores x clock x vector width of the CPU's features",
        },
    )


def missing_features(profile: TargetProfile) -> list[str]:
    """The instruction sets of a profile that this processor lacks.

    Empty where the operating system reports none, and for a profile of another architecture.
    """
    have = _features(_cpuinfo())
    machine = machine_name(platform.machine())
    if not have or machine_name(profile.architecture) != machine:
        return []
    known = X86 if machine == "x86_64" else ARM
    return [name for name in profile.features if name in known and name not in have]


def _features(cpuinfo: dict[str, str]) -> tuple[str, ...]:
    return usable_features((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())


def _tvm_target(architecture: str, features: tuple[str, ...]) -> TvmTarget:
    if architecture == "x86_64":
        return x86_tvm_target(features)
    if architecture == "aarch64":
        attributes = [
            name
            for feature, name in (
                ("asimddp", "+dotprod"),
                ("asimdhp", "+fullfp16"),
                ("i8mm", "+i8mm"),
            )
            if feature in features
        ]
        return {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", *attributes]}
    return {"kind": "llvm"}


def _cpuinfo() -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _frequency_hz(cpuinfo: dict[str, str]) -> float:
    try:
        return (
            float(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) * 1000
        )
    except (OSError, ValueError):
        # A virtual machine shows only the present clock; 1 GHz is the floor where nothing is shown.
        return float(cpuinfo.get("cpu MHz", "1000")) * 1e6


def _memory_bytes() -> int:
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def _cache(level: int) -> int | None:
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (index / "level").read_text().strip() == str(level) and (
                index / "type"
            ).read_text().strip() in ("Data", "Unified"):
                size = re.match(r"(\d+)([KM]?)", (index / "size").read_text())
                if size:
                    return int(size[1]) * {"": 1, "K": 1024, "M": 1024**2}[size[2]]
        except OSError:
            continue
    return None
