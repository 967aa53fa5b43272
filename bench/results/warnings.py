"""Every warning that a measurement can carry: what was observed, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from .measurement import NOT_LATENCY, Measurement

BUSY_CORES = 0.5
FEWEST_SAMPLES = 50
FEWEST_ROUNDS = 10
SPREAD = 0.25
CPU_SHARE = 0.9
STOLEN_SHARE = 0.02
FREQUENCY_SHARE = 0.95
IDLE_GOVERNORS = ("powersave", "ondemand", "conservative", "schedutil")


def warnings_for(
    measured: Measurement, *, stopped_by: str = "precise", half_width: float | None = None
) -> tuple[str, ...]:
    """Return the warnings for a measurement.

    Args:
        measured: The measurement.
        stopped_by: What ended its rounds: "precise", "time" or "rounds".
        half_width: The requested relative half width of the interval.
    """
    if measured.emulated:
        # Emulated times have no meaning, so their precision needs no warning.
        return (*_emulator(measured), *_provider(measured))
    return (*_machine(measured), *_provider(measured), *_samples(measured, stopped_by, half_width))


def _emulator(measured: Measurement) -> Iterator[str]:
    yield (
        f"emulated by {measured.environment.emulator}, {NOT_LATENCY}; "
        "take only outputs, top-1 and counts from this run"
    )


def _machine(measured: Measurement) -> Iterator[str]:
    where = measured.environment
    busy = max(
        (value for value in (where.busy_cores_before, where.busy_cores_after) if value is not None),
        default=0.0,
    )
    if busy > BUSY_CORES:
        yield (
            f"the machine was busy with other work ({busy:.1f} of {where.cores or '?'} cores): "
            "times are longer than on a quiet machine; stop the other work and measure again, or "
            "trust only ratios of interleaved artifacts"
        )
    if where.virtual_machine:
        yield (
            f"a virtual machine ({where.virtual_machine}): others may share its cores; "
            "measure on the device itself for absolute times, and take ratios from interleaved runs"
        )
    if where.stolen_share is not None and where.stolen_share > STOLEN_SHARE:
        yield (
            f"the hypervisor gave {100 * where.stolen_share:.0f} % of the time to other machines; "
            "measure when the host is quiet, or take ratios from interleaved runs only"
        )
    if where.cores is not None and measured.threads > where.cores:
        yield (
            f"{measured.threads} threads on {where.cores} cores wait for each other; "
            f"measure with --threads {where.cores} or fewer"
        )
    limit, highest = where.frequency_limit_hz, where.frequency_max_hz
    if limit is not None and highest is not None and limit < FREQUENCY_SHARE * highest:
        yield (
            f"the clock is limited to {limit / 1e9:.2f} of {highest / 1e9:.2f} GHz; "
            "lift the limit (`sudo cpupower frequency-set -u` with the higher one, or the power "
            "mode) and measure again"
        )
    peak, free = measured.peak_rss_bytes, where.memory_available_bytes
    if peak is not None and free is not None and free < peak:
        yield (
            f"only {free / 1e6:.0f} MB of memory were free, the run took {peak / 1e6:.0f} MB: "
            "swapping may have been timed; free memory, or measure a smaller batch"
        )
    if where.governor in IDLE_GOVERNORS:
        yield (
            f"the frequency governor is {where.governor!r}, so the clock changes while measuring; "
            "set `sudo cpupower frequency-set -g performance` and measure again"
        )
    if where.throttled and where.throttled != "no":
        yield (
            f"the processor was throttled ({where.throttled}); "
            "cool it or give it a stronger power supply, then measure again"
        )
    hot = where.temperature_after_c
    if hot is not None and hot >= 80:
        yield (
            f"the processor reached {hot:.0f} °C, where many devices slow down; "
            "let it cool, add a heat sink, and measure again"
        )


def _provider(measured: Measurement) -> Iterator[str]:
    nodes = measured.provider_nodes
    if nodes and len(nodes) > 1:
        other = sum(count for name, count in nodes.items() if name != measured.provider)
        yield (
            f"{other} of {sum(nodes.values())} nodes ran outside of {measured.provider} "
            f"({', '.join(sorted(nodes))}); export with operators that it supports, or name the "
            "provider that runs most of them"
        )


def wrong_provider(requested: str, measured: Measurement) -> str | None:
    """Return the warning for a model that another execution provider ran than the requested one."""
    if requested == measured.provider:
        return None
    return (
        f"{requested} was requested, but {measured.provider} ran the model: this is not "
        f"{requested}'s time; check its driver and libraries"
    )


def _samples(measured: Measurement, stopped_by: str, half_width: float | None) -> Iterator[str]:
    summary = measured.summary()
    rounds = len(measured.samples_per_turn)
    if summary.count < FEWEST_SAMPLES or 0 < rounds < FEWEST_ROUNDS:
        yield (
            f"only {summary.count} samples in {rounds} rounds, too few to compare; "
            "raise the time limit (--time-limit) and measure again"
        )
    elif stopped_by != "precise":
        wanted = f"±{100 * half_width:.1f} %" if half_width else "the requested precision"
        limit = "time limit" if stopped_by == "time" else "limit of rounds"
        yield (
            f"the {limit} ended the run before the ratio was known to {wanted}; "
            "raise the limit, or stop other work, and measure again"
        )
    if summary.spread > SPREAD:
        yield (
            f"the samples spread over {100 * summary.spread:.0f} % of their median between the "
            "quartiles; stop other work, or pin the threads to idle cores (--pin), and measure "
            "again"
        )
    if not measured.warm_up_stable:
        yield (
            "warm-up did not become stable: the machine's speed varies; "
            "stop other work or let it cool, then measure again"
        )
    if measured.cpu_share is not None and measured.cpu_share < CPU_SHARE:
        yield (
            f"the timed calls had the processor for only {100 * measured.cpu_share:.0f} % of the "
            "time, other processes took the rest; stop them, or pin to an idle core (--pin), and "
            "measure again"
        )
    if not measured.peak_rss_exact:
        yield (
            "the peak memory may include the import of the runtime (the peak could not be reset "
            "here); read it as an upper bound"
        )
