"""`--on ADDRESS`: which way leads to a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .measure import Measurable, measure_interleaved
from .measurement import Measurement


def measure_on(address: str, artifacts: Mapping[str, Measurable], threads: int = 1, **options: Any) -> dict[str, Measurement]:
    """Measure on `host` or ssh://user@host[:port]; options as of `measure_interleaved` and `measure_over_ssh`. Errors: InputError."""
    if address == "host":
        return measure_interleaved(artifacts, threads, **options)
    if address.startswith("ssh://"):
        from .remote_ssh import measure_over_ssh

        return measure_over_ssh(address, artifacts, threads, **options)
    raise InputError(f"--on {address!r}: no way to such a device; write `host` or ssh://user@host[:port]")
