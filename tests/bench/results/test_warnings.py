"""Each warning names what was observed and what to do about it; a good run has none."""

from __future__ import annotations

from typing import Any

import pytest
from bench_samples import measurement
from vitrim.bench.results.measurement import Environment
from vitrim.bench.results.warnings import warnings_for

QUIET: dict[str, Any] = {
    "cores": 4,
    "governor": "performance",
    "throttled": "no",
    "frequency_max_hz": 2e9,
    "frequency_limit_hz": 2e9,
}


def all_warnings(where: dict[str, Any], **fields: Any) -> str:
    return "\n".join(
        warnings_for(
            measurement(
                name="m", environment=Environment.model_validate({**QUIET, **where}), **fields
            )
        )
    )


@pytest.mark.parametrize(
    ("where", "fields", "words", "advice"),
    [
        (
            {"stolen_share": 0.07},
            {},
            "the hypervisor gave 7 % of the time to other machines",
            "measure when the host is quiet",
        ),
        ({"cores": 2}, {"threads": 4}, "4 threads on 2 cores wait for each other", "--threads 2"),
        (
            {"frequency_limit_hz": 1.5e9},
            {},
            "the clock is limited to 1.50 of 2.00 GHz",
            "lift the limit",
        ),
        (
            {"memory_available_bytes": 50_000_000},
            {"peak_rss_bytes": 90_000_000},
            "only 50 MB of memory were free, the run took 90 MB",
            "free memory",
        ),
        (
            {"throttled": "clock lowered because of the heat"},
            {},
            "the processor was throttled (clock lowered because of the heat)",
            "cool it",
        ),
        (
            {"governor": "powersave"},
            {},
            "the frequency governor is 'powersave'",
            "cpupower frequency-set -g performance",
        ),
        (
            {"virtual_machine": "KVM"},
            {},
            "a virtual machine (KVM)",
            "take ratios from interleaved runs",
        ),
        ({"temperature_after_c": 84.0}, {}, "the processor reached 84 °C", "let it cool"),
        (
            {"busy_cores_before": 1.5},
            {},
            "busy with other work (1.5 of 4 cores)",
            "stop the other work",
        ),
    ],
)
def test_a_warning_names_what_to_do(
    where: dict[str, Any], fields: dict[str, Any], words: str, advice: str
) -> None:
    found = all_warnings(where, **fields)
    assert words in found
    assert advice in found
    line = next(line for line in found.splitlines() if words in line)
    assert ";" in line or ":" in line


@pytest.mark.parametrize(
    "where",
    [{"stolen_share": 0.01}, {"frequency_limit_hz": 1.95e9}, {"memory_available_bytes": 8 * 2**30}],
)
def test_small_deviations_are_not_warned_of(where: dict[str, Any]) -> None:
    assert all_warnings(where) == all_warnings({})
