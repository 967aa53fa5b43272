"""Whether this processor has the instruction sets that an artifact states in its manifest.

They are of two kinds: those that its code uses, without which it would end in an illegal
instruction, and those that its numbers assume, without which its outputs would be wrong. Names are
those of Linux (/proc/cpuinfo); of `a|b` one suffices.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

from .engine import EngineError, Json

# See vitrim.targets.instruction_sets.
CPU_FEATURES = "VITRIM_CPU_FEATURES"
_LINES = {"x86_64": "flags", "amd64": "flags", "aarch64": "Features", "arm64": "Features"}
# Targets from the largest on, and what distinguishes them from the next.
_X86_TARGETS = (
    ("x86-64-v4-vnni", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}),
    ("x86-64-v3", {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}),
    ("x86-64", {"sse4_1", "sse4_2", "ssse3", "popcnt"}),
)
_ARM_TARGETS = (("rpi5", {"asimddp", "asimdhp"}), ("rpi4", {"asimd"}))


def processor_features() -> set[str] | None:
    """The instruction sets of this processor, or None where the system does not report them."""
    line = _LINES.get(platform.machine().lower())
    found = None
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            for text in stream:
                if line and text.startswith(line):
                    found = set(text.partition(":")[2].split())
                    break
    except OSError:
        return None
    named = os.environ.get(CPU_FEATURES)
    if found is not None and named is not None:
        found &= set(named.replace(",", " ").split())
    return found


def missing_features(names: Iterable[str]) -> list[str]:
    """Those of the named instruction sets that this processor lacks; `a|b` needs one of both.

    Empty where the system does not report what the processor has.
    """
    have = processor_features()
    if have is None:
        return []
    return [name for name in names if have.isdisjoint(name.split("|"))]


def refusal(cpu: Json) -> str | None:
    """Why an artifact cannot run on this processor, in one line, or None.

    Args:
        cpu: {"target": name, "needs": [name], "assumes": [name]}.
    """
    target = str(cpu.get("target") or "its target")
    way_out = f"export it for --target {fitting_target()}, or with --target host on this machine"
    if missing := missing_features(cpu.get("needs") or ()):
        return (
            f"its code for {target} uses {_text(missing)}, which this processor does not have; "
            f"{way_out}"
        )
    if missing := missing_features(cpu.get("assumes") or ()):
        return (
            f"its eight-bit weights for {target} assume {_text(missing)}, and this processor has "
            f"none: its products would saturate and the outputs be wrong; {way_out}"
        )
    return None


def require_features(job: Json) -> None:
    """Raise EngineError where job["cpu"] states what this processor lacks."""
    reason = refusal(job.get("cpu") or {})
    if reason is not None:
        raise EngineError(f"{os.path.basename(str(job.get('model')))}: {reason}")


def fitting_target() -> str:
    """The largest generic target that this processor covers."""
    have = processor_features() or set()
    machine = platform.machine().lower()
    targets = _X86_TARGETS if machine in ("x86_64", "amd64") else _ARM_TARGETS
    return next((name for name, features in targets if features <= have), targets[-1][0])


def _text(names: list[str]) -> str:
    return ", ".join(name.replace("|", " or ") for name in names)
