"""The machine of a roofline: its rates with a number of threads at a precision."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import InputError
from ...targets.profile import Precision, TargetProfile

BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Machine:
    """A machine with a number of threads at a precision; rates are the sum over the threads.

    Attributes:
        device: Name of the device, the same for all of its settings.
        architecture: Architecture of the processor.
        threads: Number of threads.
        precision: Precision of the weights.
        clock_hz: Clock in Hz.
        peak_macs_per_s: Multiply-adds per second of products with weights.
        float_macs_per_s: Multiply-adds per second of attention products, which stay in floating
            point where weights are int8.
        vector_numbers_per_s: Numbers per second that vector instructions process.
        bandwidth_bytes_per_s: Memory bandwidth; None where it is unknown.
        last_cache_bytes: Weights that fit in it are not read from memory at each inference.
    """

    device: str
    architecture: str
    threads: int
    precision: Precision
    clock_hz: float
    peak_macs_per_s: float
    float_macs_per_s: float
    vector_numbers_per_s: float
    bandwidth_bytes_per_s: float | None = None
    last_cache_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return BYTES[self.precision]


def machine_of(profile: TargetProfile, precision: Precision, threads: int | None = None) -> Machine:
    """Return a profile's CPU with `threads` threads, by default every core of its first cluster.

    A CPU without a rate for a precision is given that of the next wider one. Raises InputError for
    a profile without a peak, and for more threads than cores.
    """
    first = profile.clusters[0]
    threads = first.cores if threads is None else threads
    if threads < 1 or threads > profile.cores:
        raise InputError(
            f"{profile.name}: {threads} threads, but the profile has {profile.cores} cores; "
            f"give 1 to {profile.cores}"
        )
    effective = precision
    peak = profile.peak.of(precision)
    if peak is None and profile.peak.fp32_macs_per_s is not None:
        effective, peak = ("int8" if precision == "int8" else "fp32"), profile.peak.fp32_macs_per_s
    if peak is None:
        raise InputError(
            f"{profile.name}: its profile states no {precision} peak, so no time can be estimated; "
            f"add peak.{precision}_macs_per_s"
        )
    # The profile's peak is that of its first cluster; slower cores add little to a runtime that
    # splits work evenly.
    used = min(threads, first.cores)
    float_peak = peak if effective != "int8" else profile.peak.fp32_macs_per_s or peak
    caches = (profile.memory.l3_bytes, profile.memory.l2_bytes)
    return Machine(
        device=profile.name,
        architecture=profile.architecture,
        threads=threads,
        precision=effective,
        clock_hz=first.frequency_hz,
        peak_macs_per_s=peak * used / first.cores,
        float_macs_per_s=float_peak * used / first.cores,
        vector_numbers_per_s=used * first.frequency_hz * profile.vector.lanes,
        bandwidth_bytes_per_s=profile.memory.bandwidth_bytes_per_s,
        last_cache_bytes=next((size for size in caches if size), 0),
    )
